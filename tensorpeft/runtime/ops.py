"""The few operations that emitted code calls beside torch's own."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_matmul(
    y: Tensor,  # shape: (..., n)
    h: Tensor,  # shape: (..., k)
    right: Tensor,  # shape: (k, n)
    alpha: float,
) -> Tensor:  # shape: (..., n)
    """``y + alpha * h @ right`` in one kernel, in y's own memory unless y is a view or the call is being compiled."""
    if torch.compiler.is_compiling() or y._is_view() or not y.is_contiguous():
        return torch.addmm(y.reshape(-1, y.shape[-1]), h.reshape(-1, h.shape[-1]), right, alpha=alpha).view(y.shape)
    return _AddMatmul.apply(y, h, right, alpha)


class _AddMatmul(torch.autograd.Function):
    """autograd's own backward of an in-place ``addmm_`` on a flattened y costs four copies, and two products with alpha."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, right: Tensor, alpha: float) -> Tensor:
        ctx.save_for_backward(h if ctx.needs_input_grad[2] else None, right if ctx.needs_input_grad[1] else None)
        ctx.alpha = alpha
        ctx.mark_dirty(y)
        y.view(-1, y.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), right, alpha=alpha)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        h, right = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        to_h = None if right is None else _product(flat, right.t(), ctx.alpha).view(*gradient.shape[:-1], -1)
        to_right = None if h is None else _product(h.reshape(-1, h.shape[-1]).t(), flat, ctx.alpha)
        return gradient, to_h, to_right, None


def _product(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """``alpha * a @ b`` in one kernel."""
    return a @ b if alpha == 1 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=alpha)


def add(y: Tensor, update: Tensor, alpha: float) -> Tensor:  # shapes: (..., n)
    """``y + alpha * update``."""
    return torch.add(y, update.reshape(y.shape), alpha=alpha)


def add_rows(
    y: Tensor,  # shape: (..., rows of the fused module)
    update: Tensor,  # shape: (..., d_out)
    offset: int,
    count: int,
    period: int,
    alpha: float,
) -> Tensor:  # shape: that of y
    """Add an update to the outputs of a fused module that belong to one matrix (``network.shapes.Rows``)."""
    blocks = y.unflatten(-1, (-1, period)).narrow(-1, offset, count)
    blocks.add_(update.reshape(blocks.shape), alpha=alpha)
    return y


def add_at(y: Tensor, update: Tensor, index: Tensor, alpha: float) -> Tensor:
    """Add an update of shape (..., kept) to the outputs ``index`` (kept,) of y (..., n)."""
    return torch.index_add(y, -1, index, update.reshape(*y.shape[:-1], index.shape[0]), alpha=alpha)


def split(h: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """(..., product of sizes) -> (..., *sizes)."""
    return h.reshape(*h.shape[:-1], *sizes)


def merge(h: Tensor, n_modes: int) -> Tensor:
    """The last ``n_modes`` axes as one: (..., a, b) -> (..., a * b)."""
    return h.flatten(-n_modes) if n_modes else h.unsqueeze(-1)


def select(tensor: Tensor, axis: int, positions: tuple[int, ...]) -> Tensor:
    """Some positions of an axis, as a view where they follow each other."""
    if positions == tuple(range(positions[0], positions[0] + len(positions))):
        return tensor.narrow(axis, positions[0], len(positions))
    return tensor.index_select(axis, torch.tensor(positions, device=tensor.device))


def scatter(values: Tensor, positions: Tensor, shape: tuple[int, ...]) -> Tensor:  # shapes: (n,), (n,)
    """A tensor of zeros but for some values, at positions of its flat form."""
    return values.new_zeros(prod(shape)).index_copy(0, positions.to(values.device), values).view(shape)


def equation(inputs: Sequence[tuple[object, ...]], output: tuple[object, ...]) -> str:
    """An einsum equation over named modes; ``...`` stands for itself."""
    known: dict[object, str] = {...: "..."}

    def letters(modes: tuple[object, ...]) -> str:
        return "".join(
            known.setdefault(m, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"[len(known) - 1]) for m in modes
        )

    return f"{','.join(map(letters, inputs))}->{letters(output)}"
