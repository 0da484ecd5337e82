"""A model of several stacks: a network for each."""

from __future__ import annotations

import numpy as np
import pytest

from tensorpeft.language.loader import load_spec
from tensorpeft.model.cards import model_shape
from tensorpeft.model.shape import Linear, ModelShape
from tensorpeft.model.sites import resolve
from tensorpeft.network.budget import n_trained
from tensorpeft.network.initialisers import initial_values
from tensorpeft.network.lower import lower
from tensorpeft.network.network import Network

T5 = model_shape(
    {
        "model_type": "t5",
        "d_model": 16,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 2,
        "d_kv": 8,
        "d_ff": 24,
        "vocab_size": 50,
    }
)
SHARED = "update: B[r, d_out] * c[matrix, layer, r] * A[r, d_in]\nrank: {r: 2}\nfactors: {B: {init: zeros}}\n"


def network(*matrices: str, rest: str = SHARED, shape: ModelShape = T5) -> Network:
    text = f"tensorpeft: 1\ntarget: {{matrices: [{', '.join(matrices)}]}}\n{rest}"
    return lower(load_spec(text), shape)


def sizes(found: Network) -> dict[str, tuple[int, ...]]:
    return {block.name: block.shape for block in found.blocks}


def test_each_stack_has_factors_of_its_own():
    found = network("query")
    assert sizes(found) == {
        "B_encoder": (2, 16),
        "c_encoder": (1, 2, 2),
        "A_encoder": (2, 16),
        "B_decoder": (2, 16),
        "c_decoder": (2, 3, 2),
        "A_decoder": (2, 16),
    }
    for group in found.groups:
        (side,) = {site.matrix.split(".")[0] for site in group.sites}
        assert all(o.block.name.endswith(side) for term in group.terms for o in term.operands)


def test_arithmetic_speaks_of_the_stack_of_a_site():
    found = sizes(network("query", rest=SHARED.replace("rank: {r: 2}", "rank: {r: layers}")))
    assert (found["A_encoder"], found["A_decoder"]) == ((2, 16), (3, 16))


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_it_is_the_network_of_that_stack_alone(stack):
    both = {name: size for name, size in sizes(network("query")).items() if name.endswith(stack)}
    alone = sizes(network(f"'{stack}.*query'"))
    assert {name.removesuffix(f"_{stack}"): size for name, size in both.items()} == alone


def test_sizes_that_differ_come_behind_the_stack():
    assert set(sizes(network("decoder.query", "encoder.fc1"))) == {
        f"{f}_{s}" for f in "BcA" for s in ("encoder", "decoder")
    }
    assert "B_decoder_d_out24" in sizes(network("query", "decoder.fc1"))


def test_what_is_outside_the_layers_belongs_to_the_only_stack_or_to_none():
    assert set(sizes(network("decoder.query", "lm_head", rest=SHARED + "ragged: slice\n"))) == {"B", "c", "A"}
    assert set(sizes(network("query", "lm_head"))) == {f"{f}{s}" for f in "BcA" for s in ("", "_encoder", "_decoder")}


def test_stacks_start_from_numbers_of_their_own():
    blocks = {block.name: block for block in network("query").blocks}
    (_, encoder), (_, decoder) = (next(initial_values(blocks[name], 0)) for name in ("A_encoder", "A_decoder"))
    assert encoder.shape == decoder.shape
    assert not np.isclose(encoder, decoder).any()


def test_a_budget_is_for_all_stacks_together():
    rest = SHARED.replace("rank: {r: 2}", "rank: {budget: 1000}")
    found = network("query", rest=rest)
    trained = sum(block.count for block in found.blocks)
    per_rank = 4 * 16 + 2 + 6
    assert trained == 1000 // per_rank * per_rank
    assert n_trained(found.spec, T5) == trained


def test_towers_of_a_plain_model():
    linears = [Linear(f"towers.{t}.blocks.{n}.q", 4 + 4 * t, 4) for t in range(2) for n in range(2)]
    shape = ModelShape("Plain", resolve(linears, None), (), 0)
    assert set(sizes(network("q", shape=shape))) == {f"{f}_{t}" for f in "BcA" for t in range(2)}
