"""By itself an adapter is planned for what each input turns out to be; a regime that is given holds for every input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import tensorpeft as tp
from tensorpeft.pipeline import front
from tensorpeft.planning.regime import Regime
from tensorpeft.scanning.scan import scan
from tests.models import build, enliven

METHODS = ("fact_tt", "randlora", "vera")  # their plans differ between few tokens and many


def adapted(method: str, regime: Regime | None = None) -> nn.Module:
    model = build("llama")
    enliven(tp.attach(model, method, regime=regime))
    return model


def tokens(number: int) -> Tensor:
    return torch.randint(50, (1, number), generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("method", METHODS)
def test_inputs_have_the_plan_of_their_length(method: str) -> None:
    adapts = adapted(method)
    for number, planned in ((1, 1), (60, 64), (200, 256), (3000, 4096)):
        for gradients in (True, False) if method == "randlora" else (False,):
            fixed = adapted(method, Regime(planned, gradients, number_bytes=4))
            with torch.set_grad_enabled(gradients):
                found, expected = (model(input_ids=tokens(number)).logits for model in (adapts, fixed))
            assert torch.equal(found, expected), (number, gradients)


def test_in_training_no_plan_holds_more_than_the_adapters_own() -> None:
    """VeRA's plan for 200 tokens makes the product of two factors for every site, and holds it for the backward pass."""
    spec, own = tp.load_spec("vera"), Regime()
    near = own.near(200, gradients=True, number_bytes=4)
    held = [front(spec, scan(deep()), regime).held for regime in (near, own)]
    assert held[0] > held[1]
    found = []
    for regime in (None, own, near):
        model = deep()
        enliven(tp.attach(model, spec, regime=regime))
        found.append(model(input_ids=tokens(200)).logits)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def deep() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=8)).eval()


def test_a_given_regime_holds() -> None:
    fixed, adapts = adapted("randlora", Regime(4096)), adapted("randlora")
    x = tokens(1)
    assert not torch.equal(fixed(input_ids=x).logits, adapts(input_ids=x).logits)  # in another order
    assert torch.equal(copy.deepcopy(fixed)(input_ids=x).logits, fixed(input_ids=x).logits)


def test_a_decoding_step_does_not_build_updates() -> None:
    def flops(model: nn.Module) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(input_ids=tokens(1))
        return counter.get_total_flops()

    for method in METHODS:
        assert flops(adapted(method)) <= flops(adapted(method, Regime(4096)))
    assert flops(adapted("randlora")) < flops(adapted("randlora", Regime(4096)))


@pytest.mark.parametrize(
    ("tokens", "power"),
    [(0, 1), (1, 1), (2, 4), (7, 4), (8, 16), (31, 16), (32, 64), (2047, 1024), (2048, 4096), (10**6, 4096)],
)
def test_lengths_are_rounded_to_powers_of_4(tokens: int, power: int) -> None:
    regime = Regime(balance=10).near(tokens, gradients=False, number_bytes=4)
    assert regime == Regime(power, gradients=False, number_bytes=4, balance=10)
