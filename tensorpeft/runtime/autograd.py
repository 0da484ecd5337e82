"""An input set at run time: what its sites have in common is computed when the first of its modules runs.

In training two functions of autograd's stand for it. The one computes what is common, and gives each module a *handle*: a tensor
of the shape of its output, without memory. The other adds a module's update to its output, in the memory of that, and
passes the gradient on to the output and, as it is, to the handle. So the first gets the gradients of all outputs at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tensorpeft.emission.emit import SetCall
from tensorpeft.emission.graph import picker
from tensorpeft.runtime.base_weight import base_weight, product_of
from tensorpeft.runtime.factor_cache import FactorCache, Prepared
from tensorpeft.runtime.gradients import refuse_unusual
from tensorpeft.runtime.state import State
from tensorpeft.runtime.torch_internals import (
    apply_of,
    backward_pass,
    is_traced,
    outputs_are_kept,
    transforms_are_active,
)

Given = dict[str, Any]


class Run:
    """What an input set has computed for one input."""

    __slots__ = ("given", "grad", "handles", "kept", "number", "version", "waiting", "x")

    x: Tensor
    version: int  # of x; -1 where it counts none
    grad: bool
    number: int  # of the engine's run, if this is within one: of what is done again there
    kept: bool  # whether somebody keeps the outputs of kernels
    waiting: int  # the modules that did not ask yet, each a bit
    given: Given  # what the epilogues take
    handles: tuple[Tensor, ...]


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
        self.forward, self.pick, self.returns = program.forward.run, program.forward.pick, program.forward.returns
        self.epilogues = [(each.code.forward, picker(each.takes[1:])) for each in program.epilogues]
        assert all(each.takes[0] == "y" for each in program.epilogues)

    def begin(self, module: nn.Module, x: Tensor, y: Tensor, grad: bool) -> Run | None:
        """Compute what the sites have in common; None if something looks on that needs functions without effects (``traced``)."""
        now = self.cache.now
        if transforms_are_active() or now.is_traced or (not now.thread and is_traced()):
            return None
        prepared = self.cache.prepared(y, grad)
        run = Run()  # filled in here, as an __init__ would be a call more
        run.x, run.grad, run.waiting, run.handles = x, grad, self.all, ()
        try:
            run.version = x._version
        except RuntimeError:  # a tensor of inference mode counts none
            run.version = -1
        run.number = backward_pass() if grad else -1
        run.kept = grad and outputs_are_kept()
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
            for name, value in zip(self.returns, self.forward(*self.pick(given)), strict=True):
                given[name] = value  # noqa: PERF403 - a comprehension is a call
        return run


class _Common(torch.autograd.Function):
    """What the sites of an input set have in common, and all of its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, shared: SharedInput, prepared: Prepared, given: Given) -> Any:
        for name, value in zip(shared.returns, shared.forward(*shared.pick(given)), strict=True):
            given[name] = value
        program = shared.call.program
        ctx.to_x, ctx.to_arguments = ctx.needs_input_grad[:2]
        ctx.function = function = program.backward(shared.all, to_x=ctx.to_x, to_arguments=ctx.to_arguments)
        activations, others = {}, {}
        for name in function.takes:
            if name == "x" or name in program.forward.returns:
                activations[name] = given[name]
            elif name in given:
                others[name] = given[name]
        ctx.save_for_backward(*activations.values())
        ctx.names, ctx.given = tuple(activations), others
        ctx.shared, ctx.gradients, ctx.shape = shared, prepared.gradients, x.shape
        ctx.set_materialize_grads(False)
        lead, flat = x.shape[:-1], (0,) * x.ndim
        handles = []
        for d_out in program.kind.d_out:
            handles += [torch.empty_strided((*lead, d_out), flat, dtype=x.dtype, device=x.device)]
        return tuple(handles)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        present, given, one = 0, {**ctx.given}, None
        for module, gradient in enumerate(outputs):
            if gradient is not None:
                present |= 1 << module
                given[f"g{module}"] = one = gradient
        if one is None:
            return None, None, None, None, None
        refuse_unusual(one)
        call, function = ctx.shared.call, ctx.function
        if present != ctx.shared.all:
            function = call.program.backward(present, to_x=ctx.to_x, to_arguments=ctx.to_arguments)
        for name, value in zip(ctx.names, ctx.saved_tensors, strict=True):
            given[name] = value  # noqa: PERF403 - a comprehension is a call
        current = ctx.gradients.current()
        for name, number in function.accumulated:
            stack, row = call.arguments[number]
            given[name] = current.rows[stack][row] if stack in current.rows else current.row(stack, row)
        dx, *parts = function.run(*function.pick(given))
        for number, part in zip(function.delivered, parts, strict=True):
            current.put(*call.arguments[number], part)
        return None if dx is None else dx.reshape(ctx.shape), None, None, None, None


class _AddUpdate(torch.autograd.Function):
    """Adds an update to an output, in its memory."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, handle: Tensor, epilogue: Any, pick: Any, given: Given) -> Tensor:
        ctx.mark_dirty(y)
        ctx.shape = handle.shape
        epilogue(y, *pick(given))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        mine = gradient if gradient.shape == ctx.shape else gradient.reshape(ctx.shape)
        return gradient, mine, None, None, None


_common: Callable[..., tuple[Tensor, ...]] = apply_of(_Common)
add_update: Callable[..., Tensor] = apply_of(_AddUpdate)
