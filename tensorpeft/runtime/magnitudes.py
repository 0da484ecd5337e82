"""Magnitudes: factors that are divided by the norms of the rows, or columns, of W + dW, which no gradient passes.

DoRA (Liu et al., 2024, arXiv:2402.09353), section 4.3. In dW each such factor counts as one, so that its quotient is what the
norms are to be.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from tensorpeft.model.shape import Site
from tensorpeft.network.network import Group, Operand
from tensorpeft.runtime.base_weight import base_weight
from tensorpeft.runtime.dense import GroupCode, GroupUpdates
from tensorpeft.runtime.factors import key_views
from tensorpeft.runtime.state import State


class Magnitudes:
    """The magnitudes of an adapter, and the code for the matrices of which they are the norms."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.blocks = [block for block in state.network.blocks if block.rule.norm]
        groups = state.network.groups if self.blocks else ()
        self._codes = [GroupCode(state.plan, group) for group in groups if _magnitudes(group)]

    def place(self, device: torch.device) -> None:
        """Put constants on a device."""
        for index in (index for code in self._codes for index in code.constants()):
            index.on(device)

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """What the magnitudes are divided by, of their shapes, by the names of their blocks; ones while there are no weights."""
        factors = self.state.factors
        found = {block.name: torch.ones_like(factors[block.name]) for block in self.blocks}
        if not found or self.state.model is None or any(over.is_meta for over in found.values()):
            return found
        ones = {name: over.clone() for name, over in found.items()}
        views = {b.name: dict(zip(b.keys, key_views(found[b.name], b), strict=True)) for b in self.blocks}
        kind = factors[self.blocks[0].name].device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            for code in self._codes:
                updates = GroupUpdates(
                    self.state, code, None, lambda name: ones[name] if name in ones else factors[name]
                )
                for number, site in enumerate(code.group.sites):
                    change = updates.at(number)
                    whole = change + self._weight(site).to(change)
                    for operand in _magnitudes(code.group):
                        along = whole.norm(dim=0 if operand.modes == ("d_in",) else 1)
                        views[operand.block.name][operand.keys[number]][: len(along)].copy_(along)
        return found

    def _weight(self, site: Site) -> Tensor:  # shape: (d_out, d_in)
        assert self.state.model is not None
        return base_weight(self.state, self.state.model.get_submodule(site.module), site)

    def over_norms(self) -> Callable[[str], Tensor]:
        """The tensors of blocks as they stand in products: magnitudes over the norms, as these are now."""
        found, factors = self.norms(), self.state.factors
        return lambda name: factors[name] / found[name] if name in found else factors[name]

    @torch.no_grad()
    def fill(self) -> None:
        """Set every magnitude to the norms at the start, so that its quotient is one."""
        for name, over in self.norms().items():
            self.state.factors[name].copy_(over)


def _magnitudes(group: Group) -> list[Operand]:
    return [operand for term in group.terms for operand in term.operands if operand.block.rule.norm]
