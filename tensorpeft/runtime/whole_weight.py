"""dW of a whole weight, all its parts and experts at once: what is merged, and what a weight that a forward reads becomes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tensorpeft.emission.index import Index
from tensorpeft.language.errors import AdapterError
from tensorpeft.language.spec import BASE_WEIGHT
from tensorpeft.model.shape import Rows, Site
from tensorpeft.network.network import Group, Term
from tensorpeft.planning.orders import Order
from tensorpeft.planning.weight_sites import some_sites
from tensorpeft.runtime.base_weight import base_weight
from tensorpeft.runtime.state import State
from tensorpeft.runtime.weight_sites import ApartCode


class WholeUpdate:
    """The update of one weight of a kind other than linear, by the sites that lie in it."""

    def __init__(self, state: State, path: str) -> None:
        self.state = state
        self.codes = [_code(state, group, numbers) for group, numbers in _parts(state, path)]
        sites = [site for code in self.codes for site in code.group.sites]
        self.site: Site = sites[0]
        experts = [1 + site.expert for site in sites if site.expert is not None]
        self.shape = (*([max(experts)] if experts else []), self.site.module_d_out, self.site.d_in)
        self._spreads = [
            [_spreads(term, code.group.sites, self.shape) for term in code.group.terms] for code in self.codes
        ]

    def constants(self) -> Iterator[Index]:
        """What it reads at every call."""
        for code, spreads in zip(self.codes, self._spreads, strict=True):
            yield from code.constants()
            yield from (spread.positions for each in spreads for spread in each)

    def matrix(self, module: nn.Module | None) -> Tensor:  # shape: (d_out, d_in), or (experts, d_out, d_in)
        """DW in the factors' dtype, of a weight of a module. It carries gradients where autograd records."""
        products = [
            product
            for code, spreads in zip(self.codes, self._spreads, strict=True)
            for product in self._products(code, spreads, module)
        ]
        total = products[0]
        for product in products[1:]:
            total = total + product
        return total

    def _products(self, code: ApartCode, spreads: list[tuple[_Spread, ...]], module: nn.Module | None) -> list[Tensor]:
        """Each product at the sites of one group, zero where it has no sites."""
        factors = {name: self.state.factors[name] for name in code.inputs if name != BASE_WEIGHT}
        like = next(iter(factors.values()))
        if code.has_base:
            if module is None:
                raise AdapterError(f"adapter `{self.state.name}` is not attached to a model, so there is no `W`")
            base = [base_weight(self.state, module, site) for site in code.group.sites]
            factors[BASE_WEIGHT] = torch.stack(base).to(like)
        found = []
        for built, each in zip(code(factors, like.dtype), spreads, strict=True):
            update = built.dense()
            for spread in each:
                update = spread(update)
            found.append(update[0] if len(self.shape) == 2 else update)
        return found


def _parts(state: State, path: str) -> list[tuple[Group, tuple[int, ...]]]:
    """The sites of a weight: of each group, and of each part of a fused weight, those of its experts."""
    found = []
    for group in state.network.groups:
        by_rows: dict[Rows | None, list[int]] = defaultdict(list)
        for number, site in enumerate(group.sites):
            if site.path == path:
                by_rows[site.rows].append(number)
        found += [(group, tuple(numbers)) for numbers in by_rows.values()]
    return found


def _code(state: State, group: Group, numbers: tuple[int, ...]) -> ApartCode:
    return ApartCode(state.plan, some_sites(group, numbers), (_everything(term) for term in group.terms))


def _everything(term: Term) -> Order:
    return (tuple(range(len(term.operands))),)


def _spreads(term: Term, sites: tuple[Site, ...], shape: tuple[int, ...]) -> tuple[_Spread, ...]:
    """How an update (sites, rows, columns) comes to where it belongs in the weight's matrices, with zero elsewhere."""
    rows = sites[0].row_indices() if term.rows is None else sites[0].row_indices()[term.rows]
    wanted = [(2, term.columns, shape[-1]), (1, rows, shape[-2])]
    if len(shape) == 3:
        wanted.append((0, np.array([site.expert for site in sites]), shape[0]))
    return tuple(
        _Spread(axis, Index.of(positions), size)
        for axis, positions, size in wanted
        if positions is not None and not (len(positions) == size and np.array_equal(positions, np.arange(size)))
    )


@dataclass(frozen=True)
class _Spread:
    """The numbers of a tensor go to some positions of a longer axis."""

    axis: int
    positions: Index
    size: int

    def __call__(self, tensor: Tensor) -> Tensor:
        empty = tensor.new_zeros([*tensor.shape[: self.axis], self.size, *tensor.shape[self.axis + 1 :]])
        return empty.index_add(self.axis, self.positions.on(tensor.device), tensor)
