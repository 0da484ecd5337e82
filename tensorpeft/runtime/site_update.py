"""The update at one linear module: the way from an input to the kernels that emission has written for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tensorpeft.runtime.autograd import add_update
from tensorpeft.runtime.engine import Engine, Steps
from tensorpeft.runtime.torch_internals import backward_pass, is_dynamo_compiling, is_traced

_MANY = 1024  # lengths of input that a module remembers


class SiteUpdate:
    """What an adapter adds to the output of one linear module, or ``ahead`` of it to its input.

    This runs at every module of every pass, where each call of the interpreter's counts: hence the long function.
    """

    def __init__(self, engine: Engine, path: str, *, ahead: bool = False) -> None:
        self.engine, self.state, self.path, self.ahead = engine, engine.state, path, ahead
        self._steps: dict[tuple[Any, ...], Steps] = {}

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The output y (..., d_out) for the input x (..., d_in), with the updates added, in the memory of y."""
        if is_dynamo_compiling() or self.engine.now.is_traced:
            return self.engine.traced.update(self.path, module, x, y, ahead=self.ahead)
        if y.dtype is torch.float16:  # in whose range x A need not lie
            return self(module, x, y.float()).to(torch.float16)
        grad = torch.is_grad_enabled()
        try:
            steps = self._steps[x.shape, grad, y.dtype, self.state.alone]
        except (KeyError, TypeError):  # new; or of a size that is a symbol, which has no hash
            if is_traced():  # outside of a forward of the whole model
                return self.engine.traced.update(self.path, module, x, y, ahead=self.ahead)
            steps = self._steps_for(x, y, grad)
        for shared, place in steps:
            mine, run = 1 << place, shared.run
            if (
                run is None
                or run.x is not x
                or run.grad is not grad
                or not run.waiting & mine
                or (run.version >= 0 and x._version != run.version)
                or (grad and backward_pass() != run.number)
            ):
                run = shared.begin(module, x, y, grad)
                if run is None:  # something looks on that needs every step to be a function without effects
                    return self.engine.traced.update(self.path, module, x, y, ahead=self.ahead)
            run.waiting &= ~mine
            shared.run = run if run.waiting else None
            whole = y._base  # autograd wants the whole, and not a view of it, to be written to
            if run.kept or not y.is_contiguous():
                target = y.clone(memory_format=torch.contiguous_format)
            elif whole is None:
                target = y  # the base's own output, fresh, which nobody else has seen yet
            else:
                target = whole if whole.is_contiguous() and whole.numel() == y.numel() else y.clone()
            epilogue, pick = shared.epilogues[place]
            if run.handles:
                target = add_update(target, run.handles[place], epilogue, pick, run.given)
            else:
                epilogue(target, *pick(run.given))
            y = target if target.shape == y.shape else target.view(y.shape)
        return y

    def _steps_for(self, x: Tensor, y: Tensor, grad: bool) -> Steps:
        if len(self._steps) >= _MANY:
            self._steps.clear()
        found = self.engine.steps(self.path, x, y, grad=grad, ahead=self.ahead)
        self._steps[x.shape, grad, y.dtype, self.state.alone] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": {}}
