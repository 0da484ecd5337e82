"""Adapters where something else has a hand in the model: weights not there, modules replaced, kernels that take a weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tensorpeft as tp
from tests.models import randomise

ALL = "tensorpeft: 1\ntarget: all-linear\nstructure: matrix\nrank: 2\n"


def attached() -> tuple[nn.Module, tp.Adapter]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    adapter = tp.attach(model, ALL)
    randomise(adapter)
    return model, adapter


def test_factors_without_values_are_told():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
    tp.attach(model, ALL)
    model[0].weight, model[0].bias = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.zeros(3))
    with pytest.raises(tp.AdapterError) as caught:
        model(torch.ones(2, 4))
    assert str(caught.value) == (
        "the adapter's factors are on the meta device and have no values; "
        "attach it when the model's weights are loaded, and to a model that is not offloaded"
    )


def test_nothing_is_merged_into_a_module_of_other_sides():
    model, adapter = attached()
    model[2] = nn.Linear(6, 5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(tp.AdapterError) as caught:
        adapter.merge()
    assert str(caught.value) == (
        "`2` was replaced (by Linear) after adapter `adapter` was attached, which is not on what is there now; "
        "detach it and attach it again"
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Mixer(nn.Module):
    """A module of which a fused kernel takes the weight where there is one."""

    def __init__(self):
        super().__init__()
        self.out, self.fused = nn.Linear(4, 4), False

    def forward(self, x):
        return nn.functional.linear(x, self.out.weight, self.out.bias) if self.fused else self.out(x)


def test_a_fused_kernel_has_the_update_as_a_call_has():
    torch.manual_seed(0)
    model = nn.Sequential(Mixer(), nn.Tanh(), Mixer())
    adapter = tp.attach(model, ALL)
    randomise(adapter)
    x, found = torch.randn(5, 4), {}
    for fused in (False, True):
        model[0].fused = model[2].fused = fused
        found[fused] = model(x)
        found[fused].square().sum().backward()
        found[fused, "grad"] = [parameter.grad.clone() for parameter in adapter.parameters()]
        adapter.zero_grad()
    assert torch.allclose(found[True], found[False], atol=1e-6)
    for one, other in zip(found[True, "grad"], found[False, "grad"], strict=True):
        assert one.any()
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
    adapter.merge()
    assert torch.allclose(model(x), found[True], atol=1e-6)


class Helper(nn.Module):
    """One whose weight is read by a method that others call, past its forward."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        return self.out(x)

    def help(self, x, clip=None):
        return self.out(x) if clip is None else x @ self.out.weight.clamp(-clip, clip).mT


class Helped(nn.Module):
    def __init__(self):
        super().__init__()
        self.helper = Helper()

    def forward(self, x):
        return self.helper.help(x)


def test_what_a_method_calls_past_the_forward_has_the_update():
    model = Helped()
    adapter = tp.attach(model, ALL)
    randomise(adapter)
    x = torch.randn(5, 4)
    hooked = model(x)
    with adapter.disabled():
        assert not torch.allclose(model(x), hooked, atol=1e-3)
    adapter.merge()
    assert torch.allclose(model(x), hooked, atol=1e-6)
