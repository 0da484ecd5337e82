"""A shorthand and the update it stands for, side by side."""

from __future__ import annotations

import pytest

from tensorpeft.language.loader import load_spec
from tensorpeft.language.spec import Spec

HEAD = "tensorpeft: 1\ntarget: {matrices: [query]}\n"

EXPANSIONS = {
    "matrix": (
        "structure: matrix\nrank: 4",
        "B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]",
        {"r": 4},
        {"B": "zeros", "A": "kaiming_uniform(a=sqrt(5))"},
    ),
    "matrix with tasks": (
        "structure: matrix\nrank: 4\ntasks: 3",
        "B[task, matrix, layer, d_out, r] * A[task, matrix, layer, r, d_in]",
        {"r": 4},
        {"B": "zeros"},
    ),
    "matrix shared": (
        "structure: matrix\nrank: 4\nshare: {A: [layer, matrix], B: [matrix]}",
        "B[layer, d_out, r] * A[r, d_in]",
        {"r": 4},
        {"B": "zeros"},
    ),
    "matrix by heads": (
        "structure: matrix\nrank: 4\nmodes: [layer, head, head_dim, width]",
        "B[layer, head, head_dim, r] * A[layer, r, width]",
        {"r": 4},
        {"B": "zeros"},
    ),
    "cp": (
        "structure: cp\nrank: 4\nmodes: [matrix, layer, head, head_dim, width]",
        "A_matrix[matrix, r] * A_layer[layer, r] * A_head[head, r] * A_head_dim[head_dim, r] * A_width[width, r]",
        {"r": 4},
        {"A_head_dim": "zeros", "A_width": "kaiming_uniform"},
    ),
    "cp split and fused": (
        "structure: cp\nrank: 4\nmodes: [slot = layer * matrix, d_out = o1(8) * o2, d_in]",
        "A_slot[slot, r] * A_o1[o1, r] * A_o2[o2, r] * A_d_in[d_in, r]",
        {"r": 4},
        {"A_o2": "zeros", "A_o1": "kaiming_uniform"},
    ),
    "tucker": (
        "structure: tucker\nrank: {r_layer: 2, r_d_out: 3, r_d_in: 4}\nmodes: [layer, d_out, d_in]",
        "G[r_layer, r_d_out, r_d_in] * A_layer[layer, r_layer] * A_d_out[d_out, r_d_out] * A_d_in[d_in, r_d_in]",
        {"r_layer": 2, "r_d_out": 3, "r_d_in": 4},
        {"A_d_out": "zeros", "G": "kaiming_uniform"},
    ),
    "tt": (
        "structure: tt\nrank: 4\nmodes: [d_out, layer, matrix, d_in]",
        "G_d_out[d_out, r1] * G_layer[r1, layer, r2] * G_matrix[r2, matrix, r3] * G_d_in[r3, d_in]",
        {"r1": 4, "r2": 4, "r3": 4},
        {"G_d_out": "zeros", "G_d_in": "kaiming_uniform"},
    ),
}


@pytest.mark.parametrize(("text", "update", "ranks", "inits"), EXPANSIONS.values(), ids=EXPANSIONS)
def test_expansion(text: str, update: str, ranks: dict[str, int], inits: dict[str, str]) -> None:
    spec = load_spec(f"{HEAD}{text}\n")
    assert str(spec.update) == update
    assert {bond: size.evaluate({}) for bond, size in spec.ranks} == ranks
    assert inits.items() <= {name: str(rule.init) for name, rule in spec.factors}.items()
    assert [str(rule.init) for _, rule in spec.factors].count("zeros") == 1


EQUIVALENT = {
    "lora": (
        "structure: matrix\nrank: 8\nalpha: 16",
        "update: B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]\nrank: {r: 8}\nfactors: {B: {init: zeros}}\n"
        "alpha: 16\nscale: alpha / r",
    ),
    "frozen and shared": (
        "structure: matrix\nrank: 8\ntasks: 2\nshare: {A: [task]}\nfrozen: [A]",
        "update: B[task, matrix, layer, d_out, r] * A[matrix, layer, r, d_in]\nrank: 8\ntasks: 2\n"
        "factors: {A: {frozen: true}, B: {init: zeros}}",
    ),
    "layout of the text": (
        "structure: matrix\nrank: 8\nmask: {'A[d_in]': keep(0.5)}",
        "mask:\n  A[ d_in ]: keep( .5 )\nrank:\n  r: 8\nstructure: 'matrix'",
    ),
    "default modes": (
        "structure: cp\nrank: 2",
        "structure: cp\nrank: {r: 2}\nmodes: [matrix, layer, d_out, d_in]",
    ),
    "all linear": (
        "structure: tt\nrank: {r1: 2, r2: 2, r3: 2}\nscale: 1.0",
        "structure: tt\nrank: 2",
    ),
}


@pytest.mark.parametrize(("one", "other"), EQUIVALENT.values(), ids=EQUIVALENT)
def test_equivalent_spellings(one: str, other: str) -> None:
    specs: list[Spec] = [load_spec(f"{HEAD}{text}\n") for text in (one, other)]
    assert specs[0] == specs[1]
