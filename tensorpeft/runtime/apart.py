"""What an adapter does at sites that are no linear modules. Each of its programs is built when it is first asked for."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tensorpeft.runtime.pairs import PairUpdate
from tensorpeft.runtime.weights import held
from tensorpeft.runtime.whole import WholeUpdate

if TYPE_CHECKING:
    from tensorpeft.runtime.adapter import Adapter


class Apart:
    """The updates of convolutions, embeddings and parameters."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._pairs: dict[str, PairUpdate] = {}
        self._wholes: dict[str, WholeUpdate] = {}

    @property
    def called(self) -> tuple[str, ...]:
        """The modules to whose output an update is added."""
        return tuple(site.module for site in self.adapter.sites if site.kind in ("conv", "embedding"))

    @property
    def read(self) -> dict[str, list[str]]:
        """The modules whose forward reads weights that an update replaces, with the paths of these."""
        found: dict[str, dict[str, None]] = defaultdict(dict)
        for site in self.adapter.sites:
            if site.kind == "parameter":
                found[site.module][site.path] = None
        return {module: list(paths) for module, paths in found.items()}

    def added(self, path: str, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The output y of a convolution or an embedding for its input, with the update added."""
        if path not in self._pairs:
            places = (
                (g, n) for g in self.adapter.plan.groups for n, site in enumerate(g.group.sites) if site.path == path
            )
            self._pairs[path] = PairUpdate(self.adapter, *next(places))
        return self._pairs[path](module, x, y)

    def delta(self, path: str, module: nn.Module | None) -> Tensor:  # shape: (d_out, d_in), or (experts, d_out, d_in)
        """The update of a whole weight."""
        if path not in self._wholes:
            self._wholes[path] = WholeUpdate(self.adapter, path)
        return self._wholes[path].matrix(module)

    def replace(self, path: str, module: nn.Module) -> None:
        """Let a module find, in place of a weight, the weight with the update added.

        The weight is hidden, not changed: an attribute of a module's own comes before its parameters.
        """
        change = self.delta(path, module)
        weight = held(module, self._wholes[path].site)
        now: Any = weight.parameter
        weight.module.__dict__[weight.name] = now + weight.stored(change).to(now)

    def restore(self, path: str, module: nn.Module) -> None:
        """Let the module find its weight again."""
        if path in self._wholes:
            weight = held(module, self._wholes[path].site)
            weight.module.__dict__.pop(weight.name, None)
