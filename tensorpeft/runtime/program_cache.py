"""Emitted code with what it needs at run time, and which of an adapter's codes an input is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tensorpeft.emission.emit import emit
from tensorpeft.language.errors import AdapterError
from tensorpeft.planning.plan import Plan, plan
from tensorpeft.planning.regime import Regime
from tensorpeft.runtime import factor_cache as prologue
from tensorpeft.runtime.factor_cache import Stacks
from tensorpeft.runtime.factors import Factors

Norms = Callable[[], Mapping[str, Tensor]]  # of blocks, by their names: what they are divided by
Places = dict[str, tuple[tuple[int, int], ...]]  # of a module: its input sets, and which of their modules it is


class Compiled:
    """The code of a plan, its constants on each device, and the prologue's results for the factors as they are.

    ``outputs`` are the modules to whose output an update is added, what starts there (``products``) first;
    ``inputs`` those to whose input.
    """

    def __init__(self, planned: Plan) -> None:
        self.order = planned.order
        self.code = emit(planned)
        self.outputs = self._places("output", "site")
        self.products = self._places("output")
        self.inputs = self._places("input")
        self._placed: dict[torch.device, tuple[tuple[Tensor, ...], tuple[Mapping[str, Tensor], ...]]] = {}
        self.forget()

    def _places(self, *kinds: str) -> Places:
        found: dict[str, list[tuple[int, int]]] = {}
        for kind in kinds:
            for number, call in enumerate(self.code.sets):
                for place, site in enumerate(call.modules if call.at == kind else ()):
                    found.setdefault(site.module, []).append((number, place))
        return {path: tuple(places) for path, places in found.items()}

    def forget(self) -> None:
        """Drop the prologue's results."""
        self._stacks: dict[tuple[Any, ...], tuple[Stacks, list[Tensor]]] = {}

    def indices(self, device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Mapping[str, Tensor], ...]]:
        """The constant indices of the prologue and of the input sets, on a device."""
        if device not in self._placed:
            self._placed[device] = self.code.on(device)
        return self._placed[device]

    def stacks(self, factors: Factors, norms: Norms, dtype: torch.dtype, device: torch.device) -> Stacks:
        """The prologue's results for the factors as they are, computed at the first site that asks.

        The model's forward starts by forgetting them. The versions of the factors and the places of their numbers guard the rest:
        a submodule called by itself, and checkpointing, which runs parts of the forward again during the backward pass and must
        meet the same tensors.

        Raises:
            AdapterError: a factor that the spec freezes is to have a gradient, or the factors have no values.
        """
        taken = tuple(factors[name] for name in self.code.inputs)
        state = () if prologue.is_traced() else _state(taken)
        found = self._stacks.get((dtype, device, state))  # another thread may forget them meanwhile
        if found is None:
            if state:
                factors.refuse_thawed(self.code.inputs)
            if taken[0].is_meta and device.type != "meta":
                raise AdapterError(
                    "the adapter's factors are on the meta device and have no values; "
                    "attach it when the model's weights are loaded, and to a model that is not offloaded"
                )
            indices = self.indices(taken[0].device)[0]
            stacks = prologue.run(self.code.prologue, dtype, device, taken, lambda: self._over(norms()), indices)
            found = stacks, [factor.detach() for factor in taken if state]  # so that no other numbers come to lie there
            kept = {key: kept for key, kept in self._stacks.items() if key[-1] == state}
            self._stacks = {**kept, (dtype, device, state): found}
        return found[0]

    def _over(self, norms: Mapping[str, Tensor]) -> prologue.Norms:
        """What each block that the prologue takes is divided by."""
        return tuple(norms.get(name) for name in self.code.inputs)


class Codes:
    """The codes of an adapter: that of its plan, and those of the plans for other uses, each made when it is first needed.

    Uses whose plans are in the same order share one code.
    """

    def __init__(self, planned: Plan, *, adapts: bool) -> None:
        self.main = Compiled(planned)
        self._plan, self._adapts, self._alone = planned, adapts, True
        self._made: dict[tuple[Regime, bool], Compiled] = {(planned.regime, True): self.main}
        self._followed = self.main  # what a compiler follows, which would look at every key of a dictionary

    def set_alone(self, alone: bool) -> None:
        """Say whether the adapter is alone on its model."""
        self._alone = alone or not self._plan.goes_through
        self._followed = self._code(self._plan.regime)

    def code_for(self, x: Tensor, y: Tensor) -> Compiled:
        """The code for an input: as planned for about as many tokens, with or without gradients, and numbers of this size.

        A compiler that follows what is done gets the adapter's own plan, for any input.
        """
        if not self._adapts or prologue.is_traced():
            return self._followed
        tokens = x.numel() // max(1, x.shape[-1])
        near = self._plan.regime.near(tokens, gradients=torch.is_grad_enabled(), number_bytes=y.dtype.itemsize)
        return self._code(near)

    def _code(self, regime: Regime) -> Compiled:
        use = regime, self._alone
        if use not in self._made:
            planned = plan(self._plan.network, regime, alone=self._alone)
            own = self._plan.regime
            if regime.gradients and regime != own and planned.held > self._plan.held:
                self._made[use] = self._code(own)  # in training, memory is dearer than kernels
                return self._made[use]
            same = (made for made in list(self._made.values()) if made.order == planned.order)
            self._made[use] = next(same, None) or Compiled(planned)
        return self._made[use]

    def place(self, device: torch.device) -> None:
        """Put the constants of a plan that a compiler gets on a device."""
        self._followed.indices(device)

    def forget(self) -> None:
        """Drop all results on factors alone."""
        for compiled in [self._followed] if prologue.is_traced() else list(self._made.values()):
            compiled.forget()


def _state(factors: tuple[Tensor, ...]) -> tuple[bool | int, ...]:
    """What the prologue's results depend on, beside their dtype and device: what is recorded, and the factors' numbers."""
    versions = (n for f in factors for n in (-1 if f.is_inference() else f._version, f.data_ptr()))
    captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # into a graph of its own
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), captured, *versions
