"""How the factors get their gradients: rows of the prologue's stacks collect them, and the prologue passes them on, once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tensorpeft.language.errors import AdapterError
from tensorpeft.runtime.torch_internals import (
    apply_of,
    at_end_of_backward,
    backward_pass,
    gradients_of,
    is_batched_gradient,
)


class BackwardPass:
    """The gradients of stacks in one backward pass."""

    def __init__(self, gradients: Gradients) -> None:
        self._shapes = gradients.shapes
        self._sums: dict[int, Tensor] = {}
        self.rows: dict[int, tuple[Tensor, ...]] = {}  # of each sum
        self._parts: dict[tuple[int, int], Tensor] = {}

    def row(self, stack: int, row: int) -> Tensor:
        """The gradient of a row so far, to add to; with the first one of a stack there are ``rows``."""
        if stack not in self.rows:
            shape, dtype, device = self._shapes[stack]
            self._sums[stack] = torch.zeros(shape, dtype=dtype, device=device)
            self.rows[stack] = self._sums[stack].unbind()
        return self.rows[stack][row]

    def put(self, stack: int, row: int, part: Tensor) -> None:
        """Add to the gradient of a row."""
        place = stack, row
        self._parts[place] = self._parts[place].add_(part) if place in self._parts else part

    def total(self) -> dict[int, Tensor]:
        """The gradients of the stacks that have one."""
        sums = self._sums
        for stack in {stack for stack, _ in self._parts}:
            shape, dtype, device = self._shapes[stack]
            mine = {row: part for (of, row), part in self._parts.items() if of == stack}
            none = torch.zeros(shape[1:], dtype=dtype, device=device) if len(mine) < shape[0] else None
            found = torch.stack([mine.get(row, none) for row in range(shape[0])])  # type: ignore[misc]
            sums[stack] = sums[stack].add_(found) if stack in sums else found
        return sums


class Gradients:
    """Where backward passes leave the gradients of stacks, added up in place.

    A pass is one run of autograd's engine, which has a number: neither a second backward through the same graph, nor one within
    another (reentrant checkpointing), nor one that never got to the factors leaves anything to the next.
    """

    def __init__(self, stacks: tuple[Tensor, ...], factors: tuple[Tensor, ...], *, distributed: bool) -> None:
        self._factors, self._versions = factors, [factor._version for factor in factors]
        self.shapes = [(stack.shape, stack.dtype, stack.device) for stack in stacks]
        self._passes: dict[int, BackwardPass] = {}
        self._distributed, self._taken = distributed, False

    def current(self) -> BackwardPass:
        """What the backward pass that is on has left so far."""
        number = backward_pass()
        try:
            return self._passes[number]
        except KeyError:
            self.check()
            found = self._passes[number] = BackwardPass(self)
            at_end_of_backward(lambda: self._forget(number))
            return found

    def _forget(self, number: int) -> None:
        self._passes.pop(number, None)

    def check(self) -> None:
        """Stacks may be views of factors, so these must be as they were."""
        if [factor._version for factor in self._factors] != self._versions:
            raise RuntimeError(
                "a factor of the adapter was changed in place between the forward pass and its backward pass"
            )

    def take(self) -> dict[int, Tensor]:
        """The gradients of the stacks that have one, in this pass.

        Raises:
            AdapterError: reentrant checkpointing asks again, for the next segment, under DistributedDataParallel, which sends a
                gradient to the other processes when it comes for the first time.
        """
        self.check()
        if self._taken and self._distributed:
            raise AdapterError(
                "DistributedDataParallel takes each factor's gradient once, but reentrant checkpointing gives it in parts, "
                "one for each segment; checkpoint with `use_reentrant=False`"
            )
        self._taken = True
        found = self._passes.pop(backward_pass(), None)
        return {} if found is None else found.total()


def refuse_unusual(gradient: Tensor) -> None:
    """To be called in a backward pass with one of its gradients: someone may want what its in-place steps cannot give.

    Raises:
        AdapterError: a backward pass of it (``once_differentiable`` refuses later, and not where a gradient is zero so far), or
            several passes at once.
    """
    if is_batched_gradient(gradient):
        raise AdapterError(
            "an adapter takes one gradient at a time, found `is_grads_batched=True`; `torch.func.jacrev` can"
        )
    if torch.is_grad_enabled():
        raise AdapterError(
            "an adapter's gradients cannot be differentiated again, found `create_graph=True`; `torch.func.grad` inside "
            "another can, as it follows every step"
        )


class _Token(torch.autograd.Function):
    """Stands for the factors in autograd's graph: when all that used them has left its gradients, they get theirs.

    Nothing is saved for that but the factors themselves: the prologue runs again, recorded.
    """

    @staticmethod
    def forward(ctx: Any, gradients: Gradients, again: Any, *factors: Tensor) -> Tensor:
        ctx.gradients, ctx.again, ctx.factors = gradients, again, factors
        ctx.set_materialize_grads(False)
        return factors[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        found = ctx.gradients.take()
        wanted = ctx.needs_input_grad[2:]
        leaves = [factor.detach().requires_grad_(want) for factor, want in zip(ctx.factors, wanted, strict=True)]
        with torch.enable_grad():
            stacks = ctx.again(leaves)
        reached = [(stacks[number], gradient) for number, gradient in found.items() if stacks[number].requires_grad]
        if not reached:
            return (None, None, *[None for _ in wanted])
        sources, gradients = zip(*reached, strict=True)
        each = iter(gradients_of(sources, gradients, [leaf for leaf in leaves if leaf.requires_grad]))
        return (None, None, *[next(each) if want else None for want in wanted])


token_of: Callable[..., Tensor] = apply_of(_Token)
