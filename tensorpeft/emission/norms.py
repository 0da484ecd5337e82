"""Emits the norms of the rows, or columns, of W + dW (``planning.norms`` has the formula), for all sites in one function."""

from __future__ import annotations

from collections.abc import Iterable
from operator import getitem

import numpy as np
import torch
from torch import fx

from tensorpeft.emission import ops
from tensorpeft.emission.index import Index
from tensorpeft.emission.intern import module
from tensorpeft.emission.lowering import Argument
from tensorpeft.emission.named_tensor import Modes
from tensorpeft.emission.prologue import KEY_ORDER, PrologueCode
from tensorpeft.network.network import Block, Term
from tensorpeft.planning.chain import Chain, Link
from tensorpeft.planning.norms import NormPlan


class NormCode(PrologueCode):
    """The function that computes what magnitudes are divided by.

    It takes a dtype, the blocks ``inputs``, for each plan first W at each of its sites (kept, summed) and then the squared norms
    of these (sites, kept), and last some indices. Of a dense plan it takes the norms themselves. It returns a tensor of the
    shape of each magnitude.
    """

    def __init__(self, plans: tuple[NormPlan, ...], magnitudes: Iterable[Block]) -> None:
        used = (
            term.operands[i] for p in plans for term, each in p.products for link in each.links for i in link.operands
        )
        super().__init__(dict.fromkeys(operand.block.name for operand in used))
        matrices = [() if p.is_dense else range(len(p.group.sites)) for p in plans]
        names = [(*(f"w{i}_{n}" for i in sites), f"known{n}") for n, sites in enumerate(matrices)]
        given = [[self.graph.placeholder(name) for name in each] for each in names]
        found = [
            known if p.is_dense else self._narrow(p, matrices, known)
            for p, (*matrices, known) in zip(plans, given, strict=True)
        ]
        self.graph.output(tuple(self._table(block, plans, found) for block in magnitudes))
        self.code = module(self.graph, "Norms")

    def _narrow(self, planned: NormPlan, matrices: list[fx.Node], squares: fx.Node) -> fx.Node:  # shape: (sites, kept)
        products = list(planned.products)
        n = len(planned.halves)
        sides = [self._sides(planned, term, each) for term, each in products[:n]]
        scale = self._scale(planned, products[n:])
        square = self._call(torch.mul, scale, scale) if isinstance(scale, fx.Node) else scale * scale
        found = squares if square == 1 else self._call(torch.mul, squares, square)
        if sides:
            kept, summed = (each[0] if n == 1 else self._call(torch.cat, each, -1) for each in zip(*sides, strict=True))
            of_site = self._call("unbind", summed)
            own = [self._call(ops.times, w, self._call(getitem, of_site, i)) for i, w in enumerate(matrices)]
            a: fx.Node | float = self._call("unsqueeze", scale, -1) if isinstance(scale, fx.Node) else scale
            twice = self._call(torch.mul, a, 2) if isinstance(a, fx.Node) else 2 * a
            cross = self._call(torch.mul, self._call(torch.stack, tuple(own)), twice)
            gram = self._call(torch.bmm, kept, self._call(torch.bmm, self._call("transpose", summed, 1, 2), summed))
            entries = self._call(torch.mul, kept, self._call(torch.add, gram, cross))
            found = self._call(torch.add, found, self._call("sum", entries, -1))
        return self._call("sqrt", self._call("clamp", found, 0))

    def _sides(self, planned: NormPlan, term: Term, each: Chain) -> tuple[fx.Node, fx.Node]:
        """The two sides of the cut, (sites, kept, cut) and (sites, summed, cut)."""
        (first, second), site = each.links, planned.group.sites[0]
        inside = self._of_sites(planned, term, first, (term.d_in, first.new))
        outside = self._of_sites(planned, term, second, (term.d_out, first.new))
        if term.columns is not None:
            inside = self._call(ops.spread, inside, self._positions(term.columns), site.d_in)
        if term.rows is not None:
            outside = self._call(ops.spread, outside, self._positions(term.rows), site.d_out)
        if each.sign * planned.group.scale != 1:
            outside = self._call(torch.mul, outside, each.sign * planned.group.scale)
        return (outside, inside) if planned.side == "d_out" else (inside, outside)

    def _scale(self, planned: NormPlan, products: list[tuple[Term, Chain]]) -> fx.Node | float:
        """The factor of the rows, or columns, of W, its own 1 included: of shape (sites, kept), or (sites, 1), or a number."""
        scale: fx.Node | float = 1 + planned.plain
        for term, each in products:
            (link,) = each.links
            node = self._of_sites(planned, term, link, tuple((mode,) for mode in term.d_out if mode in link.modes))
            if link.modes:
                sites = len(planned.group.sites)
                one = tuple(term.sizes[mode] if mode in link.modes else 1 for mode in term.d_out)
                node = self._call("reshape", node, (sites, *one))
                node = self._call("expand", node, (sites, *(term.sizes[mode] for mode in term.d_out)))
            node = self._call("reshape", node, (len(planned.group.sites), -1))
            alpha = each.sign * planned.group.scale
            scale = self._call(torch.add, node if alpha == 1 else self._call(torch.mul, node, alpha), scale)
        return scale

    def _of_sites(self, planned: NormPlan, term: Term, link: Link, axes: tuple[Modes, ...]) -> fx.Node:
        """A link's tensor at each site, (sites, *axes)."""
        sites = planned.group.sites
        bundles = tuple((number,) for number in range(len(sites)))
        part = self.part(planned.group, term, link, Argument(link.operands, axes, link.trainable, False), bundles)
        node = self._call(ops.cast, part.node, self.dtype)
        if any(len(axis) != 1 for axis in axes):
            node = self._call("reshape", node, (-1, *part.shape))
        if part.count == 1:
            return self._call("expand", node, (len(sites), *part.shape))
        return self._picked(node, part.count, part.rows)

    def _positions(self, positions: np.ndarray) -> fx.Node:
        return self._index(positions.tobytes(), lambda: Index.of(positions))

    def _table(self, block: Block, plans: tuple[NormPlan, ...], found: list[fx.Node]) -> fx.Node:
        """The norms in the shape of a magnitude; one where it has a number that no site uses."""
        number = {key: row for row, key in enumerate(block.keys)}
        parts = [
            (node, planned, tuple(number[key] for key in operand.keys))
            for node, planned in zip(found, plans, strict=True)
            for operand in planned.magnitudes
            if operand.block.name == block.name
        ]
        keys = [i for mode in KEY_ORDER for i, axis in enumerate(block.axes) if axis.mode == mode]
        order = [*keys, *(i for i in range(len(block.axes)) if i not in keys)]
        size, (table, planned, rows) = block.axes[order[-1]].size, parts[0]
        if rows != tuple(range(len(number))) or planned.kept != size:
            table = self._call("new_ones", table, (len(number), size))
            for node, _, rows in parts:
                index = self._index(rows, lambda rows=rows: Index.of(np.array(rows)))  # type: ignore[misc]
                table = self._call(ops.with_entries, table, index, node)
        table = self._call("reshape", table, tuple(block.axes[i].size for i in order))
        return self._call("permute", table, tuple(order.index(i) for i in range(len(order))))
