"""Magnitudes: factors that are divided by the norms of the rows, or columns, of W + dW, which no gradient passes.

DoRA (Liu et al., 2024, arXiv:2402.09353), section 4.3. In dW each such factor counts as one, so that its quotient is what the
norms are to be. ``planning.norms`` says how the norms are taken, and by which formula.

Where dW nearly cancels a row of W, the formula subtracts large squares from each other: the norm has the relative error
eps * (|W_i| / |W_i + dW_i|)^2. What comes out negative counts as zero. That is as much as can be said of such a row: the
forward pass adds W x and dW x in the same precision, or less, and a row whose norm is lost has no direction left either.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tensorpeft.emission.index import Index
from tensorpeft.language.spec import SITE_MODES
from tensorpeft.network.network import Block
from tensorpeft.planning.norms import NormPlan
from tensorpeft.runtime.base_matrices import BaseMatrices
from tensorpeft.runtime.base_weight import attached_weight
from tensorpeft.runtime.delta_weight import DeltaWeight, spread_along
from tensorpeft.runtime.site_tensors import ProductTensors, SiteTensors, Value, not_cast, quotient
from tensorpeft.runtime.state import State


class Magnitudes:
    """The magnitudes of an adapter, and the code for the norms that they are divided by."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.blocks = [block for block in state.network.blocks if block.rule.norm]
        plans = state.plan.norms if self.blocks else ()
        self._groups = [(_DenseNorms if each.is_dense else _NarrowNorms)(state, each) for each in plans]
        self._tables = {block.name: _Table(block, plans) for block in self.blocks}

    def place(self, device: torch.device) -> None:
        """Put constants on a device; the base's weights may have moved too."""
        self.forget()
        for index in (index for each in (*self._groups, *self._tables.values()) for index in each.constants()):
            index.on(device)

    def forget(self) -> None:
        """Drop what is known of the base's weights."""
        for each in self._groups:
            each.base.forget()

    @torch.no_grad()
    def norms(self) -> dict[str, Tensor]:
        """What the magnitudes are divided by, of their shapes, by the names of their blocks; ones while there are no weights."""
        factors = self.state.factors
        ones = {block.name: torch.ones_like(factors[block.name]) for block in self.blocks}
        if not ones or self.state.model is None or any(each.is_meta for each in ones.values()):
            return ones
        like = factors[self.blocks[0].name]
        wide = torch.empty((), dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)

        def value(name: str) -> Tensor:
            return ones[name] if name in ones else factors[name]

        with not_cast(like.device):
            found = [each(value, wide) for each in self._groups]
            return {name: self._tables[name](found, over) for name, over in ones.items()}

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


class _NarrowNorms:
    """The norms at a group of sites, by the two sides of a narrow cut."""

    def __init__(self, state: State, planned: NormPlan) -> None:
        self.base = BaseMatrices(state, planned.group.sites, planned.side)
        self._planned, self._n_halves = planned, len(planned.halves)
        self._tensors = SiteTensors(planned.group, (*planned.halves, *planned.scales))
        site = planned.group.sites[0]
        self._spreads = [
            (tuple(spread_along(1, term.rows, site.d_out)), tuple(spread_along(1, term.columns, site.d_in)))
            for term in planned.group.terms[: self._n_halves]
        ]

    def constants(self) -> Iterator[Index]:
        yield from self._tensors.constants()
        yield from (spread.positions for pair in self._spreads for each in pair for spread in each)

    def __call__(self, value: Value, like: Tensor) -> Tensor:  # shape: (sites, kept)
        products = list(self._tensors(value, like.dtype))
        matrices, squares = self.base(like)
        scale = 1 + self._planned.plain + sum(map(_scale, products[self._n_halves :]))
        found = squares * scale**2
        if self._n_halves:
            kept, summed = self._sides(products[: self._n_halves])
            own = torch.stack([torch.mm(matrix, side) for matrix, side in zip(matrices, summed.unbind(), strict=True)])
            if isinstance(scale, Tensor):
                own = own * scale.unsqueeze(-1)
            gram = torch.bmm(kept, torch.bmm(summed.mT, summed))
            found = found + (kept * gram.add_(own, alpha=2)).sum(-1)
        return found.clamp_(min=0).sqrt_()

    def _sides(self, products: list[ProductTensors]) -> tuple[Tensor, Tensor]:  # shapes: (sites, kept or summed, cut)
        """The two sides of the cut, of all products beside each other."""
        pairs = []
        for built, (rows, columns) in zip(products, self._spreads, strict=True):
            term, cut = built.term, built.chain.links[0].new
            first, second = built.matrices((*term.d_in, *cut), (*term.d_out, *cut))
            inside = first.reshape(len(first), term.size(term.d_in), -1)
            outside = second.reshape(len(second), term.size(term.d_out), -1)
            for spread in columns:
                inside = spread(inside)
            for spread in rows:
                outside = spread(outside)
            pairs.append((outside if built.alpha == 1 else outside * built.alpha, inside))
        out, into = (sides[0] if len(sides) == 1 else torch.cat(sides, -1) for sides in zip(*pairs, strict=True))
        return (out, into) if self._planned.side == "d_out" else (into, out)


