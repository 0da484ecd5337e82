"""Numbers from a decomposition: what each part is, in every order of modes, and what cannot be decomposed."""

from __future__ import annotations

import numpy as np
import pytest

from tensorpeft.language.errors import SpecError
from tensorpeft.language.loader import load_spec
from tensorpeft.network.network import Block
from tensorpeft.network.spectral import Decomposition, signed, spectral_values
from tensorpeft.pipeline import front
from tests.network.test_site_classes import LLAMA

QUERY = next(site for site in LLAMA.sites if site.matrix == "query" and site.layer == 1)
VALUE = next(site for site in LLAMA.sites if site.matrix == "value" and site.layer == 1)
W = np.random.default_rng(3).standard_normal((32, 64))


def decomposed(weight: np.ndarray, kind: str = "svd") -> Decomposition:
    if kind == "svd":
        u, s, vt = np.linalg.svd(weight, full_matrices=False)
        return signed(u, s, vt.T)
    q, r = np.linalg.qr(weight)
    return signed(q, np.ones(q.shape[1]), r.T)


def block_of(
    init: str, modes: str = "matrix, layer, d_out, r", extra: str = "", target: str = "[query, value]"
) -> Block:
    """The block for `value` of a factor with some initialiser and modes, in a spec that needs no more of it."""
    text = f"tensorpeft: 1\ntarget: {{matrices: {target}}}\nrank: {{r: 5}}\nstart: nonzero\n{extra}\n"
    text += f"factors: {{A: {{init: '{init}'}}}}\nupdate: A[{modes}] * B[d_out] * C[d_in] * D[r]"
    blocks = front(text, LLAMA).network.blocks
    return next(b for b in blocks if b.factor == "A" and any(k[:1] == ("value",) for k in b.keys))


def values(block: Block, weight: np.ndarray = W) -> np.ndarray:
    init = block.init
    return spectral_values(block, ("value", 1), decomposed(weight, init.decomposition), VALUE)


def test_the_parts_of_a_singular_value_decomposition() -> None:
    u, s, v = (values(block_of(f"svd(W).{part}[:r]", modes)) for part, modes in (
        ("U", "matrix, layer, d_out, r"), ("S", "matrix, layer, r"), ("V", "matrix, layer, d_in, r"),
    ))  # fmt: skip
    gram = np.linalg.eigh(W @ W.T)
    np.testing.assert_allclose(s, np.sqrt(gram[0][::-1][:5]), rtol=1e-10)
    np.testing.assert_allclose(W @ v, u * s, atol=1e-12)
    np.testing.assert_allclose(u.T @ u, np.eye(5), atol=1e-12)
    assert all(column[np.abs(column).argmax()] > 0 for column in u.T)
    last = [values(block_of(f"svd(W).{p}[-r:]", f"matrix, layer, {m}, r")) for p, m in (("U", "d_out"), ("V", "d_in"))]
    smallest = values(block_of("svd(W).S[-r:]", "matrix, layer, r"))
    np.testing.assert_allclose(smallest, np.sqrt(gram[0][:5][::-1]), rtol=1e-9)
    np.testing.assert_allclose(W @ last[1], last[0] * smallest, atol=1e-12)


def test_powers_of_the_singular_values() -> None:
    u, s = values(block_of("svd(W).U[:r]")), values(block_of("svd(W).S[:r]", "matrix, layer, r"))
    np.testing.assert_allclose(values(block_of("svd(W).U[:r] * S ** 0.5")), u * np.sqrt(s), rtol=1e-13)
    np.testing.assert_allclose(values(block_of("svd(W).U[:r] * S")), u * s, rtol=1e-13)
    np.testing.assert_allclose(values(block_of("svd(W).U[:r] * S ** -1")), u / s, rtol=1e-13)
    np.testing.assert_allclose(values(block_of("svd(W).S[:r] * S", "matrix, layer, r")), s**2, rtol=1e-13)
    with pytest.raises(SpecError, match=r"has no finite value at value of layer 1 .*: a singular value is 0"):
        values(block_of("svd(W).U[:r] * S ** -1"), np.zeros((32, 64)))


