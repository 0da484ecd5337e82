"""The five shipped methods as formulas, written without the library: the truth that the compiled code is held to.

Each function takes the stored factors and returns dW of one matrix, (d_out, d_in), or (tasks, d_out, d_in), before scaling.
``place`` says where: the row of the matrix and of the layer in the factors, and the sizes there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    matrix: str
    layer: int
    d_out: int
    d_in: int
    heads: int  # of this matrix
    matrices: tuple[str, ...]  # all adapted ones, in canonical order


def pick(factors: dict[str, Tensor], name: str, **sizes: int) -> Tensor:
    """The tensor of a factor; of a ragged one, that of these sizes."""
    if name in factors:
        return factors[name]
    for mode, size in sizes.items():
        if f"{name}_{mode}{size}" in factors:
            return factors[f"{name}_{mode}{size}"]
    raise KeyError((name, sizes, list(factors)))


def same_size(place: Place, d_out: dict[str, int]) -> int:
    """The row of a matrix among those that share its d_out."""
    return [m for m in place.matrices if d_out[m] == place.d_out].index(place.matrix)


def lora(factors: dict[str, Tensor], place: Place, d_out: dict[str, int]) -> Tensor:
    a = factors["A"][place.matrices.index(place.matrix), place.layer]
    b = pick(factors, "B", d_out=place.d_out)[same_size(place, d_out), place.layer]
    return torch.einsum("or,ri->oi", b, a)


def vera(factors: dict[str, Tensor], place: Place, d_out: dict[str, int]) -> Tensor:
    d = factors["d"][place.matrices.index(place.matrix), place.layer]
    b = pick(factors, "b", d_out=place.d_out)[same_size(place, d_out), place.layer]
    return torch.einsum("o,or,r,ri->oi", b, factors["B"][: place.d_out], d, factors["A"][:, : place.d_in])


def shared_a(factors: dict[str, Tensor], place: Place, d_out: dict[str, int]) -> Tensor:
    a = factors["A"][place.matrices.index(place.matrix), place.layer]
    b = pick(factors, "B", d_out=place.d_out)[:, same_size(place, d_out), place.layer]
    return torch.einsum("tor,ri->toi", b, a)


def lorta(factors: dict[str, Tensor], place: Place, d_out: dict[str, int]) -> Tensor:
    m = factors["A_matrix"][place.matrices.index(place.matrix)]
    layer = factors["A_layer"][place.layer]
    h = pick(factors, "A_head", head=place.heads)
    on_input = place.matrix == "out"
    side, other = (place.d_in, place.d_out) if on_input else (place.d_out, place.d_in)
    k = pick(factors, "A_head_dim", head_dim=side // place.heads)
    w = pick(factors, "A_width", width=other)
    split = torch.einsum("r,r,hr,kr,wr->hkw", m, layer, h, k, w).reshape(side, other)
    return split.t() if on_input else split


FORMULAS: dict[str, Callable[[dict[str, Tensor], Place, dict[str, int]], Tensor]] = {
    "lora": lora,
    "vera": vera,
    "shared_a": shared_a,
    "lorta": lorta,
}
