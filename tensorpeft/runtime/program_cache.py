"""Which of an adapter's programs an input is for. Plans for the usual inputs are made when the adapter is attached."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tensorpeft.emission.emit import SetCall, emit
from tensorpeft.planning.plan import Plan, plan
from tensorpeft.planning.regime import Regime

Places = dict[str, tuple[tuple[int, int], ...]]  # of a module: its input sets, and which of their modules it is


class Program:
    """The emitted code of a plan, and where in the model each part of it belongs.

    ``outputs`` are the modules to whose output an update is added, what starts there (``products``) first;
    ``inputs`` those to whose input.
    """

    def __init__(self, planned: Plan) -> None:
        self.order = planned.order
        self.code = emit(planned)
        self.sets: tuple[SetCall, ...] = self.code.sets
        # of each set: its arguments by the names that its code has for them
        self.arguments = [[(f"p{n}", place) for n, place in enumerate(call.arguments)] for call in self.sets]
        self.outputs = self._places("output", "site")
        self.products = self._places("output")
        self.inputs = self._places("input")
        self._placed: dict[torch.device, tuple[tuple[Tensor, ...], tuple[Mapping[str, Tensor], ...]]] = {}

    def _places(self, *kinds: str) -> Places:
        found: dict[str, list[tuple[int, int]]] = {}
        for kind in kinds:
            for number, call in enumerate(self.code.sets):
                for place, site in enumerate(call.modules if call.at == kind else ()):
                    found.setdefault(site.module, []).append((number, place))
        return {path: tuple(places) for path, places in found.items()}

    def indices(self, device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Mapping[str, Tensor], ...]]:
        """The constant indices of the prologue and of the input sets, on a device."""
        if device not in self._placed:
            self._placed[device] = self.code.on(device)
        return self._placed[device]


class Programs:
    """The programs of an adapter: that of its plan, and those of the plans for other uses.

    Uses whose plans are in the same order share one program. An adapter that is not alone at a module may not have what the base
    computes there, and has plans without that (``planning.base_product``).
    """

    def __init__(self, planned: Plan, *, adapts: bool) -> None:
        self.plan, self.adapts = planned, adapts
        self.main = Program(planned)
        self._made: dict[tuple[Regime, bool], Program] = {(planned.regime, True): self.main}
        self.followed = self.main  # what a compiler follows, which would look at every key of a dictionary

    def __str__(self) -> str:
        return str(self.main.code)

    def made(self) -> tuple[Program, ...]:
        """Those that there are."""
        return tuple(dict.fromkeys(self._made.values()))

    @property
    def goes_through(self) -> bool:
        """Whether some of it has what the base computes."""
        return self.plan.goes_through

    def set_alone(self, alone: bool) -> None:
        """Say whether the adapter is alone at its modules."""
        self.followed = self._program(self.plan.regime, alone or not self.plan.goes_through)

    def prepare(self, number_bytes: int) -> None:
        """Make the programs for inputs of every length, in training and out of it, of numbers of this size."""
        for gradients in (False, True) if self.adapts else ():
            self._between(0, 6, gradients=gradients, number_bytes=number_bytes)

    def _between(self, low: int, high: int, *, gradients: bool, number_bytes: int) -> None:
        """Make the programs for 4**low to 4**high tokens.

        What a plan costs grows linearly with the tokens, so one that is the best at both ends is the best between them.
        """
        regimes = [
            self.plan.regime.near(4**power, gradients=gradients, number_bytes=number_bytes)
            for power in range(low, high + 1)
        ]
        first, last = self._program(regimes[0], True), self._program(regimes[-1], True)
        if first is last:
            self._made |= {(regime, True): first for regime in regimes}
        elif high - low > 1:
            middle = (low + high) // 2
            self._between(low, middle, gradients=gradients, number_bytes=number_bytes)
            self._between(middle, high, gradients=gradients, number_bytes=number_bytes)

    def of(self, tokens: int, *, gradients: bool, number_bytes: int, alone: bool) -> Program:
        """The program for an input: as planned for about as many tokens, with or without gradients."""
        if not self.adapts:
            return self.followed
        near = self.plan.regime.near(tokens, gradients=gradients, number_bytes=number_bytes)
        return self._program(near, alone or not self.plan.goes_through)

    def _program(self, regime: Regime, alone: bool) -> Program:
        use = regime, alone
        if use not in self._made:
            planned = plan(self.plan.network, regime, alone=alone)
            own = self.plan.regime
            if regime.gradients and regime != own and planned.held > self.plan.held:
                self._made[use] = self._program(own, alone)  # in training, memory is dearer than kernels
                return self._made[use]
            same = (made for made in list(self._made.values()) if made.order == planned.order)
            self._made[use] = next(same, None) or Program(planned)
        return self._made[use]

    def place(self, device: torch.device) -> None:
        """Put the constants of the programs on a device: not in a forward pass, which a compiler may follow."""
        for program in self.made():
            program.indices(device)
