"""PEFT's layers whose numbers stand at places that are drawn: told our places, they give the same dW and the same output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import peft
import pytest
import torch
from torch import Tensor, nn

import tensorpeft as tp
from tensorpeft.model.shape import Site
from tests.runtime.reference import block_of
from tests.runtime.test_peft import check_agrees, layers
from tests.structures import model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # of transformers, asked by PEFT
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),  # of torch, asked by PEFT's SHiRA
]


@dataclass(frozen=True)
class Entries:
    """A method in both libraries: of ours the masked factor, of PEFT's layer the attributes of its places and its numbers."""

    config: Callable[..., peft.PeftConfig]
    settings: dict[str, object]
    factor: str
    places: str
    numbers: str
    keep: str
    spec: str = ""
    flat: bool = False  # the places are numbers, not pairs of row and column
    modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "up_proj", "down_proj"])
    change: Callable[[nn.Module], Tensor] = lambda layer: layer.get_delta_weight("default").to_dense()
    tolerance: float = 1e-12  # of the output of PEFT's model


def fourierft_change(layer: nn.Module) -> Tensor:
    """What PEFT's layer computes, in float64: the layer itself works in float32."""
    spectrum = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    spectrum[tuple(layer.indices["default"])] = layer.fourierft_spectrum["default"]
    return torch.fft.ifft2(spectrum).real * layer.fourierft_scaling["default"]


METHODS = {
    "shira": Entries(  # r is 1: as many numbers as LoRA would have
        peft.ShiraConfig, {"r": 1}, "D", "shira_indices", "shira_weight", "keep(160)", modules=["up_proj", "down_proj"]
    ),
    "supertuning": Entries(
        peft.SupertuningConfig,
        {"sparsity": 63 / 64},
        "D",
        "supertuning_indices",
        "supertuning_values",
        "keep(1 / 64)",
        spec="shira",
        flat=True,
    ),
    "fourierft": Entries(
        peft.FourierFTConfig,
        {"n_frequency": 40, "scaling": 150.0},
        "S",
        "indices",
        "fourierft_spectrum",
        "keep(40)",
        change=fourierft_change,
        tolerance=1e-6,
    ),
    "waveft": Entries(
        peft.WaveFTConfig, {"n_frequency": 40, "scaling": 25.0}, "S", "waveft_indices", "waveft_spectrum", "keep(40)"
    ),
}


def kept(adapter: tp.Adapter, factor: str, site: Site) -> tuple[Tensor, Tensor]:
    """The places of a site's entries in a (d_out, d_in) grid, flat, and the numbers there, a view."""
    block = block_of(adapter, factor, site.key, [site.d_out, site.d_in])
    values = adapter.factors[block.name].split(block.key_sizes)[block.keys.index(site.key)]
    return torch.from_numpy(block.entries[site.key].positions), values


@torch.no_grad()
def told(layer: nn.Module, method: Entries, positions: Tensor, d_in: int, draw: torch.Generator) -> Tensor:
    """Give a layer of PEFT's places and random numbers, which are returned."""
    places = positions if method.flat else torch.stack([positions // d_in, positions % d_in])
    numbers = torch.randn(len(positions), generator=draw, dtype=torch.float64)
    assert getattr(layer, method.numbers)["default"].shape == numbers.shape
    getattr(layer, method.places)["default"] = places
    getattr(layer, method.numbers)["default"].data = numbers
    return numbers


@pytest.mark.parametrize("name", METHODS)
def test_equals_peft(name: str) -> None:
    method, draw = METHODS[name], torch.Generator().manual_seed(4)
    config = method.config(target_modules=method.modules, **method.settings)
    other = peft.get_peft_model(model("llama"), config).base_model.model.double().eval()
    base = model("llama")
    modes = "d_out, d_in" if method.factor == "D" else "u, v"
    mask = {f"{method.factor}[{modes}]": method.keep}
    adapter = tp.attach(base, tp.load_spec(method.spec or name, matrices=method.modules, mask=mask))
    theirs = layers(other)
    assert {site.module for site in adapter.sites} == set(theirs)
    for site in adapter.sites:
        positions, values = kept(adapter, method.factor, site)
        values.data.copy_(told(theirs[site.module], method, positions, site.d_in, draw))
    adapter.refresh()
    changes = {path: method.change(layer) for path, layer in theirs.items()}
    check_agrees("llama", base, adapter, other, changes, method.tolerance)
