"""The updates at modules that are called, but are not linear, and those of weights that a forward reads."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tensorpeft.runtime.base_weight import WeightPlace
from tensorpeft.runtime.engine import Engine


class OutputUpdate:
    """The update at one convolution or embedding."""

    def __init__(self, engine: Engine, path: str) -> None:
        self.engine, self.state, self.path = engine, engine.state, path

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The output of the module with the update, for an input."""
        return self.engine.weights.added(self.path, module, x, y)


class ReplacedWeight:
    """A weight that a module finds with the update added, while its forward runs.

    The weight is hidden, not changed: an attribute of a module's own comes before its parameters.
    """

    def __init__(self, engine: Engine, path: str) -> None:
        self.engine, self.state, self.path = engine, engine.state, path

    def replace(self, module: nn.Module) -> None:
        """Hide the weight, or what another adapter has put before it."""
        weight = self.engine.weights.place_of(self.path, module)
        change = self.engine.weights.delta(self.path, module)
        now: Any = weight.parameter
        own = weight.module.__dict__
        own.setdefault(_kept(weight), own.get(weight.name))  # a replica for several devices has its weights here
        own[weight.name] = now + weight.stored(change).to(now)

    def restore(self, module: nn.Module) -> None:
        """Let the module find its weight again. Doing it again does no harm."""
        weight = self.engine.weights.place_of(self.path, module)
        own = weight.module.__dict__
        if _kept(weight) in own:  # the first of several adapters that did
            if own[_kept(weight)] is None:
                own.pop(weight.name, None)
            else:
                own[weight.name] = own[_kept(weight)]
            del own[_kept(weight)]


def _kept(weight: WeightPlace) -> str:
    """Where a module keeps what it found before."""
    return f"{weight.name} of the base"
