"""Plans against opt_einsum site by site, against dW itself, and against closed formulas."""

from __future__ import annotations

from functools import cache

import opt_einsum
import pytest

import tensorpeft as tp
from tensorpeft.model.cards import model_shape
from tensorpeft.model.shape import ModelShape
from tensorpeft.network.lower import lower
from tensorpeft.network.network import Network, Term
from tensorpeft.pipeline import front
from tensorpeft.planning.plan import Plan, plan
from tensorpeft.planning.regime import Regime
from tensorpeft.planning.weight_sites import dense_chain
from tensorpeft.scanning.scan import scan
from tests.structures import CASES, STRUCTURES, model

TOKENS = (1, 16, 256, 4096)
LLAMA = model_shape("llama-2-7b")
WIDTH, LAYERS = 4096, 32


@cache
def shape_of(architecture: str) -> ModelShape:
    return scan(model(architecture))


def network_of(name: str, architecture: str) -> Network:
    return lower(tp.load_spec(STRUCTURES[name]), shape_of(architecture))


def flops(term: Term, activation: tuple[str, ...], output: tuple[str, ...], tokens: int, tasks: int) -> int:
    """What opt_einsum's optimal path costs for one product at one site."""
    inputs = [*([activation] if activation else []), *(operand.modes for operand in term.operands)]
    sizes = {**term.sizes, "token": tokens, "task": tasks}
    letters = {mode: opt_einsum.get_symbol(i) for i, mode in enumerate(sizes)}
    equation = ",".join("".join(letters[m] for m in modes) for modes in inputs)
    equation += "->" + "".join(letters[m] for m in output)
    return best(equation, tuple(tuple(sizes[m] for m in modes) for modes in inputs))


@cache
def best(equation: str, shapes: tuple[tuple[int, ...], ...]) -> int:
    optimizer = "optimal" if len(shapes) < 9 else "dp"
    return int(opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=optimizer)[1].opt_cost)


