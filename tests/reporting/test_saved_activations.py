"""What an adapter is said to keep for its backward pass is what autograd keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tensorpeft as tp
from tensorpeft.pipeline import front
from tensorpeft.planning.regime import Regime
from tensorpeft.reporting.saved_activations import kept_per_token
from tensorpeft.scanning.scan import scan
from tests.models import build, randomise

SPECS = [
    "adalora",
    "fact_tt",
    "glora",
    "gralora",
    "hira",
    "loha",
    "lokr",
    "lora",
    "lora_fa",
    "loretta_rep",
    "lorta",
    "lotr",
    "metatt",
    "moslora",
    "partial_lora",
    "randlora",
    "tera",
    "tied_lora",
    "vera",
]
THROUGH = "tensorpeft: 1\ntarget: {matrices: [query]}\nfactors: {v: {init: zeros}}\nupdate: W[d_out, d_in] * v[matrix, layer, %s]"


BOTH = (  # at a site that reads its input alone
    "tensorpeft: 1\ntarget: {matrices: [down]}\nrank: {r: 4}\nfactors: {v: {init: zeros}, B: {init: zeros}}\n"
    "update: W[d_out, d_in] * v[matrix, layer, d_out] + B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]"
)


def kept(model: nn.Module, tokens: int) -> int:
    """Numbers in the tensors that autograd keeps of a forward pass, each tensor's memory once."""
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(1, tokens, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(inputs_embeds=x, use_cache=False)[0]
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in found.values())


def per_token(model: nn.Module) -> float:
    """What factors and the model's own tables take does not grow with the tokens."""
    return (kept(model, 60) - kept(model, 40)) / 20


@pytest.mark.parametrize("name", [*SPECS, THROUGH % "d_out", THROUGH % "d_in"])
def test_autograd_keeps_so_much(name):
    """At query and value, whose input the base does not keep itself; four heads for eight, so their outputs differ."""
    model = build("llama").requires_grad_(False)
    alone = per_token(model)
    spec = tp.load_spec(name, matrices=["query", "value"], train=None)
    assert_kept(model, spec, alone)


def test_autograd_keeps_what_the_base_is_given_and_what_it_gives():
    model = build("llama").requires_grad_(False)
    alone = per_token(model)
    assert_kept(model, tp.load_spec(BOTH), alone)


def assert_kept(model, spec, alone):
    regime = Regime()
    told = kept_per_token(front(spec, scan(model), regime))
    adapter = tp.attach(model, spec, regime=regime)  # not for as few tokens as are given here
    randomise(adapter)
    assert told == per_token(model) - alone > 0
