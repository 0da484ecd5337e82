"""An input set at run time: what its sites have in common is computed when the first of its modules runs.

In training two functions of autograd's stand for it. The one computes what is common, and gives each module a *handle*: a tensor
of the shape of its output, without memory. The other adds a module's update to its output, in the memory of that, and
passes the gradient on to the output and, as it is, to the handle. So the first gets the gradients of all outputs at once.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from tensorpeft.emission.emit import SetCall
from tensorpeft.runtime.base_weight import base_weight, product_of
from tensorpeft.runtime.factor_cache import FactorCache, Prepared
from tensorpeft.runtime.gradients import refuse_unusual
from tensorpeft.runtime.state import State
from tensorpeft.runtime.torch_internals import (
    apply_of,
    backward_pass,
    outputs_are_kept,
    tracing_state,
    transforms_are_active,
)

Given = dict[str, Any]


def picker(names: tuple[str, ...]) -> Callable[[Given], tuple[Any, ...]]:
    """A function that picks the values of names, by a single call of the interpreter's where there are several."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda given: tuple([given[name] for name in names])


class Run:
    """What an input set has computed for one input."""

    __slots__ = ("given", "grad", "handles", "kept", "number", "version", "waiting", "x")

    def __init__(self, x: Tensor, grad: bool, waiting: int) -> None:
        self.x, self.grad, self.waiting = x, grad, waiting
        self.version = -1 if x.is_inference() else x._version
        self.number = (
            backward_pass() if grad else -1
        )  # of the engine's run, if this is within one: of what is done again there
        self.kept = grad and outputs_are_kept()
        self.handles: tuple[Tensor, ...] = ()


class SharedInput:
    """One input set of a program: sites that read one tensor. It keeps what it computed while one of its modules waits for it."""

    def __init__(self, state: State, cache: FactorCache, number: int) -> None:
        self.state, self.cache, self.number = state, cache, number
        self.call: SetCall = cache.program.sets[number]
        program = self.call.program
        self.all = (1 << len(self.call.modules)) - 1
        self.run: Run | None = None
        self._by_base, self._by_task = program.kind.by_base, program.kind.by_task
        self._behind = self.call.at == "output"
        self._forward, self._pick = program.forward.code.forward, picker(program.forward.takes)
        self._returns = program.forward.returns
        self._epilogues = [(each.code.forward, picker(each.takes[1:])) for each in program.epilogues]
        assert all(each.takes[0] == "y" for each in program.epilogues)

    def add(self, place: int, module: nn.Module, x: Tensor, y: Tensor, grad: bool) -> Tensor | None:
        """The output y (..., d_out) of one of its modules for the input x (..., d_in) with the updates added, in y's memory.

        None if something looks on that needs every step to be a function without effects (``traced``).
        """
        mine, run = 1 << place, self.run
        if (
            run is None
            or run.x is not x
            or run.grad is not grad
            or not run.waiting & mine
            or (run.version >= 0 and x._version != run.version)
            or (grad and backward_pass() != run.number)
        ):
            run = self._begin(module, x, y, grad)
            if run is None:
                return None
        run.waiting &= ~mine
        self.run = run if run.waiting else None
        target = _writable(y, run.kept)
        if run.handles:
            target = _add_update(target, run.handles[place], self, place, run)
        else:
            code, pick = self._epilogues[place]
            code(target, *pick(run.given))
        return target if target.shape == y.shape else target.view(y.shape)

    def _begin(self, module: nn.Module, x: Tensor, y: Tensor, grad: bool) -> Run | None:
        """Compute what the sites have in common."""
        if transforms_are_active() or tracing_state() is not None:
            return None
        prepared = self.cache.prepared(y, grad)
        run = Run(x, grad, self.all)
        source = product_of(module, self.call.modules[0], y) if self._behind else x
        cast = (
            source if source.dtype is y.dtype else source.to(y.dtype)
        )  # under autocast the base has cast its own copy
        run.given = given = {**prepared.given[self.number], "x": cast, "training": self.state.factors.training}
        if self._by_base:
            given["w"] = base_weight(self.state, module, self.call.modules[0]).to(y.dtype)
        if self._by_task:
            given["ids"] = self.state.ids_for(x, self.call.modules[0])
        if prepared.token is not None and (prepared.token.requires_grad or cast.requires_grad):
            run.handles = _common(cast, prepared.token, self, prepared, given)
        else:
            self.compute(given)
        return run

    def compute(self, given: Given) -> None:
        """What the sites have in common, put among what is given."""
        results = self._forward(*self._pick(given))
        for name, value in zip(self._returns, results, strict=True):
            given[name] = value

    def forget(self) -> None:
        """Drop what modules were to share that were not called."""
        self.run = None


