"""The sizes of modes at a site, and every sentence that says why there is none."""

from __future__ import annotations

from math import prod

import pytest

from tensorpeft.language.errors import SpecError
from tensorpeft.language.loader import load_spec
from tensorpeft.model.cards import model_shape
from tensorpeft.network.mode_sizes import ModeLayout, balanced, layout
from tensorpeft.network.site_classes import site_classes
from tensorpeft.pipeline import front

LLAMA = model_shape(
    {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 100,
    }
)


def layout_of(text: str, matrix: str = "query") -> ModeLayout:
    spec = load_spec(f"tensorpeft: 1\ntarget: {{matrices: [{matrix}]}}\n{text}")
    site = next(site for site in LLAMA.sites if site.matrix == matrix)
    return layout(spec, LLAMA, site_classes(spec, [site])[0][1])


@pytest.mark.parametrize(
    ("number", "parts", "expected"),
    [
        (4096, 3, (16, 16, 16)),
        (4096, 2, (64, 64)),
        (768, 2, (24, 32)),
        (11008, 2, (86, 128)),
        (7, 2, (1, 7)),
        (1, 3, (1, 1, 1)),
        (12, 1, (12,)),
        (30, 3, (2, 3, 5)),
    ],
)
def test_balanced_splits(number: int, parts: int, expected: tuple[int, ...]) -> None:
    assert balanced(number, parts) == expected


def test_balanced_splits_multiply_and_two_parts_are_the_nearest() -> None:
    for number in range(1, 400):
        assert prod(balanced(number, 3)) == number
        low, high = balanced(number, 2)
        assert low * high == number
        assert not any(number % d == 0 for d in range(low + 1, int(number**0.5) + 1))


def test_parts_written_and_found() -> None:
    update = "update: A[o1, o2, r] * B[i1, i2, i3, r]\nfactors: {A: {init: zeros}}\nrank: {r: 4}\n"
    sizes = layout_of(update + "modes: ['d_out = o1 * o2', 'd_in = i1(r) * i2 * i3(width / 32)']", "gate").sizes
    assert [sizes[part] for part in ("o1", "o2", "i1", "i2", "i3")] == [8, 12, 4, 8, 2]


def test_ranks_speak_of_each_other_and_of_sizes() -> None:
    text = "rank: {a: 'b + 1', b: 'd_out / 16', c: 'min(layers, heads)'}\n"
    text += "start: nonzero\nupdate: A[d_out, a, b, c] * B[d_in, a, b, c]"
    sizes = layout_of(text, "key").sizes
    assert (sizes["a"], sizes["b"], sizes["c"]) == (3, 2, 2)


def test_the_scale_is_computed_at_the_site() -> None:
    text = "structure: matrix\nrank: d_out / 8\nalpha: 12\nscale: alpha / sqrt(r)"
    assert layout_of(text, "query").scale == 12 / 8**0.5
    assert layout_of(text, "key").scale == 12 / 4**0.5


HEADS = "structure: cp\nmodes: [matrix, layer, head, head_dim, width]\nrank: 2\n"


