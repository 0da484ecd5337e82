"""The prologue at run time: work on factors alone, once per forward of the model, for all sites together.

Emitted code is called by ``forward``, past ``nn.Module.__call__``: it is no layer of the model, and hooks that tools set on
every module (``FlopCounterMode``'s, say) have nothing to find in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import Variable
from torch.utils import checkpoint
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from tensorpeft.language.errors import AdapterError

Norms = tuple[Tensor | None, ...]  # what each factor is divided by


@dataclass(frozen=True, eq=False)
class Stacks:
    """What the prologue made of the factors: of each stack its rows.

    In training ``token`` stands for the factors: what uses a row takes it as an input, and leaves the row's gradient in
    ``gradients`` instead of returning it. Otherwise the rows carry their gradients themselves, or there are none.
    """

    rows: tuple[tuple[Tensor, ...], ...]
    token: Tensor | None = None
    gradients: Gradients | None = None


def run(
    code: fx.GraphModule,
    dtype: torch.dtype,
    device: torch.device,
    factors: tuple[Tensor, ...],
    norms: Callable[[], Norms],
    indices: tuple[Tensor, ...],
) -> Stacks:
    """The prologue's results for the factors as they are."""
    if is_traced() or not torch.is_grad_enabled():
        return recorded(code, dtype, device, factors, norms(), indices)
    with torch.no_grad(), _disable_current_modes() if outputs_are_kept() else nullcontext():
        over = norms()
        stacks = stacked(code, dtype, device, factors, over, indices)
    gradients = Gradients(stacks, factors)
    token = _Token.apply((code, dtype, device, over, indices), gradients, *factors)
    return Stacks(_rows(stacks), token, gradients)


def recorded(
    code: fx.GraphModule,
    dtype: torch.dtype,
    device: torch.device,
    factors: tuple[Tensor, ...],
    norms: Norms,
    indices: tuple[Tensor, ...],
) -> Stacks:
    """The same, by autograd's own record where there is one."""
    return Stacks(_rows(stacked(code, dtype, device, factors, norms, indices)))


def is_traced() -> bool:
    """Whether a compiler or a transform of torch.func follows what is done; then autograd's own formulas are used."""
    followed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return followed or torch._C._get_tracing_state() is not None


def outputs_are_kept() -> bool:
    """Whether selective checkpointing looks on: it keeps outputs of some kernels, and hands them out again in their order.

    What it keeps must stay as it is, and what is done once for several segments is none of its business.
    """
    modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else []
    return any(type(mode).__module__ == checkpoint.__name__ for mode in modes)


def refuse_unusual(gradients: Iterable[Tensor]) -> None:
    """To be called in a backward pass with what it is given, of which someone may want what its in-place steps cannot give.

    Raises:
        AdapterError: a backward pass of it (``once_differentiable`` refuses later, and not where a gradient is zero so far), or
            several passes at once.
    """
    if any(torch._C._functorch.is_legacy_batchedtensor(gradient) for gradient in gradients):
        raise AdapterError(
            "an adapter takes one gradient at a time, found `is_grads_batched=True`; `torch.func.jacrev` can"
        )
    if torch.is_grad_enabled():
        raise AdapterError(
            "an adapter's gradients cannot be differentiated again, found `create_graph=True`; `torch.func.grad` inside "
            "another can, as it follows every step"
        )


def stacked(
    code: Any, dtype: torch.dtype, device: torch.device, factors: Any, norms: Norms, indices: Any
) -> tuple[Tensor, ...]:
    """The stacks as they are, (rows, ...) each."""
    kind = factors[0].device.type
    factors = [factor if over is None else quotient(factor, over) for factor, over in zip(factors, norms, strict=True)]
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        return tuple(stack.to(device) for stack in code.forward(dtype, *factors, *indices))


def quotient(magnitude: Tensor, norms: Tensor) -> Tensor:
    """A magnitude over its norms, as it stands in products; one where the norm is zero, and no gradient there."""
    norms = norms.to(magnitude.dtype)
    zero = norms == 0
    return (magnitude / norms.masked_fill(zero, 1)).masked_fill(zero, 1)


