"""The minimum cut against the matrix rank of random updates."""

from __future__ import annotations

import numpy as np
import pytest

from tensorpeft.model.cards import model_shape
from tensorpeft.network.network import Group, Network, Term
from tensorpeft.network.rank import lora_rank, minimum_cut, rank_bound
from tensorpeft.pipeline import front

LLAMA = model_shape(
    {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "vocab_size": 100,
    }
)

LOHA = "update: B1[layer, d_out, r] * A1[r, d_in] * B2[d_out, s] * A2[s, d_in]\nrank: {r: 2, s: 3}\nfactors: {B1: {init: zeros}}"
BLOCKS = "update: B[d_out, r] * A[r, d_in] + D[d_out, s] * C[s, d_in]\nfactors: {B: {init: zeros}, D: {init: zeros}}"
# spec -> the rank of dW at a query, 32 x 32 with four heads
RANKS = {
    "structure: matrix\nrank: 5": 5,
    "structure: matrix\nrank: 40": 32,
    "structure: cp\nmodes: [matrix, layer, head, head_dim, width]\nrank: 6": 6,
    "structure: tucker\nmodes: [layer, d_out, d_in]\nrank: {r_layer: 2, r_d_out: 3, r_d_in: 5}": 3,
    "structure: tt\nmodes: [layer, d_out, d_in]\nrank: {r1: 2, r2: 4}": 4,
    "structure: tt\nmodes: [d_out, layer, matrix, d_in]\nrank: {r1: 7, r2: 2, r3: 3}": 2,
    "structure: tt\nmodes: [d_out = o1(4) * o2, d_in = i1(4) * i2]\nrank: {r1: 2, r2: 3, r3: 2}": 3,
    LOHA: 6,
    "update: W1[o1, i1] * W2[o2, i2]\nmodes: [d_out = o1(4) * o2, d_in = i1(2) * i2]\nfactors: {W1: {init: zeros}}": 16,
    BLOCKS + "\nrank: {r: 2, s: 3}": 5,
    "update: b[d_out] * B[d_out, r] * d[layer, r] * A[r, d_in]\nrank: 7\nfactors: {b: {init: zeros}}": 7,
    "update: B[p, q, o, r] * A[p, q, r, i]\nmodes: [d_out = p(2) * o, d_in = q(4) * i]\nrank: 2\nfactors: {B: {init: zeros}}": 16,
    "update: D[layer, d_out, d_in]\nfactors: {D: {init: zeros}}": 32,
    "structure: matrix\nrank: 8\nmask: {'B[r]': keep(3)}": 3,
    "update: D[layer, d_out, d_in]\nfactors: {D: {init: zeros}}\nmask: {'D[d_out, d_in]': keep(5)}": 5,
    "update: D[layer, d_out, d_in]\nfactors: {D: {init: zeros}}\nmask: {'D[d_out, d_in]': 'where(equal(d_out, d_in))'}": 32,
    "update: W[d_out, d_in] * u[layer, d_out]\nfactors: {u: {init: zeros}}": 32,
    "update: W[d_out, d_in] * B[d_out, r] * A[layer, r, d_in]\nrank: 2\nfactors: {B: {init: zeros}}": 32,
    "update: B[d_out, r] * A[layer, r, m] * W[m, d_in]\nrank: {r: 3, m: d_out}\nfactors: {B: {init: zeros}}": 3,
    "update: W[d_out, d_in] * u[d_out] + B[d_out, r] * A[r, d_in]\nrank: 3\nfactors: {u: {init: zeros}, B: {init: zeros}}": 32,
    "update: u[d_out] * g[layer] * u[m] * W[m, d_in]\nrank: {m: d_out}\nfactors: {g: {init: zeros}}": 1,
    "structure: matrix\nrank: 8\nmask: {'B[d_out]': keep(4)}": 4,
}


def network_of(text: str) -> Network:
    return front(f"tensorpeft: 1\ntarget: {{matrices: [query]}}\n{text}", LLAMA).network


def random_update(group: Group) -> np.ndarray:
    """dW at one site of a group, every factor random."""
    site, generator = group.sites[0], np.random.default_rng(0)
    dense, tensors = np.zeros((site.d_out, site.d_in)), {}
    for term in group.terms:
        rows = np.arange(site.d_out) if term.rows is None else term.rows
        columns = np.arange(site.d_in) if term.columns is None else term.columns
        dense[np.ix_(rows, columns)] += product(term, tensors, generator)
    return dense


def product(term: Term, tensors: dict[str, np.ndarray], generator: np.random.Generator) -> np.ndarray:
    numbers = {mode: number for number, mode in enumerate(term.sizes)}
    operands: list[object] = []
    for operand in term.operands:
        if operand.factor not in tensors:
            tensors[operand.factor] = generator.standard_normal(operand.sizes)
            if operand.block.entries is not None:
                tensors[operand.factor] *= np.isin(
                    np.arange(tensors[operand.factor].size), operand.block.entries[operand.keys[0]].positions
                ).reshape(operand.sizes)
        operands += [tensors[operand.factor], [numbers[mode] for mode in operand.modes]]
    dense = np.einsum(*operands, [numbers[mode] for mode in (*term.d_out, *term.d_in)], optimize=True)
    return dense.reshape(term.size(term.d_out), term.size(term.d_in))


@pytest.mark.parametrize("text", RANKS)
def test_the_bound_is_the_rank_of_a_random_update(text: str) -> None:
    network = network_of(text)
    for group in network.groups:
        assert np.linalg.matrix_rank(random_update(group)) == rank_bound(group) == RANKS[text]
    assert lora_rank(network) == RANKS[text]


def test_the_cut_of_loha_is_both_bonds() -> None:
    assert minimum_cut(network_of(LOHA).groups[0].terms[0]) == ("r", "s")


def test_a_copied_bond_is_cut_once() -> None:
    text = "structure: cp\nmodes: [matrix, layer, head, head_dim, width]\nrank: 6"
    assert minimum_cut(network_of(text).groups[0].terms[0]) == ("r",)


def test_the_largest_of_several_shapes() -> None:
    spec = "tensorpeft: 1\ntarget: {matrices: [key, gate]}\nstructure: matrix\nrank: min(d_out, d_in)"
    network = front(spec, LLAMA).network
    assert sorted(rank_bound(group) for group in network.groups) == [16, 32]
    assert lora_rank(network) == 32
