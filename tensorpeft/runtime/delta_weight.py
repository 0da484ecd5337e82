"""dW of a weight as a dense matrix: what is merged or told, and what a weight that a forward reads becomes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from tensorpeft.emission.index import Index
from tensorpeft.language.spec import BASE_WEIGHT
from tensorpeft.model.shape import Rows, Site
from tensorpeft.network.network import Group, Network, Operand, Term
from tensorpeft.planning.weight_sites import dense_chain, some_sites
from tensorpeft.runtime.site_tensors import SiteTensors, Value

Base = Callable[[Site], Tensor]  # W at a site, (d_out, d_in), without anything that was merged


class DeltaWeight:
    """The update of one weight, by the sites that lie in it: parts of a fused one, experts of a stacked one.

    Nothing is made of any other weight.
    """

    def __init__(self, network: Network, path: str) -> None:
        self._parts = _parts(network, path)
        self._like = network.blocks[0].name  # whose dtype and device dW has
        self._codes: dict[int | None, list[_DensePart]] = {}
        self.site = self._parts[0].sites[0]
        numbers = [site.expert for part in self._parts for site in part.sites if site.expert is not None]
        stacked = bool(numbers) and self.site.kind == "parameter"  # experts may be modules of their own
        self.shape = (*([1 + max(numbers)] if stacked else []), self.site.module_d_out, self.site.d_in)

    def constants(self) -> Iterator[Index]:
        """The positions that it reads at every call, where there are no tasks."""
        return (index for part in self._code(None) for index in part.constants())

    def __call__(self, value: Value, base: Base, task: int | None = None) -> Tensor:
        """DW of shape (d_out, d_in), or (experts, d_out, d_in), zero in rows of no site.

        It has the factors' dtype, and carries gradients where autograd records. ``value`` gives the tensors of blocks as they
        stand in products (magnitudes over the norms), ``base`` the weight at a site; a spec with tasks needs one of them.
        """
        like = value(self._like)
        products = (product for part in self._code(task) for product in part(value, base, like))
        total = next(products)
        for product in products:
            total = total + product
        return total

    def _code(self, task: int | None) -> list[_DensePart]:
        if task not in self._codes:
            groups = (part if task is None else _of_task(part, task) for part in self._parts)
            self._codes[task] = [_DensePart(group, self.shape) for group in groups]
        return self._codes[task]


def _parts(network: Network, path: str) -> list[Group]:
    """The sites of a weight: of each group, and of each part of a fused weight, those of its experts."""
    found = []
    for group in network.groups:
        by_rows: dict[Rows | None, list[int]] = defaultdict(list)
        for number, site in enumerate(group.sites):
            if site.path == path:
                by_rows[site.rows].append(number)
        found += [some_sites(group, numbers) for numbers in by_rows.values()]
    return found


def _of_task(group: Group, task: int) -> Group:
    """A group as one task has it: the mode is there, of size 1."""

    def operand(old: Operand) -> Operand:
        if "task" not in old.modes:
            return old
        sizes = tuple(1 if mode == "task" else size for mode, size in zip(old.modes, old.sizes, strict=True))
        take = tuple(_positions(old, task))
        return replace(old, sizes=sizes, take=take)

    terms = (
        replace(term, operands=tuple(map(operand, term.operands)), sizes={**term.sizes, "task": 1})
        for term in group.terms
    )
    return replace(group, terms=tuple(terms))


def _positions(operand: Operand, task: int) -> Iterator[Sequence[int] | None]:
    """For each free axis of an operand what is taken of it for one task, which an axis may hold with other modes."""
    atoms = list(zip(operand.modes, operand.sizes, strict=True))
    for axis, some in zip(operand.block.free_axes, operand.take, strict=True):
        length = axis.size if some is None else len(some)
        mine: list[tuple[str, int]] = []
        while atoms and prod([size for _, size in mine]) * atoms[0][1] <= length:
            mine.append(atoms.pop(0))
        modes = [mode for mode, _ in mine]
        if "task" not in modes:
            yield some
            continue
        grid = np.arange(length).reshape([size for _, size in mine])
        found = grid.take(task, modes.index("task")).ravel()
        yield tuple(found.tolist() if some is None else np.asarray(some)[found].tolist())


class _DensePart:
    """The products of sites that lie alike in a weight: in the same rows, each in the matrix of its expert."""

    def __init__(self, group: Group, shape: tuple[int, ...]) -> None:
        self._sites, self._is_stacked = group.sites, len(shape) == 3
        self._tensors = SiteTensors(group, tuple(dense_chain(group, term) for term in group.terms))
        self._spreads = [tuple(spreads(term, group.sites, shape)) for term in group.terms]

    def constants(self) -> Iterator[Index]:
        yield from self._tensors.constants()
        yield from (spread.positions for each in self._spreads for spread in each)

    def __call__(self, value: Value, base: Base, like: Tensor) -> Iterator[Tensor]:
        """Each product at these sites, of the shape of dW, and zero elsewhere."""
        known: Value = value
        if self._tensors.has_base:
            weight = torch.stack([base(site).to(like) for site in self._sites])
            known = lambda name: weight if name == BASE_WEIGHT else value(name)  # noqa: E731
        for built, each in zip(self._tensors(known, like.dtype), self._spreads, strict=True):
            update = built.dense()
            for spread in each:
                update = spread(update)
            yield update if self._is_stacked else update[0]


def spreads(term: Term, sites: tuple[Site, ...], shape: tuple[int, ...]) -> Iterator[Spread]:
    """How an update (sites, rows, columns) comes to where it belongs in the weight's matrices, with zero elsewhere."""
    rows = sites[0].row_indices() if term.rows is None else sites[0].row_indices()[term.rows]
    yield from spread_along(2, term.columns, shape[-1])
    yield from spread_along(1, rows, shape[-2])
    if len(shape) == 3:
        yield from spread_along(0, np.array([site.expert for site in sites]), shape[0])


def spread_along(axis: int, positions: np.ndarray | None, size: int) -> Iterator[Spread]:
    """The spread of an axis to positions of a longer one; none where it is that one already (None: all positions)."""
    if positions is not None and not (len(positions) == size and np.array_equal(positions, np.arange(size))):
        yield Spread(axis, Index.of(positions), size)


@dataclass(frozen=True)
class Spread:
    """The numbers of a tensor go to some positions of a longer axis."""

    axis: int
    positions: Index
    size: int

    def __call__(self, tensor: Tensor) -> Tensor:
        empty = tensor.new_zeros([*tensor.shape[: self.axis], self.size, *tensor.shape[self.axis + 1 :]])
        return empty.index_add(self.axis, self.positions.on(tensor.device), tensor)