def _rows(stacks: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
    return tuple(stack.unbind() for stack in stacks)


class Gradients:
    """Where a backward pass leaves the gradients of stacks, added up in place.

    A pass is one run of autograd's engine, which has a number: neither a second backward through the same graph, nor one within
    another (reentrant checkpointing), nor one that never got to the factors leaves anything to the next.
    """

    def __init__(self, stacks: tuple[Tensor, ...], factors: tuple[Tensor, ...]) -> None:
        self._factors, self._versions = factors, [factor._version for factor in factors]
        self._shapes = [(stack.shape, stack.dtype, stack.device) for stack in stacks]
        self._sums: dict[int, dict[int, tuple[Tensor, tuple[Tensor, ...]]]] = {}
        self._parts: dict[int, dict[tuple[int, int], Tensor]] = {}

    def check(self) -> None:
        """Stacks may be views of factors, so these must be as they were."""
        if [factor._version for factor in self._factors] != self._versions:
            raise RuntimeError(
                "a factor of the adapter was changed in place between the forward pass and its backward pass"
            )

    def row(self, stack: int, row: int) -> Tensor:
        """The gradient of a row so far, to add to."""
        sums = self._sums.setdefault(self._pass(), {})
        if stack not in sums:
            shape, dtype, device = self._shapes[stack]
            zeros = torch.zeros(shape, dtype=dtype, device=device)
            sums[stack] = zeros, zeros.unbind()
        return sums[stack][1][row]

    def put(self, stack: int, row: int, part: Tensor) -> None:
        """Add to the gradient of a row."""
        parts = self._parts.setdefault(self._pass(), {})
        parts[stack, row] = parts[stack, row].add_(part) if (stack, row) in parts else part

    def take(self) -> dict[int, Tensor]:
        """The gradients of the stacks that have one, in this pass."""
        number = self._pass()
        sums = {stack: zeros for stack, (zeros, _) in self._sums.pop(number, {}).items()}
        parts = self._parts.pop(number, {})
        for stack in {stack for stack, _ in parts}:
            shape, dtype, device = self._shapes[stack]
            none = (
                torch.zeros(shape[1:], dtype=dtype, device=device)
                if shape[0] > sum(s == stack for s, _ in parts)
                else None
            )
            found = torch.stack([parts.get((stack, row), none) for row in range(shape[0])])  # type: ignore[misc]
            sums[stack] = sums[stack].add_(found) if stack in sums else found
        return sums

    def _pass(self) -> int:
        number = torch._C._current_graph_task_id()
        if number not in self._sums and number not in self._parts:
            self._sums[number], self._parts[number] = {}, {}
            Variable._execution_engine.queue_callback(lambda: self._forget(number))
        return number

    def _forget(self, number: int) -> None:
        self._sums.pop(number, None)
        self._parts.pop(number, None)


class _Token(torch.autograd.Function):
    """Stands for the factors in autograd's graph: when all that used them has left its gradients, they get theirs.

    Nothing is saved for that but the factors themselves: the prologue runs again, recorded.
    """

    @staticmethod
    def forward(ctx: Any, prologue: tuple[Any, ...], gradients: Gradients, *factors: Tensor) -> Tensor:
        ctx.prologue, ctx.gradients, ctx.factors = prologue, gradients, factors
        ctx.set_materialize_grads(False)
        return factors[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.gradients.check()
        found = ctx.gradients.take()
        wanted = ctx.needs_input_grad[2:]
        leaves = [factor.detach().requires_grad_(want) for factor, want in zip(ctx.factors, wanted, strict=True)]
        code, dtype, device, norms, indices = ctx.prologue
        with torch.enable_grad():
            stacks = stacked(code, dtype, device, leaves, norms, indices)
        reached = [(stacks[number], gradient) for number, gradient in found.items() if stacks[number].requires_grad]
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        if not reached:
            return (None, None, *(None for _ in wanted))
        sources, gradients = zip(*reached, strict=True)
        each = iter(torch.autograd.grad(sources, trained, gradients, allow_unused=True))
        return (None, None, *(next(each) if want else None for want in wanted))
