"""The few operations that emitted code calls beside torch's own."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from string import ascii_letters

import torch
from torch import Tensor


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous and of a dtype, in one kernel."""
    if tensor.dtype == dtype:
        return tensor.contiguous()
    return tensor.to(dtype, memory_format=torch.contiguous_format)


def scatter(values: Tensor, positions: Tensor, shape: tuple[int, ...]) -> Tensor:  # shapes: (n,), (n,)
    """A tensor of zeros but for some values, at positions of its flat form."""
    return values.new_zeros(prod(shape)).index_copy(0, positions, values).view(shape)


def spread(tensor: Tensor, positions: Tensor, size: int) -> Tensor:
    """The numbers at positions of a longer axis, with zeros elsewhere: (sites, n, cut), (n,) -> (sites, size, cut)."""
    return tensor.new_zeros(tensor.shape[0], size, tensor.shape[2]).index_copy(1, positions, tensor)


def with_entries(table: Tensor, rows: Tensor, part: Tensor) -> Tensor:  # shapes: (keys, size), (sites,), (sites, n)
    """A table in which the first numbers of some rows are others."""
    if part.shape[1] == table.shape[1]:
        return table.index_copy(0, rows, part)
    rest = table.index_select(0, rows).narrow(1, part.shape[1], table.shape[1] - part.shape[1])
    return table.index_copy(0, rows, torch.cat((part, rest), 1))


def times(weight: Tensor, side: Tensor) -> Tensor:  # shapes: (kept, summed), (summed, cut) -> (kept, cut)
    """W times a side of a cut, in the dtype of that, on its device: of one weight at a time there is a copy."""
    return torch.mm(weight if weight.dtype == side.dtype and weight.device == side.device else weight.to(side), side)


def rows_of(y: Tensor, offset: int, count: int, period: int) -> Tensor:  # shape: (..., n) -> (..., n / period, count)
    """The outputs of a fused module that belong to one matrix (``model.shape.Rows``), as a view."""
    return y.unflatten(-1, (-1, period)).narrow(-1, offset, count)


def add_rows_(y: Tensor, update: Tensor, offset: int, count: int, period: int) -> Tensor:
    """Add an update to those outputs, in place."""
    mine = rows_of(y, offset, count, period)
    mine.add_(update.reshape(mine.shape))
    return y


def with_rows(y: Tensor, update: Tensor, offset: int, count: int, period: int) -> Tensor:
    """Those outputs with an update added, the others as they are; in memory of its own."""
    blocks = y.unflatten(-1, (-1, period))
    mine = blocks.narrow(-1, offset, count)
    return torch.slice_scatter(blocks, mine + update.reshape(mine.shape), -1, offset, offset + count).flatten(-2)


def dropout(x: Tensor, p: float, training: bool) -> tuple[Tensor, Tensor | None]:
    """The tensor with each number dropped with probability p and the others scaled up; and which ones are left."""
    if not training or p == 0:
        return x, None
    return torch.ops.aten.native_dropout(x, p, True)


def undrop(gradient: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """The gradient of dropout, contiguous."""
    if mask is not None:
        gradient = torch.ops.aten.native_dropout_backward(gradient, mask, 1 / (1 - p))
    return gradient.contiguous()


def equation(inputs: Sequence[tuple[object, ...]], output: tuple[object, ...]) -> str:
    """An einsum equation over named modes; ``...`` stands for itself."""
    known: dict[object, str] = {...: "..."}

    def letters(modes: tuple[object, ...]) -> str:
        return "".join(known.setdefault(mode, ascii_letters[len(known) - 1]) for mode in modes)

    return f"{','.join(map(letters, inputs))}->{letters(output)}"