def _scale(built: ProductTensors) -> Tensor:  # shape: (sites, kept), or (sites, 1)
    """What a product multiplies the rows, or columns, of W by."""
    term, (link,), (tensor,) = built.term, built.chain.links, built.tensors
    order = [link.modes.index(mode) for mode in term.d_out if mode in link.modes]
    sizes = [term.sizes[mode] if mode in link.modes else 1 for mode in term.d_out]
    tensor = tensor.permute(0, *(1 + axis for axis in order)).reshape(len(tensor), *sizes)
    if order:
        tensor = tensor.expand(len(tensor), *(term.sizes[mode] for mode in term.d_out))
    return tensor.reshape(len(tensor), -1) * built.alpha


class _DenseNorms:
    """The norms at a group of sites of which no cut is narrow enough: dW is made, of one weight at a time."""

    def __init__(self, state: State, planned: NormPlan) -> None:
        sites = planned.group.sites
        self.base, self._side = BaseMatrices(state, sites, planned.side), planned.side
        self._weight = attached_weight(state)
        self._sites: dict[str, list[tuple[int, Index]]] = {}  # of each weight: the sites in it, and their rows
        for number, site in enumerate(sites):
            self._sites.setdefault(site.path, []).append((number, Index.of(site.row_indices())))
        self._deltas = {path: DeltaWeight(state.network, path) for path in self._sites}

    def constants(self) -> Iterator[Index]:
        yield from (index for delta in self._deltas.values() for index in delta.constants())
        yield from (rows for sites in self._sites.values() for _, rows in sites)

    def __call__(self, value: Value, like: Tensor) -> Tensor:  # shape: (sites, kept)
        matrices, _ = self.base(like)
        found: dict[int, Tensor] = {}
        for path, sites in self._sites.items():
            change = self._deltas[path](value, self._weight).to(like.dtype)
            for number, rows in sites:
                mine = change.index_select(0, rows.on(change.device))
                whole = matrices[number] + (mine if self._side == "d_out" else mine.mT)
                found[number] = torch.linalg.vector_norm(whole, dim=1)
        return torch.stack([found[number] for number in range(len(matrices))])


class _Table:
    """How the norms at groups of sites make a tensor like a block; ones where it has numbers that no site uses."""

    def __init__(self, block: Block, plans: tuple[NormPlan, ...]) -> None:
        row = {key: number for number, key in enumerate(block.keys)}
        self._rows = [  # for each group that has the block: its number, and which key is each site's
            (number, Index.of(np.array([row[key] for key in operand.keys])), [row[key] for key in operand.keys])
            for number, planned in enumerate(plans)
            for operand in planned.magnitudes
            if operand.block is block
        ]
        order = [i for i, axis in enumerate(block.axes) if axis.labels is not None]
        order.sort(key=lambda i: (*SITE_MODES, "site").index(block.axes[i].mode))
        order += [i for i in range(len(block.axes)) if i not in order]
        self._grid = [block.axes[i].size for i in order]
        self._back = [order.index(i) for i in range(len(order))]
        self._shape = len(block.keys), self._grid[-1]

    def constants(self) -> Iterator[Index]:
        return (index for _, index, _ in self._rows)

    def __call__(self, found: list[Tensor], ones: Tensor) -> Tensor:  # of each group (sites, kept) -> the block's shape
        number, _, rows = self._rows[0]
        if rows == list(range(self._shape[0])) and found[number].shape == self._shape:
            table = found[number].to(ones.dtype)
        else:
            table = ones.new_ones(self._shape)
            for number, index, _ in self._rows:
                part = found[number].to(ones.dtype)
                table.narrow(1, 0, part.shape[1]).index_copy_(0, index.on(table.device), part)
        return table.view(self._grid).permute(self._back)
