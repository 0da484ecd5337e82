"""An input set at run time: what its sites have in common is computed when the first of its modules has run.

In training two functions of autograd's stand for it. The one computes what is common, and gives each module a *handle*: a tensor
of the shape of its output, without memory. The other adds a module's update to its output, in the memory of that, and
passes the gradient on to the output and, as it is, to the handle. So the first gets the gradients of all outputs at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tensorpeft.emission.emit import SetCall
from tensorpeft.runtime.factor_cache import Stacks, is_traced, outputs_are_kept, refuse_unusual

Given = dict[str, Any]


class SetRun:
    """One input set at one input."""

    def __init__(self, call: SetCall, stacks: Stacks, x: Tensor, given: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.call, self.stacks, self.x, self.version = call, stacks, x, _version(x)
        self.waiting = set(range(len(call.modules)))
        self.state = _state()
        self.handles: tuple[Tensor, ...] = ()
        cast = x if x.dtype == dtype else x.to(dtype)  # under autocast the base has cast its own copy
        self.given: Given = {**given, "x": cast}
        for number, (stack, row) in enumerate(call.arguments):
            self.given[f"p{number}"] = stacks.rows[stack][row]
        if stacks.token is not None and (stacks.token.requires_grad or cast.requires_grad):
            self.handles = _Common.apply(cast, stacks.token, self)
        else:
            self.compute()

    def fits(self, module: int, x: Tensor, stacks: Stacks) -> bool:
        """Whether a module can use it: it has the same input, in the same state of everything, and did not use it yet."""
        if module not in self.waiting or x is not self.x or stacks is not self.stacks:
            return False
        return is_traced() or (self.version == _version(x) and self.state == _state())

    def compute(self) -> None:
        """What the sites have in common."""
        function = self.call.program.forward
        results = function.code.forward(*(self.given[name] for name in function.takes))
        self.given.update(zip(function.returns, results, strict=True))

    def land(self, module: int, y: Tensor) -> Tensor:
        """The output of a module with the update of its sites added."""
        self.waiting.discard(module)
        program = self.call.program
        if is_traced():
            function = program.functional_epilogues[module]
            return function.code.forward(*(y if name == "y" else self.given[name] for name in function.takes))
        function = program.epilogues[module]
        target = _writable(y)
        given = {**self.given, "y": target}
        if self.handles:
            target = _Land.apply(target, self.handles[module], function, given)
        else:
            function.code.forward(*(given[name] for name in function.takes))
        return target if target.shape == y.shape else target.view(y.shape)


def _version(x: Tensor) -> int:
    return -1 if is_traced() or x.is_inference() else x._version


def _state() -> tuple[Any, ...]:
    """What the tensors of a run belong to: one pass of autograd's engine, or none."""
    return () if is_traced() else (torch._C._current_graph_task_id(), torch.is_grad_enabled())


def _writable(y: Tensor) -> Tensor:
    """An output in whose memory one may write: y, or what y views as a whole; else a copy."""
    base = None if outputs_are_kept() else y._base if y._is_view() else y
    whole = base is not None and base.numel() == y.numel() and base.is_contiguous() and y.is_contiguous()
    if base is not None and whole and not (base.is_leaf and base.requires_grad):
        return base
    return y.clone(memory_format=torch.contiguous_format)


class _Common(torch.autograd.Function):
    """What the sites of an input set have in common, and all of its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, run: SetRun) -> tuple[Tensor, ...]:
        run.compute()
        program, gradients = run.call.program, run.stacks.gradients
        ctx.to_x, ctx.to_arguments = ctx.needs_input_grad[:2]
        everything = frozenset(range(len(run.call.modules)))
        takes = program.backward(everything, to_x=ctx.to_x, to_arguments=ctx.to_arguments).takes
        ctx.names = tuple(name for name in takes if name == "x" or name in program.forward.returns)
        ctx.save_for_backward(*(run.given[name] for name in ctx.names))
        ctx.given = {name: run.given[name] for name in takes if name in run.given and name not in ctx.names}
        ctx.program, ctx.arguments, ctx.gradients, ctx.shape = program, run.call.arguments, gradients, x.shape
        ctx.set_materialize_grads(False)
        return tuple(_handle(x, d_out) for d_out in program.kind.d_out)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        present = {f"g{module}": gradient for module, gradient in enumerate(outputs) if gradient is not None}
        refuse_unusual(present.values())
        if not present:
            return None, None, None
        ctx.gradients.check()
        numbers = frozenset(module for module, gradient in enumerate(outputs) if gradient is not None)
        function = ctx.program.backward(numbers, to_x=ctx.to_x, to_arguments=ctx.to_arguments)
        given = {**ctx.given, **dict(zip(ctx.names, ctx.saved_tensors, strict=True)), **present}
        for name in function.takes:
            if name.startswith("into"):
                given[name] = ctx.gradients.row(*ctx.arguments[int(name.removeprefix("into"))])
        dx, *parts = function.code.forward(*(given[name] for name in function.takes))
        for name, part in zip(function.returns[1:], parts, strict=True):
            ctx.gradients.put(*ctx.arguments[int(name.removeprefix("into"))], part)
        return None if dx is None else dx.reshape(ctx.shape), None, None


def _handle(x: Tensor, d_out: int) -> Tensor:
    shape = (*x.shape[:-1], d_out)
    return torch.empty_strided(shape, (0,) * len(shape), dtype=x.dtype, device=x.device)


class _Land(torch.autograd.Function):
    """Adds an update to an output, in its memory."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, handle: Tensor, function: Any, given: Given) -> Tensor:
        ctx.mark_dirty(y)
        ctx.shape = handle.shape
        function.code.forward(*(y if name == "y" else given[name] for name in function.takes))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, gradient.reshape(ctx.shape), None, None
