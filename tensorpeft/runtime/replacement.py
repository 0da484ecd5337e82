"""What an adapter does at sites that are no linear modules. Each of its programs is built when it is first asked for."""

from __future__ import annotations

from collections import defaultdict
from threading import Lock, get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tensorpeft.runtime.base_weight import Held, base_weight, held
from tensorpeft.runtime.delta_weight import DeltaWeight
from tensorpeft.runtime.factor_cache import is_traced
from tensorpeft.runtime.pairs import PairUpdate

if TYPE_CHECKING:
    from tensorpeft.runtime.adapter import Adapter


class Apart:
    """The updates of convolutions, embeddings and parameters."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._pairs = {
            site.path: PairUpdate(adapter, planned, number)
            for planned in adapter.plan.groups
            for number, site in enumerate(planned.group.sites)
            if site.kind in ("conv", "embedding")
        }
        paths = {site.path: None for site in adapter.sites if site.kind == "parameter"}
        self._wholes = {path: DeltaWeight(adapter.network, path) for path in paths}
        self._replaced = {path: _Turn() for path in paths}

    def place(self, device: torch.device) -> None:
        """Put constants on a device."""
        updates: list[PairUpdate | DeltaWeight] = [*self._pairs.values(), *self._wholes.values()]
        for index in (index for update in updates for index in update.constants()):
            index.on(device)

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
        return self._pairs[path](module, x, y)

    def replace(self, path: str, module: nn.Module) -> None:
        """Let a module find, in place of a weight, the weight with the update added.

        The weight is hidden, not changed: an attribute of a module's own comes before its parameters. Another thread that runs
        the module waits until it is restored.
        """
        self._replaced[path].take()
        try:
            factors, delta = self.adapter.factors, self._wholes[path]
            change = delta(factors.__getitem__, lambda site: base_weight(self.adapter, module, site))
            weight = held(module, self._wholes[path].site)
            now: Any = weight.parameter
            own = weight.module.__dict__
            own.setdefault(_kept(weight), own.get(weight.name))  # a replica for several devices has its weights here
            own[weight.name] = now + weight.stored(change).to(now)
        except BaseException:
            self.restore(path, module)
            raise

    def restore(self, path: str, module: nn.Module) -> None:
        """Let the module find its weight again."""
        if self._replaced[path].is_mine:
            weight = held(module, self._wholes[path].site)
            own = weight.module.__dict__
            if _kept(weight) in own:  # the first of several adapters that did
                own[weight.name] = own.pop(_kept(weight))
                if own[weight.name] is None:
                    del own[weight.name]
            self._replaced[path].give()


def _kept(weight: Held) -> str:
    """Where a module keeps what it found before."""
    return f"{weight.name} of the base"


class _Turn:
    """Lets one thread after the other do something; a thread that has the turn may take it again."""

    def __init__(self) -> None:
        self._lock, self._thread = Lock(), 0

    @property
    def is_mine(self) -> bool:
        return is_traced() or self._thread == get_ident()

    def take(self) -> None:
        if not self.is_mine:
            self._lock.acquire()
            self._thread = get_ident()

    def give(self) -> None:
        if not is_traced():
            self._thread = 0
            self._lock.release()