def test_the_parts_of_a_qr_decomposition() -> None:
    q, r = values(block_of("qr(W).Q[:r]")), values(block_of("qr(W).R[:r]", "matrix, layer, r, d_in"))
    np.testing.assert_allclose(q.T @ q, np.eye(5), atol=1e-12)
    np.testing.assert_allclose(r, q.T @ W, atol=1e-12)
    assert np.abs(np.tril(r[:, :5], -1)).max() < 1e-12


def test_modes_stand_in_any_order_and_in_parts() -> None:
    u = values(block_of("svd(W).U[:r]"))
    assert np.array_equal(values(block_of("svd(W).U[:r]", "r, matrix, d_out, layer")), u.T)
    parts = values(block_of("svd(W).U[:r]", "o2, layer, r, o1, matrix", "modes: [d_out = o1(4) * o2]"))
    assert np.array_equal(parts, u.reshape(4, 8, 5).transpose(1, 2, 0))
    heads = values(block_of("svd(W).U[:r]", "matrix, head, r, layer, head_dim"))
    assert np.array_equal(heads, u.reshape(4, 8, 5).transpose(0, 2, 1))
    tasks = values(block_of("svd(W).U[:r]", "task, matrix, layer, d_out, r", "tasks: 3"))
    assert np.array_equal(tasks, np.broadcast_to(u, (3, 32, 5)))


def test_masks_leave_of_them_what_they_keep() -> None:
    u = values(block_of("svd(W).U[:r]"))
    rows = block_of("svd(W).U[:r]", extra="mask: {'A[d_out]': keep(7)}")
    assert np.array_equal(values(rows), u[rows.kept["value", 1][0]])
    entries = block_of("svd(W).U[:r]", extra="mask: {'A[d_out, r]': keep(30)}")
    assert np.array_equal(values(entries), u.ravel()[entries.entries["value", 1].positions])


def test_it_is_stored_where_it_is_frozen() -> None:
    text = "tensorpeft: 1\ntarget: {matrices: [query]}\nrank: {r: 5}\n"
    text += "factors: {A: {init: 'svd(W).V[:r]', frozen: true}, B: {init: zeros}}\n"
    network = front(text + "update: B[layer, d_out, r] * A[layer, d_in, r]", LLAMA).network
    assert [(b.factor, b.data_dependent, b.seeded) for b in network.blocks] == [("B", False, False), ("A", True, False)]


PISSA = """\
tensorpeft: 1
target: {matrices: [query, value]}
rank: {r: 4}
start: subtract
update: B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]
factors: {B: {init: "svd(W).U[:r] * S ** 0.5"}, A: {init: "svd(W).V[:r] * S ** 0.5"}}
"""


def test_a_budget_stops_at_what_a_decomposition_has() -> None:
    network = front(PISSA.replace("r: 4", "budget: 1M"), LLAMA).network
    assert {term.sizes["r"] for group in network.groups for term in group.terms} == {32}


PLACE = "query of layer 0 (model.layers.0.self_attn.q_proj)"
REFUSED = {
    "shared": (
        lambda: block_of("svd(W).U[:r]", "layer, d_out, r", "ragged: slice"),
        f"`svd(W).U[:r]` is another for each weight, and `A` is one tensor for {PLACE} and value of layer 0 "
        "(model.layers.0.self_attn.v_proj); expected it to carry the modes that tell these apart",
    ),
    "too many": (
        lambda: front(load_spec(PISSA, rank=40), LLAMA),
        "takes 40 vectors, and value of layer 0 (model.layers.0.self_attn.v_proj) has 32 in all",
    ),
    "a part of a side": (
        lambda: block_of("svd(W).U[:r]", "matrix, layer, o1, r", "modes: [d_out = o1(4) * o2]"),
        f"`svd(W).U[:r]` is of d_out and `r`, and `A` carries o1, r at {PLACE}",
    ),
    "the other side": (
        lambda: block_of("svd(W).U[:r]", "matrix, layer, head, head_dim, r", target="[out, value]"),
        "`svd(W).U[:r]` is of d_out and `r`, and `A` carries head, head_dim, r at out of layer 0 "
        "(model.layers.0.self_attn.o_proj)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_decomposed(name: str) -> None:
    with pytest.raises(SpecError) as caught:
        REFUSED[name][0]()
    (problem,) = caught.value.problems
    assert REFUSED[name][1] in problem.message
    assert problem.span is not None