@pytest.mark.parametrize(
    ("extra", "matrix", "expected", "split"),
    [
        ("", "query", (8, 8, 64), "d_out"),
        ("", "key", (4, 8, 64), "d_out"),
        ("", "out", (8, 8, 64), "d_in"),
        ("heads: {side: d_in}", "key", (4, 16, 32), "d_in"),
        ("heads: {side: {out: d_out}}", "out", (8, 8, 64), "d_out"),
        ("heads: {count: {down: 3}}", "down", (3, 64 // 3, 96), None),
        ("heads: {count: 2}", "gate", (2, 48, 64), "d_out"),
    ],
)
def test_heads(extra: str, matrix: str, expected: tuple[int, int, int], split: str | None) -> None:
    if split is None:
        with pytest.raises(
            SpecError, match=r"3 heads do not divide d_out = 64 of down of layer 0 \(model\.layers\.0\.mlp"
        ):
            layout_of(HEADS + extra, matrix)
        return
    found = layout_of(HEADS + extra, matrix)
    assert tuple(found.sizes[mode] for mode in ("head", "head_dim", "width")) == expected
    other = "d_in" if split == "d_out" else "d_out"
    carried = {"head", "head_dim", "width"}
    atoms = found.atoms(carried)
    assert (atoms[split], atoms[other]) == (("head", "head_dim"), ("width",))


def test_a_mode_is_split_only_where_another_lies_partly_within_it() -> None:
    parts = {"b": ("c", "e"), "s": ("c", "r"), "t": ("r", "q")}
    found = ModeLayout(LLAMA.sites[0], {}, parts, {"d_out": [("a", "b"), ("x", "y")]}, 1.0, {})
    assert found.atoms(["d_out", "r"])["d_out"] == ("d_out",)
    assert found.atoms(["a", "b"])["d_out"] == ("a", "b")
    assert found.atoms(["a", "e"])["d_out"] == ("a", "c", "e")
    apart = found.atoms(["a", "s", "e"])
    assert (apart["d_out"], apart["s"]) == (("a", "c", "e"), ("c", "r"))
    chain = found.atoms(["s", "t"])
    assert (chain["s"], chain["t"], chain["d_out"]) == (("c", "r"), ("r", "q"), ("a", "c", "e"))
    assert found.atoms(["t", "q"])["t"] == ("r", "q")
    assert found.atoms(["x", "y"])["d_out"] == ("x", "y")
    with pytest.raises(SpecError, match=r"splits d_out of .* in several ways, `a \* b`, `x \* y`; expected one"):
        found.atoms(["x", "s"])


PLACE = r"query of layer 0 (model.layers.0.self_attn.q_proj)"
UPDATE = "update: A[o1, o2, r] * B[d_in, r]\nfactors: {A: {init: zeros}}\nrank: 2\nmodes: "
ERRORS = {
    "structure: matrix\nrank: d_out / 3": (
        f"rank `r` is 21.3333 at {PLACE}, expected a whole number; use ceil() or floor()"
    ),
    "structure: matrix\nrank: d_out - 64": f"rank `r` is 0 at {PLACE}, expected a number from 1 to 2147483647",
    UPDATE + "['d_out = o1(3) * o2']": f"the parts of `d_out = o1(3) * o2` do not multiply to d_out = 64 of {PLACE}",
    UPDATE
    + "['d_out = o1(8) * o2(4)']": f"the parts of `d_out = o1(8) * o2(4)` do not multiply to d_out = 64 of {PLACE}",
    "structure: matrix\nrank: 2\nragged: error\ntarget: {matrices: [query, key]}": (
        "mode `d_out` of factor `B` is ragged, its sizes are 32 and 64, and `ragged: error` forbids it"
    ),
    "update: B[slot, d_out, r] * A[r, d_in]\nmodes: [slot = layer * expert]\nrank: 2\nfactors: {B: {init: zeros}}": (
        f"`B[slot, d_out, r]` carries the mode `expert`, and {PLACE} belongs to none; "
        "expected a target of experts alone, or an entry of `update` for the other matrices"
    ),
    "update: A[d_out, o1, r] * B[d_in, r] * C[o2]\nmodes: ['d_out = o1 * o2']\nrank: 2\nfactors: {A: {init: zeros}}": (
        "`A[d_out, o1, r]` carries `o1` twice, once within another mode"
    ),
    "update: H[head, r] * K[head_dim, r] * X[width, r] * A[o1, o2, r]\nmodes: [d_out = o1 * o2]\nrank: 2\n"
    "factors: {A: {init: zeros}}": (
        f"this product splits d_out of {PLACE} in several ways, `o1 * o2`, `head * head_dim`; expected one"
    ),
    "target: {matrices: [gate]}\n" + HEADS: (
        "matrix `gate` (model.layers.0.mlp.gate_proj) has no heads, which the modes of this spec need; "
        "leave it out of `target`, or give `heads: {count: ...}`"
    ),
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors_are_located_sentences(text: str) -> None:
    target = "" if "target:" in text else "target: {matrices: [query]}\n"
    with pytest.raises(SpecError) as caught:
        front(f"tensorpeft: 1\n{target}{text}", LLAMA)
    (problem,) = caught.value.problems
    assert problem.message == ERRORS[text]
    assert problem.span is not None
