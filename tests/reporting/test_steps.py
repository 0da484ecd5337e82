"""The steps that are told are those that are planned, and contract to what the update says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from string import ascii_letters

import numpy as np
import pytest

from tensorpeft.language.loader import load_spec
from tensorpeft.model.cards import model_shape
from tensorpeft.network.lower import lower
from tensorpeft.network.network import Network
from tensorpeft.pipeline import shape_of
from tensorpeft.planning.plan import plan
from tensorpeft.planning.regime import Regime
from tensorpeft.reporting.steps import CountedStep, step_table, steps
from tests.catalogue_page import fitted, without_scores
from tests.reporting.test_drawing import SPECS, network
from tests.structures import STRUCTURES

SMALL = {
    "model_type": "roberta",
    "architectures": ["RobertaForSequenceClassification"],
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "intermediate_size": 128,
    "max_position_embeddings": 34,
    "type_vocab_size": 1,
}
MIXTURE = {
    "model_type": "mixtral",
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 128,
    "num_local_experts": 2,
}


@cache
def small(name: str) -> Network:
    """The network of a structure, or of a shipped spec on a model so small that its numbers can be worked out."""
    if name in STRUCTURES:
        return network(name)
    return fitted(without_scores(load_spec(name)), model_shape(SMALL), model_shape(MIXTURE))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("tokens", [1, 4096])
def test_they_cost_what_the_plan_costs(name, tokens):
    planned = plan(network(name), Regime(tokens))
    assert sum(step.flops * step.runs for step in steps(planned)) == planned.flops


def einsum(*tensors: tuple[np.ndarray, tuple[str, ...]], to: tuple[str, ...]) -> np.ndarray:
    letters = dict(zip(dict.fromkeys(mode for _, modes in tensors for mode in modes), ascii_letters, strict=False))
    inputs = ",".join("".join(letters[mode] for mode in modes) for _, modes in tensors)
    output = "".join(letters[mode] for mode in to)
    return np.einsum(f"{inputs}->{output}", *(array for array, _ in tensors), optimize=True)


def contracted(done: Iterable[CountedStep], tensors: dict[str, tuple[np.ndarray, tuple[str, ...]]]) -> np.ndarray:
    """What the steps make of the factors and of x; site modes, of which each is of size 1 here, are left out.

    The base has made Wx, of x and W, and makes y of what the steps add to x.
    """
    if "W" in tensors:
        rows = tensors["W"][1][: len(tensors["W"][1]) - len(tensors["x"][1]) + 1]
        tensors["Wx"] = einsum(tensors["x"], tensors["W"], to=("token", *rows)), ("token", *rows)
    for step in done:
        given = []
        for name, modes in (step.left, step.right):
            array, known = tensors[name]
            inner = tuple(mode for mode in modes if mode not in ("matrix", "layer"))
            given.append((array.transpose([known.index(mode) for mode in inner]), inner))
        kept = tuple(mode for mode in step.result[1] if mode not in ("matrix", "layer"))
        tensors[step.result[0]] = einsum(*given, to=kept), kept
    if "x'" in tensors:
        return einsum(tensors["x'"], tensors["W"], to=("token", *rows))
    return tensors["y"][0]


def at_one_site(known: Network) -> Network:
    """The first product at the first site alone."""
    group = known.groups[0]
    operands = tuple(replace(operand, keys=operand.keys[:1]) for operand in group.terms[0].operands)
    term = replace(group.terms[0], operands=operands)
    return replace(known, groups=(replace(group, sites=group.sites[:1], terms=(term,)),))


def is_plain(name: str) -> bool:
    """Nothing is masked, no task is gathered, no factor stands there twice, and x is met: so that a name is a tensor."""
    operands = small(name).groups[0].terms[0].operands if small(name).groups else ()
    once = len({operand.factor for operand in operands}) == len(operands) > 0
    return (
        once
        and small(name).sites[0].is_linear
        and all(o.block.kept is None and "task" not in o.modes for o in operands)
    )


@pytest.mark.parametrize("name", [*filter(is_plain, SPECS)])
@pytest.mark.parametrize("tokens", [1, 100])
def test_they_contract_to_the_update(name, tokens):
    planned = plan(at_one_site(small(name)), Regime(tokens))
    term = planned.network.groups[0].terms[0]
    rng = np.random.default_rng(0)
    sizes = {**term.sizes, "token": tokens}
    tensors = {o.factor: (rng.normal(size=[sizes[mode] for mode in o.modes]), o.modes) for o in term.operands}
    x = ("token", *term.d_in)
    tensors["x"] = rng.normal(size=[sizes[mode] for mode in x]), x
    truth = einsum(*tensors.values(), to=("token", *term.d_out))
    found = contracted(steps(planned), dict(tensors))
    assert found == pytest.approx(truth, rel=1e-9, abs=1e-9 * abs(truth).max())


def test_bytes_and_the_backward_pass():
    """LoRA at a site reads x and A and writes r numbers a token, then reads these, B and y and writes y."""
    lora = network("lora")
    found = [(str(step), step.runs, step.bytes, step.backward // step.flops) for step in steps(plan(lora, Regime(100)))]
    together = 12 if lora.sites[0].reads else 24
    assert found[-1] == ("y[token, d_out] = x1[token, r] * B[r, d_out]", 24, 2 * (100 * 8 + 8 * 768 + 2 * 100 * 768), 2)
    assert found[0][1] == together
    alone = steps(plan(lora, Regime(100, gradients=False)))
    assert {step.backward for step in alone} == {0}


def test_a_frozen_factor_has_half_a_backward_pass():
    """VeRA's A and B pass the gradient on, and have none of their own."""
    done = steps(plan(network("vera"), Regime(100)))
    assert {step.right[0]: step.backward // step.flops for step in done} == {"A": 1, "d": 2, "B": 1, "b": 2}


def test_steps_that_differ_in_sizes_alone_are_one_row():
    done = steps(plan(lower(load_spec("partial_lora"), shape_of("roberta-base")), Regime(100)))
    table = step_table(done, 100)
    assert [row[0] for row in table.rows] == [
        "x1[token, r] = x[token, d_in] * A[d_in, r]",
        "y[token, d_out] = x1[token, r] * B[r, d_out]",
        "all, for 100 tokens",
    ]
    assert table.rows[0][1] == 24
    assert table.rows[-1][3] == sum(step.flops * step.runs for step in done)


@pytest.mark.parametrize(
    "update", ["B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]", "W[d_out, d_in] * v[matrix, layer, d_out]"]
)
@pytest.mark.parametrize(
    ("model", "matrix"),
    [
        ("llama-2-7b", "embed_tokens"),
        ("mixtral-8x7b", "gate"),
        ("vit-base", "projection"),
        ("whisper-large-v3", "conv1"),
    ],
)
def test_other_sites_than_linear_modules_cost_what_the_plan_costs(model, matrix, update):
    rank = "rank: {r: 4}\n" if "r]" in update else ""
    factors = "{B: {init: zeros}}" if rank else "{v: {init: zeros}}"
    spec = f"tensorpeft: 1\ntarget: {{matrices: [{matrix}]}}\n{rank}update: {update}\nfactors: {factors}\n"
    planned = plan(lower(load_spec(spec), shape_of(model)), Regime(100))
    assert planned.network.groups[0].kind != "linear"
    assert sum(step.flops * step.runs for step in steps(planned)) == planned.flops
