"""The prologue at run time: work on factors alone, once per forward of the model, for all sites together.

Emitted code is called by ``forward``, past ``nn.Module.__call__``: it is no layer of the model, and hooks that tools set on
every module (``FlopCounterMode``'s, say) have nothing to find in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable


def run(code: fx.GraphModule, dtype: torch.dtype, factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The stacks of a prologue, shape (rows, ...) each, with gradients to the factors where autograd records."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return code.forward(dtype, *factors)
    with torch.autocast(factors[0].device.type, enabled=False):
        return _Prologue.apply(code, dtype, *factors)


class _Prologue(torch.autograd.Function):
    """Runs the prologue without recording it, and again, recorded, when gradients arrive.

    Nothing is saved between the two but the factors themselves, and the backward pass may be walked any number of times: by
    gradient accumulation over one forward of the factors, and by reentrant checkpointing, which calls backward once per segment.
    """

    @staticmethod
    def forward(ctx: Any, code: fx.GraphModule, dtype: torch.dtype, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.code, ctx.dtype, ctx.factors = code, dtype, factors
        ctx.versions = tuple(factor._version for factor in factors)
        ctx.set_materialize_grads(False)
        return code.forward(dtype, *factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if tuple(factor._version for factor in ctx.factors) != ctx.versions:
            raise RuntimeError(
                "a factor of the adapter was changed in place between the forward pass and its backward pass"
            )
        wanted = ctx.needs_input_grad[2:]
        leaves = [factor.detach().requires_grad_(want) for factor, want in zip(ctx.factors, wanted, strict=True)]
        with torch.enable_grad(), torch.autocast(leaves[0].device.type, enabled=False):
            stacks = ctx.code.forward(ctx.dtype, *leaves)
        reached = [(s, g) for s, g in zip(stacks, gradients, strict=True) if g is not None and s.requires_grad]
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        found = torch.autograd.grad([s for s, _ in reached], trained, [g for _, g in reached], allow_unused=True)
        each = iter(found)
        return (None, None, *(next(each) if want else None for want in wanted))
