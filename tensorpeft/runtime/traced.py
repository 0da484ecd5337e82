"""An adapter where something follows every step: a compiler, a transform of torch.func, torch.jit's tracer.

Then nothing is written in place, autograd records by its own formulas, and the program is that of the adapter's own plan whatever
the input is, so that a compiled model need not be compiled again for another length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tensorpeft.runtime.base_weight import base_weight, product_of
from tensorpeft.runtime.factor_cache import Norms, Prepared, recorded, refuse_empty
from tensorpeft.runtime.program_cache import Programs
from tensorpeft.runtime.state import State


class Traced:
    """What is common to sites in one traced pass: the prologue's results, and for each input set what it has computed."""

    def __init__(self, state: State, programs: Programs, norms: Norms | None) -> None:
        self.state, self.programs, self.norms = state, programs, norms
        self.forget()

    def forget(self) -> None:
        """Drop it: a pass begins or is over."""
        self.prepared: dict[tuple[torch.dtype, torch.device], Prepared] = {}
        self.runs: dict[int, tuple[Tensor, Prepared, dict[str, Any], set[int]]] = {}

    def update(self, path: str, module: nn.Module, x: Tensor, y: Tensor, *, ahead: bool) -> Tensor:
        """The output y (..., d_out) of the module at a path for its input x (..., d_in), with the updates added.

        Or ahead of the module the input that it is to have, y, with those that go through its weight.
        """
        program = self.programs.followed
        for number, place in (program.inputs if ahead else program.outputs).get(path, ()):
            call = program.sets[number]
            source = x if call.at != "output" else product_of(module, call.modules[place], y)
            y = self._added(number, place, module, source, y)
        return y

    def _added(self, number: int, place: int, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        prepared = self._prepared_for(y)
        found = self.runs.pop(number, None)
        if found is None or found[0] is not x or found[1] is not prepared or place not in found[3]:
            found = x, prepared, self._computed(number, prepared, module, x, y), self._modules(number)
        given, waiting = found[2], found[3] - {place}
        if waiting:
            self.runs[number] = (*found[:3], waiting)
        function = self.programs.followed.sets[number].program.functional_epilogues[place]
        result: Tensor = function.code.forward(*[y if name == "y" else given[name] for name in function.takes])
        return result

    def _modules(self, number: int) -> set[int]:
        return set(range(len(self.programs.followed.sets[number].modules)))

    def _computed(self, number: int, prepared: Prepared, module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        call = self.programs.followed.sets[number]
        given = {**prepared.given[number], "x": x.to(y.dtype), "training": self.state.factors.training}
        if call.program.kind.by_base:
            given["w"] = base_weight(self.state, module, call.modules[0]).to(y.dtype)
        if call.program.kind.by_task:
            given["ids"] = self.state.ids_for(x, call.modules[0])
        function = call.program.forward
        results = function.code.forward(*[given[name] for name in function.takes])
        return {**given, **dict(zip(function.returns, results, strict=True))}

    def _prepared_for(self, y: Tensor) -> Prepared:
        """The prologue's results, computed at the first site that asks."""
        key = y.dtype, y.device
        if key not in self.prepared:
            program, factors = self.programs.followed, self.state.factors
            taken = tuple([factors[name] for name in program.code.inputs])
            if taken[0].is_meta:
                refuse_empty(y.device)
            self.prepared[key] = recorded(program, y.dtype, y.device, taken, self.norms)
        return self.prepared[key]
