"""Threads, coroutines and generators that use one adapter at once: tasks, saving, and gradients that come in parts."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

import tensorpeft as tp
from tests.runtime import small
from tests.runtime.small import LORA, close, move, or_refused, spec

TASKS = "tasks: 3\nrank: {r: 2}\nupdate: B[task, d_out, r] * A[task, r, d_in]\nfactors: {B: {init: zeros}}\n"


def with_tasks() -> tuple[nn.Module, tp.Adapter]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6)).double()
    return model, move(model, tp.attach(model, spec(TASKS, "0")))


def expected(model: nn.Module, adapter: tp.Adapter, ids: list[int], x: Tensor) -> Tensor:
    changes = torch.einsum("tor,tri->toi", adapter.factors["B"], adapter.factors["A"])[ids]
    return model[0].weight.matmul(x.unsqueeze(-1)).squeeze(-1) + model[0].bias + torch.einsum("toi,ti->to", changes, x)


IDS = ([0, 0, 1, 2, 1], [2, 1, 0, 0, 0])


def test_two_coroutines_have_their_own_tasks():
    model, adapter = with_tasks()
    outputs: dict[int, list[Tensor]] = {0: [], 1: []}

    async def serve(number: int) -> None:
        with adapter.tasks(torch.tensor(IDS[number])):
            for _ in range(3):
                await asyncio.sleep(0)
                outputs[number].append(model(small.x()))

    async def both() -> None:
        await asyncio.gather(serve(0), serve(1))

    asyncio.run(both())
    for number, found in outputs.items():
        assert all(close(output, expected(model, adapter, IDS[number], small.x())) for output in found)
    with pytest.raises(tp.AdapterError, match="call the model within"):
        model(small.x())


def test_contexts_that_end_in_another_order_leave_no_ids():
    model, adapter = with_tasks()
    first, second = (adapter.tasks(torch.tensor(ids)) for ids in IDS)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert close(model(small.x()), expected(model, adapter, IDS[1], small.x()))
    second.__exit__(None, None, None)
    with pytest.raises(tp.AdapterError, match="call the model within"):
        model(small.x())


def test_nested_contexts_restore_what_was():
    model, adapter = with_tasks()
    with adapter.tasks(torch.tensor(IDS[0])):
        with adapter.tasks(torch.tensor(IDS[1])):
            assert close(model(small.x()), expected(model, adapter, IDS[1], small.x()))
        assert close(model(small.x()), expected(model, adapter, IDS[0], small.x()))


def test_ids_are_copied():
    model, adapter = with_tasks()
    ids = torch.tensor(IDS[0])
    with adapter.tasks(ids):
        ids.fill_(99)
        assert close(model(small.x()), expected(model, adapter, IDS[0], small.x()))


def test_a_thread_has_no_ids_of_another():
    model, adapter = with_tasks()
    caught: list[BaseException] = []

    def other() -> None:
        try:
            model(small.x())
        except tp.AdapterError as error:
            caught.append(error)

    with adapter.tasks(torch.tensor(IDS[0])):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(20)
    assert len(caught) == 1


def test_generators_that_take_turns():
    model, adapter = with_tasks()

    def serve(number: int):
        with adapter.tasks(torch.tensor(IDS[number])):
            while True:
                yield model(small.x())

    served = [serve(0), serve(1)]
    for number in (0, 1):
        assert close(next(served[number]), expected(model, adapter, IDS[number], small.x()))
    for generator in served:
        generator.close()
    with pytest.raises(tp.AdapterError, match="call the model within"):
        model(small.x())


@pytest.mark.parametrize("shape", [(4, 5, 6), (2, 3, 6)], ids=str)
def test_a_batch_on_another_axis_is_refused(shape):
    """(tokens, batch, width), as some models have it inside."""
    model, adapter = with_tasks()
    with adapter.tasks(torch.tensor([0, 1, 2, 1, 0][: shape[1]])), pytest.raises(tp.AdapterError) as caught:
        model(torch.randn(shape, dtype=torch.float64))
    assert small.is_sentence(caught.value)


# A file holds one moment


@pytest.mark.parametrize("train", ["", "norms"])
def test_saving_beside_a_thread_that_trains(train, tmp_path: Path):
    model = small.net()
    adapter = move(model, tp.attach(model, spec(LORA, "0", "2", train=train)))
    stop = threading.Event()

    def training() -> None:
        with torch.no_grad():
            while not stop.is_set():
                for parameter in adapter.parameters():
                    parameter.add_(1e-3)

    thread = threading.Thread(target=training)
    thread.start()
    try:
        for _ in range(25):
            adapter.save(tmp_path)
            tp.load(small.net(), tmp_path)
    finally:
        stop.set()
        thread.join()


# A factor gets its gradient once


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """The other rank is not there: what would be sent to it is what a test looks at."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=True)
        return x


@pytest.mark.parametrize(
    "update",
    ["B[layer, d_out, r] * A[layer, r, d_in]", "B[d_out, r] * A[r, d_in]"],
    ids=["a factor each", "one for all"],
)
@pytest.mark.usefixtures("two_ranks")
def test_reentrant_checkpointing_sends_whole_gradients(update):
    """DistributedDataParallel sends what it finds when a parameter first has a gradient: of one in parts the first part."""
    torch.manual_seed(0)
    model = Checkpointed().double()
    text = f"rank: {{r: 2}}\nupdate: {update}\nfactors: {{B: {{init: zeros}}}}\n"
    adapter = move(model, tp.attach(model, spec(text, "layers.0", "layers.1", "layers.2")))
    found: dict[int, Tensor] = {}

    def send(state, bucket):
        found.update((id(p), g.clone()) for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True))
        sent: torch.futures.Future[Tensor] = torch.futures.Future()
        sent.set_result(bucket.buffer())
        return sent

    ranks = nn.parallel.DistributedDataParallel(model)
    ranks.register_comm_hook(None, send)
    if or_refused(lambda: (ranks(small.x().requires_grad_()).square().sum().backward(),)) is not None:
        alone = copy.deepcopy(model)
        alone.zero_grad()
        alone(small.x().requires_grad_()).square().sum().backward()
        for parameter, its in zip(adapter.parameters(), small.adapter_of(alone).parameters(), strict=True):
            assert close(found[id(parameter)], its.grad)
