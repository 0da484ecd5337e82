"""Magnitudes: factors that are divided by the norms of the rows, or columns, of W + dW, which no gradient passes.

DoRA (Liu et al., 2024, arXiv:2402.09353), section 4.3. In dW each such factor counts as one, so that its quotient is what the
norms are to be. ``planning.norms`` says how the norms are taken, and by which formula.

Where dW nearly cancels a row of W, the formula subtracts large squares from each other: the norm has the relative error
eps * (|W_i| / |W_i + dW_i|)^2. What comes out negative counts as zero. That is as much as can be said of such a row: the
forward pass adds W x and dW x in the same precision, or less, and a row whose norm is lost has no direction left either.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tensorpeft.emission.index import Index
from tensorpeft.emission.norms import NormCode
from tensorpeft.planning.norms import NormPlan
from tensorpeft.runtime.base_matrices import BaseMatrices
from tensorpeft.runtime.base_weight import attached_weight
from tensorpeft.runtime.delta_weight import DeltaWeight
from tensorpeft.runtime.site_tensors import Value, not_cast, quotient
from tensorpeft.runtime.state import State


class Magnitudes:
    """The magnitudes of an adapter, and the code for the norms that they are divided by."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.blocks = [block for block in state.network.blocks if block.rule.norm]
        self._names = {block.name for block in self.blocks}
        plans = state.plan.norms if self.blocks else ()
        self._code = NormCode(plans, self.blocks)
        self._indices = tuple(index for _, index in self._code.indices.values())
        self._base = [BaseMatrices(state, each.group.sites, each.side) for each in plans]
        self._dense = [_DenseNorms(state, each) if each.is_dense else None for each in plans]

    def place(self, device: torch.device) -> None:
        """Put constants on a device; the base's weights may have moved too."""
        self.forget()
        dense = (index for each in self._dense if each is not None for index in each.constants())
        for index in (*self._indices, *dense):
            index.on(device)

    def forget(self) -> None:
        """Drop what is known of the base's weights."""
        for base in self._base:
            base.forget()

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """What the magnitudes are divided by, of their shapes, by the names of their blocks; ones while there are no weights."""
        if not self.blocks:
            return {}
        factors = self.state.factors
        like = factors[self.blocks[0].name]
        if self.state.model is None or like.is_meta:
            return {name: torch.ones_like(factors[name]) for name in self._names}
        dtype = torch.promote_types(like.dtype, torch.float32)
        with not_cast(like.device):
            given = [self._alone(name) for name in self._code.inputs]
            for base, dense in zip(self._base, self._dense, strict=True):
                matrices, squares = base(dtype, like.device)
                given += [dense(matrices, self._alone)] if dense is not None else [*matrices, squares]
            found = self._code.code.forward(dtype, *given, *(index.on(like.device) for index in self._indices))
        return {block.name: norms for block, norms in zip(self.blocks, found, strict=True)}

    def _alone(self, name: str) -> Tensor:
        """The tensor of a block as it stands in the W + dW of which there are norms: a magnitude counts as one."""
        factor = self.state.factors[name]
        return torch.ones_like(factor) if name in self._names else factor

    def over_norms(self) -> Value:
        """The tensors of blocks as they stand in products: magnitudes over the norms, as these are now."""
        self.forget()
        found, factors = self.norms(), self.state.factors
        return lambda name: quotient(factors[name], found[name]) if name in found else factors[name]

    @torch.no_grad()
    def fill(self) -> None:
        """Set every magnitude to the norms at the start, so that its quotient is one."""
        self.forget()
        for name, over in self.norms().items():
            self.state.factors[name].copy_(over)


class _DenseNorms:
    """The norms at a group of sites of which no cut is narrow enough: dW is made, of one weight at a time."""

    def __init__(self, state: State, planned: NormPlan) -> None:
        self._side, self._weight = planned.side, attached_weight(state)
        self._sites: dict[str, list[tuple[int, Index]]] = {}  # of each weight: the sites in it, and their rows
        for number, site in enumerate(planned.group.sites):
            self._sites.setdefault(site.path, []).append((number, Index.of(site.row_indices())))
        self._deltas = {path: DeltaWeight(state.network, path) for path in self._sites}

    def constants(self) -> list[Index]:
        """The positions that it reads at every call."""
        of_deltas = [index for delta in self._deltas.values() for index in delta.constants()]
        return [*of_deltas, *(rows for sites in self._sites.values() for _, rows in sites)]

    def __call__(self, matrices: list[Tensor], value: Value) -> Tensor:  # shapes: (kept, summed) each -> (sites, kept)
        found: dict[int, Tensor] = {}
        for path, sites in self._sites.items():
            change = self._deltas[path](value, self._weight)
            for number, rows in sites:
                mine = change.index_select(0, rows.on(change.device))
                whole = (mine if self._side == "d_out" else mine.mT) + matrices[number].to(change.device)
                found[number] = torch.linalg.vector_norm(whole, dim=1)
        return torch.stack([found[number] for number in range(len(matrices))])
