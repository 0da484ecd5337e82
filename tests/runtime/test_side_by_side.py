"""One model in several threads, and its replicas on several devices: nobody sees what another does."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorpeft as tp
from tests.models import build, inputs, randomise, run
from tests.runtime.every import every
from tests.runtime.test_life import attached


@pytest.fixture(autouse=True)
def impatient() -> Iterator[None]:
    """Threads take turns after microseconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(*jobs: Callable[[], Any], times: int) -> list[list[Any]]:
    """What each job returns, every time, in a thread of its own."""
    found: list[list[Any]] = [[] for _ in jobs]

    def work(number: int) -> None:
        try:
            for _ in range(times):
                found[number].append(jobs[number]())
        except Exception as error:  # of the main thread's, below
            found[number].append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in (each for mine in found for each in mine if isinstance(each, Exception)):
        raise error
    return found


def check(jobs: Sequence[Callable[[], list[Tensor]]], times: int = 8) -> None:
    truths = [job() for job in jobs]
    assert not torch.allclose(truths[0][0][:1], truths[1][0][:1], rtol=1e-3)
    for found, truth in zip(at_once(*jobs, times=times), truths, strict=True):
        assert len(found) == times
        assert all(torch.allclose(a, b, rtol=1e-9) for each in found for a, b in zip(each, truth, strict=True))


@pytest.mark.parametrize("spec", ["lora", "lorta"])
def test_forward_passes(spec: str) -> None:
    model, _ = attached("llama", spec)

    def job(batch: int) -> Callable[[], list[Tensor]]:
        return lambda: [no_grad(model, inputs("llama", batch, seed=batch))]

    check([job(batch) for batch in (1, 3, 2)])


def no_grad(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return run(model, x)


def test_weights_that_are_replaced_for_a_while() -> None:
    model, _, _ = every()

    def job(seed: int) -> Callable[[], list[Tensor]]:
        x = torch.randint(0, 10, (4, 5), generator=torch.Generator().manual_seed(seed))

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return [model(x)]

        return forward

    check([job(seed) for seed in range(3)], times=20)
    with pytest.raises(AssertionError, match="embedding dimension"):  # an error lets the next one in
        model.attention(*[torch.zeros(2, 3, 5, dtype=torch.float64)] * 3)
    check([job(seed) for seed in range(2)])


def test_each_its_own_tasks() -> None:
    model, adapter = attached("bert", "shared_a")

    def job(ids: list[int]) -> Callable[[], list[Tensor]]:
        def forward() -> list[Tensor]:
            with adapter.tasks(torch.tensor(ids)):
                return [no_grad(model, inputs("bert", batch=2))]

        return forward

    check([job([0, 1]), job([2, 2]), job([1, 0])])


def test_gradients() -> None:
    model, adapter = attached("llama", "lorta")
    factors = list(adapter.parameters())

    def job(seed: int) -> Callable[[], list[Tensor]]:
        x = inputs("llama", seed=seed)
        return lambda: list(torch.autograd.grad(run(model, x).square().sum(), factors))

    check([job(seed) for seed in range(2)])


# Replicas, as nn.DataParallel makes them. It copies to devices; here each copy is one on the CPU.


class Copies(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.n = n
        return tuple(tensor.clone() for _ in range(n) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        size = len(gradients) // ctx.n
        return None, *(sum(gradients[at::size]) for at in range(size))


def copied(tensors: Sequence[Tensor], devices: Sequence[int], detach: bool = False) -> list[tuple[Tensor, ...]]:
    with torch.no_grad() if detach else contextlib.nullcontext():
        flat = Copies.apply(len(devices), *tensors) if tensors else ()
    return [flat[n * len(tensors) : (n + 1) * len(tensors)] for n in range(len(devices))]


@pytest.mark.parametrize("spec", ["lora", "lorta", "ia3", "bitfit", "every kind of site"])
def test_replicas(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they give what the model gives, and their gradients come together at its factors."""
    replicate: Any = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", copied)
    if spec == "every kind of site":
        model, adapter, x = every()
        forward: Callable[[nn.Module, Tensor], Tensor] = lambda model, x: model(x)  # noqa: E731
    else:
        model, x, forward = build("bert", torch.float64), inputs("bert", batch=4), run
        adapter = tp.attach(model, spec)
        randomise(adapter)
    factors = list(adapter.parameters())
    whole = forward(model, x)
    truth = torch.autograd.grad(whole.square().sum(), factors)
    halves = list(zip(replicate.replicate(model, [0, 1]), x.chunk(2), strict=True))
    jobs = [lambda replica=replica, half=half: replica(half) for replica, half in halves]
    (first,), (second,) = at_once(*jobs, times=1)
    found = torch.cat([y if spec == "every kind of site" else y[0] for y in (first, second)])
    assert torch.allclose(found, whole, rtol=1e-12)
    gradients = torch.autograd.grad(found.square().sum(), factors)
    assert all(torch.allclose(ours, its, rtol=1e-9) for ours, its in zip(gradients, truth, strict=True))