def by_chain(network: Network, tokens: int) -> int:
    """Every site by itself, in the best order; the tokens are of all tasks alike."""
    total = 0
    for group in network.groups:
        for term in group.terms:
            task = ("task",) * ("task" in term.sizes)
            tasks = term.sizes.get("task", 1)
            cost = flops(term, (*task, "token", *term.d_in), (*task, "token", *term.d_out), -(-tokens // tasks), tasks)
            total += cost * len(group.sites)
    return total


def by_matrix(network: Network, tokens: int) -> int:
    """Every site by itself, dW made first."""
    total = 0
    for group in network.groups:
        for term in group.terms:
            task = ("task",) * ("task" in term.sizes)
            dense = flops(term, (), (*task, *term.d_in, *term.d_out), 1, network.spec.tasks or 1)
            applied = 2 * tokens * term.size(term.d_in) * term.size(term.d_out)
            total += (dense * (len(term.operands) > 1) + applied) * len(group.sites)
    return total


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_never_dearer_than_site_by_site(name: str, architecture: str) -> None:
    network = network_of(name, architecture)
    for tokens in TOKENS:
        planned = plan(network, Regime(tokens, gradients=False)).flops
        assert planned <= by_matrix(network, tokens)
        assert planned <= by_chain(network, tokens)


# FLOPs of one forward on Llama-2 7B, query and value (32 layers, 4096 x 4096): per token at the sites, and beforehand
FORMULAS = {
    "lora": (64 * (2 * 8 * 4096 + 2 * 8 * 4096), 0),
    "vera": (
        32 * 2 * 256 * 4096 + 64 * (256 + 2 * 256 * 4096 + 4096),
        0,
    ),  # query and value read one input: x A once for both
    "shared_a": (64 * (2 * 8 * 4096 + 2 * 8 * 4096), 0),
    # x meets the width factor, once for query, key and value, and then the product of the other four, made for 4 matrices of
    # 32 layers at once
    "lorta": ((32 * 2 + 128) * 2 * 8 * 4096, 8 * (4 * 32 + 4 * 32 * 32 + 4 * 32 * 32 * 128)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_shipped_specs_cost_what_their_formulas_cost(name: str) -> None:
    planned = front(name, LLAMA)
    per_token, beforehand = FORMULAS[name]
    assert planned.flops_per_token == per_token
    assert sum(group.prologue_flops for group in planned.groups) <= beforehand
    assert planned.flops == per_token * planned.regime.tokens + sum(group.prologue_flops for group in planned.groups)


def orders(planned: Plan) -> list[list[list[str]]]:
    """For each product of the first group, the factors of each of its links."""
    group = planned.groups[0]
    return [
        [[term.operands[i].factor for i in link.operands] for link in chain.links]
        for chain, term in zip(group.chains, group.group.terms, strict=True)
    ]


def test_a_chain_of_raw_factors_where_nothing_is_gained_beforehand() -> None:
    assert orders(front("lora", LLAMA)) == [[["A"], ["B"]]]
    assert orders(front("vera", LLAMA)) == [[["A"], ["d"], ["B"], ["b"]]]


def test_lorta_is_a_pair_with_one_half_made_beforehand() -> None:
    first, second = orders(front("lorta", LLAMA))[0]
    assert first == ["A_width"]
    assert sorted(second) == ["A_head", "A_head_dim", "A_layer", "A_matrix"]


@pytest.mark.parametrize(("tokens", "dense"), [(8, False), (16, False), (1 << 16, True)])
def test_at_high_rank_dense_pays_beyond_a_number_of_tokens(tokens: int, dense: bool) -> None:
    """At rank r, dW costs 2 r d d once and 2 d d per token; the pair costs 4 r d per token."""
    high = tp.load_spec("lora", rank=WIDTH)
    planned = front(high, LLAMA, Regime(tokens, gradients=False))
    assert (orders(planned) == [[["B", "A"]]]) == dense
    pair, matrix = 4 * WIDTH * WIDTH * tokens, 2 * WIDTH**3 + 2 * WIDTH * WIDTH * tokens
    assert planned.flops == min(pair, matrix) * 2 * LAYERS


def test_what_layers_share_is_made_once() -> None:
    spec = tp.load_spec(
        "tensorpeft: 1\ntarget: {matrices: [query]}\nrank: {a: 8, b: 8}\n"
        "update: V[d_out, b] * C[a, b] * P[layer, a] * U[d_in, a]\nfactors: {V: {init: zeros}}"
    )
    planned = front(spec, LLAMA, Regime(4096, gradients=False))
    shared = [link for chain in planned.groups[0].chains for link in chain.links if not link.site_modes]
    assert all(link.prologue_flops <= 2 * 8 * 8 * WIDTH for link in shared)


def test_dw_itself_is_one_link_of_every_product() -> None:
    network = network_of("lorta and lora", "llama")
    for group in network.groups:
        chains = [dense_chain(group, term) for term in group.terms]
        assert [len(chain.links) for chain in chains] == [1, 1]
        for chain, term in zip(chains, group.terms, strict=True):
            assert chain.links[0].modes == (*term.d_in, *term.d_out)


def test_a_plan_prints_its_links() -> None:
    text = str(front("lora", LLAMA))
    assert "64 sites like query of layer 0" in text
    assert "64 sites like query of layer 0 (model.layers.0.self_attn.q_proj), 32 times 2 with one input" in text
    assert "token d_in -> token site r  by A (d_in=4096, r=8)" in text


def test_a_plan_prints_the_steps_of_a_link() -> None:
    spec = tp.load_spec(
        "tensorpeft: 1\ntarget: {matrices: [query]}\nrank: {a: 8, b: 8}\n"
        "update: B[layer, d_out, b] * C[layer, a, b] * A[layer, a, d_in]\nfactors: {B: {init: zeros}}"
    )
    text = str(front(spec, LLAMA, Regime(4096, gradients=False)))
    assert f"      C[layer, a, b] * A[layer, a, d_in] -> C.A[layer, d_in, b]: {2 * 32 * 8 * 8 * 4096:,}" in text
