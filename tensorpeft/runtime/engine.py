"""What runs an adapter: its programs, the results on its factors, its update at each module. All follows from its state."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tensorpeft.runtime.autograd import SharedInput
from tensorpeft.runtime.delta_weight import DeltaWeight
from tensorpeft.runtime.factor_cache import FactorCache, ForwardPass
from tensorpeft.runtime.magnitudes import Magnitudes
from tensorpeft.runtime.program_cache import Program, Programs
from tensorpeft.runtime.replacement import Weights
from tensorpeft.runtime.state import State
from tensorpeft.runtime.torch_internals import is_dynamo_compiling
from tensorpeft.runtime.traced import Traced

Steps = tuple[tuple[SharedInput, int], ...]  # input sets, and which of their modules this is


class Engine:
    """Programs, and what they have computed. A copy, or what comes out of a pickle, makes them anew from the state."""

    def __init__(self, state: State, programs: Programs) -> None:
        self.state, self.programs = state, programs
        self.magnitudes = Magnitudes(state)
        self.weights = Weights(state)
        self.traced = Traced(state, self.programs, self.magnitudes.norms if self.magnitudes.blocks else None)
        self._deltas: dict[str, DeltaWeight] = {}
        self.now = ForwardPass()
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
        self._forget_traced()
        if is_dynamo_compiling():
            return
        self.state.check_base()
        self.now.begin()

    def end(self) -> None:
        """It is over: what is left of it can serve no one, but for the results that a backward pass may want again."""
        self._forget_traced()  # else it would be a result of a compiled model
        if is_dynamo_compiling():
            return
        self.now.end()
        for program in self.caches:
            self.caches[program].end()
        self._drop_runs()

    def forget(self) -> None:
        """Drop all results on factors."""
        self._forget_traced()
        for cache in self.caches.values():
            cache.forget()
        self._drop_runs()

    def _forget_traced(self) -> None:
        if self.traced.prepared or self.traced.runs:
            self.traced.forget()

    def _drop_runs(self) -> None:
        for program in self.shared:
            for each in self.shared[program]:
                each.run = None

    # Steps

    def steps(self, path: str, x: Tensor, y: Tensor, *, grad: bool, ahead: bool) -> Steps:
        """What an input of a module is to meet on the way to its output, or ahead of it."""
        tokens = x.numel() // max(1, x.shape[-1])
        size, alone = y.dtype.itemsize, self.state.alone
        program = self.programs.of(tokens, gradients=grad, number_bytes=size, alone=alone)
        shared = self._shared_of(program)
        places = (program.inputs if ahead else program.outputs).get(path, ())
        return tuple([(shared[number], place) for number, place in places])

    def _shared_of(self, program: Program) -> list[SharedInput]:
        if program not in self.shared:
            norms = self.magnitudes.norms if self.magnitudes.blocks else None
            self.caches[program] = cache = FactorCache(program, self.state.factors, norms, self.now)
            self.shared[program] = [SharedInput(self.state, cache, number) for number in range(len(program.sets))]
        return self.shared[program]

    def __getstate__(self) -> dict[str, Any]:
        return {"state": self.state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        mine: State = state["state"]
        self.__init__(mine, Programs(mine.plan, adapts=mine.adapts))  # type: ignore[misc]
