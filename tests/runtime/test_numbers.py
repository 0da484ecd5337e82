"""Numbers at the edge: rows of zeros, half precision, factors that are written where no version counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tensorpeft as tp
from tests.runtime import small
from tests.runtime.small import DORA, LORA, close, move, spec


def with_zero_rows(dtype: torch.dtype = torch.float64, rows: slice = slice(2, 4)) -> nn.Sequential:
    model = small.net().to(dtype)
    with torch.no_grad():
        model[0].weight[rows] = 0
    return model


# The quotient of a row of zeros is 1


@pytest.mark.parametrize("rows", [slice(2, 4), slice(None)], ids=["some", "all"])
def test_dora_starts_at_the_base_where_rows_are_zero(rows):
    model = with_zero_rows(rows=rows)
    base = model(small.x())
    adapter = tp.attach(model, spec(DORA, "0"))
    output = model(small.x())
    assert close(output, base)
    output.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter.factors.parameters())
    assert torch.count_nonzero(adapter.delta("0")) == 0
    adapter.merge()
    assert close(model(small.x()), base)


def test_dora_trains_on_rows_of_zeros():
    model = with_zero_rows()
    weight = model[0].weight.detach().clone()
    adapter = move(model, tp.attach(model, spec(DORA, "0")))
    change = small.change(adapter, weight)
    assert change.isfinite().all()
    bare = with_zero_rows()
    expected = small.with_changes(bare, {"0.weight": change})
    output = model(small.x())
    assert close(output, expected)
    assert close(adapter.delta("0"), change)
    output.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter.factors.parameters())
    adapter.merge()
    assert close(model(small.x()), expected)


def test_a_row_that_an_update_takes_to_zero():
    model = small.net()
    adapter = tp.attach(model, spec(DORA, "0"))
    with torch.no_grad():  # W + BA = 0 in row 0
        adapter.factors["A"][0, 0, 0] = model[0].weight[0]
        adapter.factors["B"][0, 0].zero_()
        adapter.factors["B"][0, 0, 0, 0] = -1
    assert model(small.x()).isfinite().all()
    assert adapter.delta("0").isfinite().all()


# Half precision


def test_a_merge_that_would_overflow_is_refused_before_anything_is_written():
    """Of the second weight: the first has its bits still."""
    model = small.net().half()
    with torch.no_grad():
        model[2].weight.fill_(60000)
    adapter = tp.attach(model, spec(LORA, "0", "2"))
    with torch.no_grad():
        for parameter in adapter.factors.parameters():
            parameter.fill_(70)
    before = small.traces(model)
    with pytest.raises(tp.AdapterError) as caught:
        adapter.merge()
    assert small.is_sentence(caught.value)
    assert "2" in str(caught.value)
    assert small.traces(model) == before
    assert adapter.merged is None
    assert adapter.enabled


def test_products_beyond_half_precision():
    """A x is 1e5, B small: their product is a number that half precision has."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6)).half()
    adapter = tp.attach(model, spec(LORA, "0"))
    with torch.no_grad():
        adapter.factors["A"].fill_(200)
        adapter.factors["B"].fill_(1e-5)
    x = torch.full((3, 6), 100.0).half()
    expected = x.double() @ (model[0].weight.double() + small.change(adapter, model[0].weight).double()).T
    expected = expected + model[0].bias.double()
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            assert torch.allclose(model(x).double(), expected, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zero_rows_in_half_precision(dtype):
    model = with_zero_rows(dtype)
    x = small.x().to(dtype)
    base = model(x)
    adapter = tp.attach(model, spec(DORA, "0"))
    assert torch.allclose(model(x).float(), base.float(), rtol=0.05, atol=0.05)
    adapter.merge()
    assert model[0].weight.isfinite().all()


# Factors that change where no version counts up


def scaled(parameter: nn.Parameter) -> None:
    parameter.data.mul_(2)


def replaced(parameter: nn.Parameter) -> None:
    parameter.data = 2 * parameter.data


def copied(parameter: nn.Parameter) -> None:
    parameter.data.copy_(2 * parameter.data)


def in_inference(parameter: nn.Parameter) -> None:
    with torch.inference_mode():
        parameter.data.mul_(2)


def through_numpy(parameter: nn.Parameter) -> None:
    parameter.detach().numpy()[...] *= 2


WRITES: tuple[Callable[[nn.Parameter], None], ...] = (scaled, replaced, copied, in_inference, through_numpy)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("gradients", [True, False], ids=["gradients", "none"])
@pytest.mark.parametrize("update", [LORA, small.IA3, DORA], ids=["lora", "ia3", "dora"])
def test_a_submodule_sees_factors_that_were_written_to(update, gradients, write):
    """All of them, or none before ``adapter.refresh()`` is called: never some old and some new."""
    model = nn.Sequential(small.net())
    adapter = move(model, tp.attach(model, spec(update, "0.0")))
    weight = model[0][0].weight
    with torch.set_grad_enabled(gradients):
        model(small.x())
        old = _dense(weight + small.change(adapter, weight), model)
        for parameter in adapter.factors.parameters():
            write(parameter)
        new = _dense(weight + small.change(adapter, weight), model)
        found = model[0][0](small.x())
        assert close(found, old) or close(found, new)
        adapter.refresh()
        assert close(model[0][0](small.x()), new)
        assert close(model(small.x()), model[0](small.x()))


def _dense(weight: Tensor, model: nn.Module) -> Tensor:
    return nn.functional.linear(small.x(), weight, model[0][0].bias)
