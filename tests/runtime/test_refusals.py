"""What cannot be done is refused in one sentence, before anything is changed: no error of torch's or Python's comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tensorpeft as tp
from tests.runtime import small
from tests.runtime.small import LORA, close, move, or_refused, spec
from tests.runtime.test_side_by_side_calls import TASKS


def refused(call: Callable[[], Any], *words: str) -> None:
    with pytest.raises(tp.TensorpeftError) as caught:
        call()
    assert small.is_sentence(caught.value), str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def attached(update: str = LORA) -> tuple[nn.Module, tp.Adapter]:
    model = small.net()
    return model, move(model, tp.attach(model, spec(update, "0")))


@pytest.mark.parametrize("what", ["whole", "one site"])
def test_merging_into_weights_that_are_not_there(what):
    """On the meta device, where offloaded weights are too."""
    model, adapter = attached()
    (model if what == "whole" else model[0]).to("meta")
    refused(adapter.merge, "meta")
    assert adapter.merged is None


def test_attaching_under_inference_mode():
    """Its tensors never take gradients: it is refused, or trains all the same."""
    model = small.net()
    with torch.inference_mode():
        adapter = or_refused(lambda: tp.attach(model, spec(LORA, "0")))
    if adapter is not None:
        move(model, adapter)
        model(small.x()).square().sum().backward()
        assert all(parameter.grad is not None for parameter in adapter.factors.parameters())


@pytest.mark.parametrize("task", [True, False, 1.0, "1", None, -1, 3, torch.tensor([1])], ids=str)
def test_a_task_that_is_none(task):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6)).double()
    adapter = move(model, tp.attach(model, spec(TASKS, "0")))
    refused(lambda: adapter.merge(task=task), "task")
    refused(lambda: adapter.delta("0", task=task), "task")
    assert adapter.merged is None


@pytest.mark.parametrize("task", [True, 0, "1"], ids=str)
def test_a_task_where_there_are_none(task):
    _, adapter = attached()
    refused(lambda: adapter.merge(task=task), "no task mode")
    refused(lambda: adapter.delta("0", task=task), "no task mode")


@pytest.mark.parametrize("path", [5, None, ["0"], "", "1", "9", b"0"], ids=str)
def test_a_site_that_is_none(path):
    _, adapter = attached()
    refused(lambda: adapter.delta(path))


@pytest.mark.parametrize("ids", [[0, 1], None, 5, "01", (0, 1), {0, 1}], ids=str)
def test_tasks_that_are_no_tensor(ids):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6)).double()
    adapter = tp.attach(model, spec(TASKS, "0"))

    def enter() -> None:
        with adapter.tasks(ids):
            pass

    refused(enter, "tasks()")


@pytest.mark.parametrize("folder", ["a" * 300, "a\0b", "", "a/" * 3000, 5, None, b"a"], ids=lambda f: repr(f)[:8])
def test_loading_from_what_is_no_folder(folder):
    model = small.net()
    before = small.traces(model)
    refused(lambda: tp.load(model, folder))
    assert small.traces(model) == before


@pytest.mark.parametrize(
    "rank",
    [10**5000, -(10**5000), 0, -1, 1.5, True, "many", float("nan"), float("inf"), [2], None],
    ids=lambda r: str(type(r)),
)
def test_a_rank_that_is_none(rank):
    refused(lambda: tp.load_spec("lora", rank=rank), "rank")


@pytest.mark.parametrize("model", [None, 5, "llama-2-7b", nn.Linear, torch.zeros(2)], ids=lambda m: repr(m)[:8])
def test_attaching_to_what_is_no_model(model):
    refused(lambda: tp.attach(model, "lora"))


@pytest.mark.parametrize("of", [None, 5, b"lora", {"rank": 2}], ids=str)
def test_attaching_what_is_no_spec(of):
    model = small.net()
    before = small.traces(model)
    refused(lambda: tp.attach(model, of))
    assert small.traces(model) == before


@pytest.mark.parametrize("name", [5, "", "a.b", "a b", b"a"], ids=str)
def test_a_name_that_is_none(name):
    model = small.net()
    before = small.traces(model)
    refused(lambda: tp.attach(model, spec(LORA, "0"), name=name))
    assert small.traces(model) == before


@pytest.mark.parametrize("update", [LORA, small.IA3, small.DORA], ids=["lora", "ia3", "dora"])
def test_forward_mode_derivatives_are_right_or_refused(update):
    model, _ = attached(update)
    x, v = small.x(), torch.ones(5, 6, dtype=torch.float64)
    found = or_refused(lambda: torch.func.jvp(model, (x,), (v,)))
    if found is not None:
        step = 1e-6
        with torch.no_grad():
            expected = (model(x + step * v) - model(x - step * v)) / (2 * step)
        assert torch.allclose(found[1], expected, atol=1e-6)


def test_merging_what_is_merged_and_unmerging_what_is_not():
    model, adapter = attached()
    refused(adapter.unmerge, "not merged")
    expected = model(small.x())
    adapter.merge()
    refused(adapter.merge, "already merged")
    assert close(model(small.x()), expected)
    adapter.detach()
    for operation in (adapter.merge, adapter.unmerge, adapter.detach):
        refused(operation)
    assert small.traces(model) == small.traces(small.net())


def test_reset_while_merged_is_refused_or_reaches_the_weights():
    model, adapter = attached()
    adapter.merge()
    if or_refused(lambda: (adapter.reset_parameters(),)) is not None:
        adapter.unmerge()
        assert close(model(small.x()), small.net()(small.x()))
    adapter.detach()
    assert small.traces(model) == small.traces(small.net())