def _writable(y: Tensor, kept: bool) -> Tensor:
    """An output in whose memory one may write: y, or what y views as a whole; else a copy.

    The output is the base's own, which nobody else has seen yet. Autograd wants the whole, not a view of it, to be written to.
    """
    base = y._base
    if not kept and y.is_contiguous():
        if base is None:
            return y
        if base.is_contiguous() and base.numel() == y.numel():
            return base
    return y.clone(memory_format=torch.contiguous_format)


class _Common(torch.autograd.Function):
    """What the sites of an input set have in common, and all of its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, shared: SharedInput, prepared: Prepared, given: Given) -> Any:
        shared.compute(given)
        program = shared.call.program
        ctx.to_x, ctx.to_arguments = ctx.needs_input_grad[:2]
        ctx.function = function = program.backward(shared.all, to_x=ctx.to_x, to_arguments=ctx.to_arguments)
        own = program.forward.returns
        ctx.names = names = tuple([name for name in function.takes if name == "x" or name in own])
        ctx.save_for_backward(*[given[name] for name in names])
        ctx.given = {name: given[name] for name in function.takes if name in given and name not in names}
        ctx.shared, ctx.gradients, ctx.shape = shared, prepared.gradients, x.shape
        ctx.set_materialize_grads(False)
        return tuple([_handle(x, d_out) for d_out in program.kind.d_out])

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        present, given = 0, ctx.given.copy()
        for module, gradient in enumerate(outputs):
            if gradient is not None:
                present |= 1 << module
                given[f"g{module}"] = gradient
        if not present:
            return None, None, None, None, None
        refuse_unusual([gradient for gradient in outputs if gradient is not None])
        call, function = ctx.shared.call, ctx.function
        if present != ctx.shared.all:
            function = call.program.backward(present, to_x=ctx.to_x, to_arguments=ctx.to_arguments)
        given.update(zip(ctx.names, ctx.saved_tensors, strict=True))
        current = ctx.gradients.current()
        for name, number in function.accumulated:
            given[name] = current.row(*call.arguments[number])
        dx, *parts = function.code.forward(*[given[name] for name in function.takes])
        for number, part in zip(function.delivered, parts, strict=True):
            current.put(*call.arguments[number], part)
        return None if dx is None else dx.reshape(ctx.shape), None, None, None, None


def _handle(x: Tensor, d_out: int) -> Tensor:
    shape = (*x.shape[:-1], d_out)
    return torch.empty_strided(shape, (0,) * len(shape), dtype=x.dtype, device=x.device)


class _AddUpdate(torch.autograd.Function):
    """Adds an update to an output, in its memory."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, handle: Tensor, shared: SharedInput, place: int, run: Run) -> Tensor:
        ctx.mark_dirty(y)
        ctx.shape = handle.shape
        code, pick = shared._epilogues[place]
        code(y, *pick(run.given))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, gradient.reshape(ctx.shape), None, None, None


_common: Callable[..., tuple[Tensor, ...]] = apply_of(_Common)
_add_update: Callable[..., Tensor] = apply_of(_AddUpdate)
