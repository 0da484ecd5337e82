"""Where the plan says chain, no tensor of dW's size ever exists."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tensorpeft as tp
from tests.models import inputs, randomise, run
from tests.structures import STRUCTURES, model


class Sizes(TorchDispatchMode):
    """Records the number of elements of every tensor that is made, views of the base's own weights left out."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.own = {p.untyped_storage().data_ptr() for p in base.parameters()}
        self.made: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.own:
                self.made.add(tensor.numel())
        return out


def sizes_of(base: nn.Module, action: Any) -> set[int]:
    with Sizes(base) as recorder:
        action()
    return recorder.made


SPECS = {
    "lora": ("llama", tp.load_spec("lora", matrices=["all-linear"], rank=3)),
    "vera": ("llama", tp.load_spec("vera", rank=15)),
    "lorta": ("llama", tp.load_spec("lorta")),
    "fact-tt": ("gpt2", tp.load_spec(STRUCTURES["fact-tt"])),
    "fact-tk": ("gpt2", tp.load_spec(STRUCTURES["fact-tk"])),
}


@pytest.mark.parametrize("name", SPECS)
def test_no_tensor_of_the_size_of_dw(name: str) -> None:
    architecture, spec = SPECS[name]
    base, x = model(architecture), inputs(architecture)
    before = sizes_of(base, lambda: run(base, x))
    adapter = tp.attach(base, spec)
    randomise(adapter)
    areas = {site.d_out * site.d_in for site in adapter.sites} | {
        site.module_d_out * site.d_in for site in adapter.sites
    }
    assert not before & areas  # else the test could not tell
    assert not sizes_of(base, lambda: run(base, x).sum().backward()) & areas
    path = adapter.sites[0].module
    assert sizes_of(base, lambda: adapter.delta(path)) & areas  # which makes dW: the recorder sees it
