"""The tensors across layers as formulas, written without the library, index order included.

Each function takes the stored factors and returns dW of one matrix in one layer, (d_out, d_in), scale included. Sources:
LoRTA (ihounie/lorta and its peft fork), FacT (JieShibo/PETL-ViT), LoTR (daskol/lotr), LoReTTA (yifanycc/loretta).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

Factors = dict[str, Tensor]


@dataclass(frozen=True)
class Matrix:
    """One adapted matrix; ``others`` are all of them in the order of the roles, this one included."""

    name: str
    d_out: int
    d_in: int
    heads: int  # of this matrix
    width: int  # of the model
    others: tuple[Matrix, ...] = ()

    def row(self, size: Callable[[Matrix], object]) -> int:
        """Its row among those that have its sizes: the others' rows are in another tensor."""
        return [other.name for other in self.others if size(other) == size(self)].index(self.name)


def pick(factors: Factors, name: str, **sizes: int) -> Tensor:
    """The tensor of a factor; of one that is stored by size, that of these sizes."""
    suffixes = [f"_{mode}{size}" for mode, size in sizes.items()]
    names = ["".join((name, *some)) for n in range(len(suffixes) + 1) for some in combinations(suffixes, n)]
    return next(factors[key] for key in names if key in factors)


def lorta(factors: Factors, matrix: Matrix, layer: int, head_side: str, alpha: float) -> Tensor:
    """dW[m, l, a, (h, k)] = sum_r M[m, r] L[l, r] A[a, r] H[h, r] K[k, r], or its transpose; of the pair, h is the slow one."""
    side, other = (matrix.d_out, matrix.d_in) if head_side == "d_out" else (matrix.d_in, matrix.d_out)
    m = factors["A_matrix"][matrix.row(lambda other: None)]
    h = pick(factors, "A_head", head=matrix.heads)
    k = pick(factors, "A_head_dim", head_dim=side // matrix.heads)
    a = pick(factors, "A_width", width=other)
    found = torch.einsum("r,r,ar,hr,kr->ahk", m, factors["A_layer"][layer], a, h, k).reshape(other, side)
    return (found.T if head_side == "d_out" else found) * (alpha / m.shape[-1])


def lorta_natural(factors: Factors, matrix: Matrix, layer: int) -> Tensor:
    """The heads on the output of query, key and value, on the input of out."""
    return lorta(factors, matrix, layer, "d_in" if matrix.name == "out" else "d_out", alpha=8)


def lorta_peft(factors: Factors, matrix: Matrix, layer: int) -> Tensor:
    """``x @ dW.T`` with dW[a, (h, k)]: a is the output, the heads are on the input of all four."""
    return lorta(factors, matrix, layer, "d_in", alpha=8)


def lorta_litgpt(factors: Factors, matrix: Matrix, layer: int) -> Tensor:
    """``x @ dW`` with dW[a, (h, k)]: a is the input, the heads are on the output of all four."""
    names = {"M": "A_matrix", "L": "A_layer", "H": "A_head", "K": "A_head_dim", "A": "A_width"}
    renamed = {}
    for key, tensor in factors.items():
        first, _, rest = key.partition("_")
        renamed["_".join(filter(None, (names[first], rest.replace("d_in", "width"))))] = tensor
    return lorta(renamed, matrix, layer, "d_out", alpha=16)


def chunks(matrix: Matrix) -> tuple[int, int]:
    return matrix.d_out // matrix.width or 1, matrix.d_in // matrix.width or 1


def by_chunks(cores: Tensor, u: Tensor, v: Tensor) -> Tensor:  # shape: (c, d, a, b), (i, a), (o, b) -> (c o, d i)
    """dW[(c, o), (d, i)] = sum_ab U[i, a] S[c, d, a, b] V[o, b]: chunks of an output, or of an input, the slow index."""
    dense = torch.einsum("cdab,ia,ob->codi", cores, u, v)
    return dense.reshape(cores.shape[0] * v.shape[0], cores.shape[1] * u.shape[0])


def fact_tt(factors: Factors, matrix: Matrix, layer: int) -> Tensor:
    out_chunks, in_chunks = chunks(matrix)
    cores = pick(factors, "S", out_chunk=out_chunks, in_chunk=in_chunks)[matrix.row(chunks), layer]
    return by_chunks(cores, factors["U"], factors["V"])


def fact_tk(factors: Factors, matrix: Matrix, layer: int) -> Tensor:
    """S[n, a, b] = sum_p C[a, b, p] P[p, n] for slot n of the model."""
    out_chunks, in_chunks = chunks(matrix)
    slots = pick(factors, "P", out_chunk=out_chunks, in_chunk=in_chunks)[:, matrix.row(chunks), layer]
    cores = torch.einsum("abp,pcd->cdab", factors["C"], slots)
    return by_chunks(cores, factors["U"], factors["V"])


def lotr(factors: Factors, matrix: Matrix, layer: int) -> Tensor:
    """dW[o, i] = sum_ab L[o, a] G[n, a, b] R[i, b] / rank, both sides shared by the matrices of equal size."""
    left, right = pick(factors, "L", d_out=matrix.d_out), pick(factors, "R", d_in=matrix.d_in)
    core = factors["G"][matrix.row(lambda other: None), layer]
    return torch.einsum("oa,ab,ib->oi", left, core, right) / core.shape[0]


def loretta(factors: Factors, matrix: Matrix, layer: int) -> Tensor:
    """dW = B A alpha / r, A and B each a tensor train read as a matrix, (features, r); only the last parts are ragged here."""
    ragged = {"o3": matrix.d_out // 8, "i3": matrix.d_in // 8}

    def core(name: str) -> Tensor:
        rows = {"B3": "d_out", "A3": "d_in"}.get(name)
        return pick(factors, name, **ragged)[matrix.row(lambda other: rows and getattr(other, rows)), layer]

    a = torch.einsum("ia,ajb,bkc,cr->ijkr", *map(core, ("A1", "A2", "A3", "A4"))).reshape(matrix.d_in, -1)
    b = torch.einsum("ia,ajb,bkc,cr->ijkr", *map(core, ("B1", "B2", "B3", "B4"))).reshape(matrix.d_out, -1)
    return b @ a.T * (16 / a.shape[1])


def nola(factors: Factors, matrix: Matrix, layer: int) -> Tensor:
    """dW = B A with B = sum_j b_j Bs_j and A = A_0 + sum_j a_j As_j, the bases the same for all matrices."""
    row = matrix.row(lambda other: None)
    b = sum(number * basis for number, basis in zip(factors["b"][row, layer], factors["Bs"], strict=True))
    a = sum(number * basis for number, basis in zip(factors["a"][row, layer], factors["As"], strict=True))
    return b @ (factors["A"][row, layer] + a)


FORMULAS: dict[str, Callable[[Factors, Matrix, int], Tensor]] = {
    "lorta": lorta_natural,
    "lorta_peft": lorta_peft,
    "lorta_litgpt": lorta_litgpt,
    "fact_tt": fact_tt,
    "fact_tk": fact_tk,
    "lotr": lotr,
    "loretta_rep": loretta,
    "nola": nola,
}
