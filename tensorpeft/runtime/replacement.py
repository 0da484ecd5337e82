"""What an adapter does at sites that are no linear modules: convolutions, embeddings, and weights that a forward reads."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from tensorpeft.runtime.base_weight import WeightPlace, base_weight, weight_place
from tensorpeft.runtime.delta_weight import DeltaWeight
from tensorpeft.runtime.pairs import PairUpdate
from tensorpeft.runtime.state import State


class Weights:
    """The updates of convolutions, embeddings and parameters."""

    def __init__(self, state: State) -> None:
        self.state = state
        self._pairs = {
            site.path: PairUpdate(state, planned, number)
            for planned in state.plan.groups
            for number, site in enumerate(planned.group.sites)
            if site.kind in ("conv", "embedding")
        }
        self._wholes = {
            site.path: DeltaWeight(state.network, site.path) for site in state.network.sites if site.kind == "parameter"
        }

    def place(self, device: torch.device) -> None:
        """Put constants on a device."""
        updates: list[PairUpdate | DeltaWeight] = [*self._pairs.values(), *self._wholes.values()]
        for index in (index for update in updates for index in update.constants()):
            index.on(device)

    @property
    def called(self) -> dict[str, str]:
        """The modules to whose output an update is added, with the paths of their weights."""
        return {site.module: site.path for site in self.state.network.sites if site.kind in ("conv", "embedding")}

    @property
    def read(self) -> dict[str, list[str]]:
        """The modules whose forward reads weights that an update replaces, with the paths of these."""
        found: dict[str, dict[str, None]] = defaultdict(dict)
        for site in self.state.network.sites:
            if site.kind == "parameter":
                found[site.module][site.path] = None
        return {module: list(paths) for module, paths in found.items()}

    def added(self, path: str, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The output y of a convolution or an embedding for its input, with the update added."""
        return self._pairs[path](module, x, y)

    def delta(self, path: str, module: nn.Module) -> Tensor:  # shape: (d_out, d_in), or (experts, d_out, d_in)
        """The update of a weight that the forward of a module reads."""
        state = self.state
        return self._wholes[path](state.factors.__getitem__, lambda site: base_weight(state, module, site))

    def place_of(self, path: str, module: nn.Module) -> WeightPlace:
        """Where the weight at a path is, in the module whose forward reads it."""
        return weight_place(module, self._wholes[path].site)
