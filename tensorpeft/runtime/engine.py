"""What runs an adapter: its programs, the results on its factors, its update at each module. All follows from its state."""

from __future__ import annotations

from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from tensorpeft.runtime.autograd import SharedInput
from tensorpeft.runtime.delta_weight import DeltaWeight
from tensorpeft.runtime.factor_cache import FactorCache
from tensorpeft.runtime.magnitudes import Magnitudes
from tensorpeft.runtime.program_cache import Program, Programs
from tensorpeft.runtime.replacement import Weights
from tensorpeft.runtime.state import State
from tensorpeft.runtime.torch_internals import is_dynamo_compiling, is_in_distributed_forward, is_traced
from tensorpeft.runtime.traced import Traced

_MANY = 1024  # lengths of input that a module remembers

Steps = tuple[tuple[SharedInput, int], ...]  # input sets, and which of their modules this is


class Engine:
    """Programs, and what they have computed. A copy, or what comes out of a pickle, makes them anew from the state."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.build()

    def build(self) -> None:
        """Emit everything."""
        state = self.state
        self.programs = Programs(state.plan, adapts=state.adapts)
        self.magnitudes = Magnitudes(state)
        self.weights = Weights(state)
        self.traced = Traced(state, self.programs, self.magnitudes.norms)
        self._deltas: dict[str, DeltaWeight] = {}
        self.caches: dict[Program, FactorCache] = {}
        self.shared: dict[Program, list[SharedInput]] = {}
        state.when_alone_changes = self.set_alone
        self.set_alone()
        self.place()

    def prepare(self, number_bytes: int) -> None:
        """Make what the usual inputs need, so that the first forward pass finds it."""
        self.programs.prepare(number_bytes)
        for program in self.programs.made():
            self._shared_of(program)

    def set_alone(self) -> None:
        """Notice whether other adapters are at work at its modules."""
        self.programs.set_alone(self.state.alone)

    def place(self) -> None:
        """Put constants where the factors are: not in a forward, which a compiler may follow."""
        for factor in self.state.factors.tensors()[:1]:
            self.programs.place(factor.device)
            self.weights.place(factor.device)
            self.magnitudes.place(factor.device)

    def delta_weight(self, path: str) -> DeltaWeight:
        """The code for dW of one weight."""
        if path not in self._deltas:
            self._deltas[path] = DeltaWeight(self.state.network, path)
        return self._deltas[path]

    # Passes

    def begin(self) -> None:
        """A forward pass of the model begins: what was made of the factors counts no longer."""
        self.traced.forget()
        if is_dynamo_compiling():
            return
        self.state.check_base()
        thread, distributed = get_ident(), is_in_distributed_forward()
        for cache in self.caches.values():
            cache.begin(thread, distributed=distributed)

    def end(self) -> None:
        """It is over: what is left of it can serve no one, but for the results that a backward pass may want again."""
        if is_traced():  # else they would be results of the compiled model
            self.traced.forget()
        if is_dynamo_compiling():
            return
        for cache in self.caches.values():
            cache.end()
        self._drop_runs()

    def forget(self) -> None:
        """Drop all results on factors."""
        self.traced.forget()
        for cache in self.caches.values():
            cache.forget()
        self._drop_runs()

    def _drop_runs(self) -> None:
        for shared in self.shared.values():
            for each in shared:
                each.run = None

    # Steps

    def steps(self, path: str, x: Tensor, y: Tensor, grad: bool) -> Steps:
        """What an input of a module is to meet, on the way to its output."""
        program = self._program(x, y, grad)
        shared = self._shared_of(program)
        return tuple([(shared[number], place) for number, place in program.outputs.get(path, ())])

    def steps_ahead(self, path: str, x: Tensor, grad: bool) -> Steps:
        """What is added to the input of a module."""
        program = self._program(x, x, grad)
        shared = self._shared_of(program)
        return tuple([(shared[number], place) for number, place in program.inputs.get(path, ())])

    def _program(self, x: Tensor, y: Tensor, grad: bool) -> Program:
        tokens = x.numel() // max(1, x.shape[-1])
        alone, size = self.state.alone, y.dtype.itemsize
        return self.programs.of(tokens, gradients=grad, number_bytes=size, alone=alone)

    def _shared_of(self, program: Program) -> list[SharedInput]:
        if program not in self.shared:
            cache = FactorCache(program, self.state.factors, self.magnitudes.norms)
            for other in list(self.caches.values())[:1]:  # made in the middle of a pass
                cache.as_others(other)
            self.caches[program] = cache
            self.shared[program] = [SharedInput(self.state, cache, number) for number in range(len(program.sets))]
        return self.shared[program]

    def __getstate__(self) -> dict[str, Any]:
        return {"state": self.state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state["state"]
        self.build()


class SiteUpdate:
    """The update at one linear module."""

    def __init__(self, engine: Engine, path: str) -> None:
        self.engine, self.state, self.path = engine, engine.state, path
        self.changes_input = path in engine.programs.main.inputs
        self._steps: dict[tuple[Any, ...], Steps] = {}

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The output of the module with the update, for an input; the output is written to."""
        if is_dynamo_compiling() or torch.compiler._is_compiling_flag:
            return self.engine.traced.update(self.path, module, x, y)
        grad = torch.is_grad_enabled()
        try:
            steps = self._steps[x.shape, grad, y.dtype, self.state.alone]
        except KeyError:
            steps = self._steps_for(x, y, grad)
        for shared, place in steps:
            added = shared.add(place, module, x, y, grad)
            if added is None:
                return self.engine.traced.update(self.path, module, x, y)
            y = added
        return y

    def _steps_for(self, x: Tensor, y: Tensor, grad: bool) -> Steps:
        if len(self._steps) >= _MANY:
            self._steps.clear()
        steps = self._steps[x.shape, grad, y.dtype, self.state.alone] = self.engine.steps(self.path, x, y, grad)
        return steps

    def ahead(self, module: nn.Module, x: Tensor) -> Tensor:
        """The input that the module is to have instead."""
        if is_traced():
            return self.engine.traced.ahead(self.path, module, x)
        grad, changed = torch.is_grad_enabled(), x
        for shared, place in self.engine.steps_ahead(self.path, x, grad):
            added = shared.add(place, module, x, x.clone() if changed is x else changed, grad)
            assert added is not None
            changed = added
        return changed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_steps": {}}
