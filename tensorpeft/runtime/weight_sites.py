"""Emits what builds the tensors of some sites that are no linear modules, from the factors, each time that one of these runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx

from tensorpeft.emission.index import Index
from tensorpeft.emission.lowering import Argument
from tensorpeft.emission.prologue import PrologueCode, Rows
from tensorpeft.language.spec import BASE_WEIGHT
from tensorpeft.network.network import Group, Term
from tensorpeft.planning.chain import Chain, Link, chain
from tensorpeft.planning.orders import Order
from tensorpeft.planning.plan import GroupPlan, Plan
from tensorpeft.runtime import factor_cache as prologue


@dataclass(frozen=True)
class Built:
    """The tensors of one product's links, each (sites, one axis for each of the link's modes), and what multiplies it."""

    term: Term
    chain: Chain
    alpha: float
    tensors: tuple[Tensor, ...]

    def dense(self) -> Tensor:  # shape: (sites, rows, columns)
        """The whole product, of a chain of one link."""
        (link,), (tensor,) = self.chain.links, self.tensors
        order = [link.modes.index(mode) for mode in (*self.term.d_out, *self.term.d_in)]
        rows = self.term.size(self.term.d_out)
        return tensor.permute(0, *(1 + axis for axis in order)).reshape(len(tensor), rows, -1) * self.alpha


class ApartCode:
    """The tensors of the links of a group's products, at all of its sites."""

    def __init__(self, plan: Plan, group: Group, orders: Iterable[Order]) -> None:
        self.group = group
        bundles = tuple((number,) for number in range(len(group.sites)))
        self.chains = tuple(
            chain(group, term, order, 1, bundles, beforehand=True)
            for term, order in zip(group.terms, orders, strict=True)
        )
        blocks = {operand.block.name: operand.block for term in group.terms for operand in term.operands}
        planned = GroupPlan(group, self.chains, bundles, 0)
        code = PrologueCode(Plan(replace(plan.network, blocks=tuple(blocks.values())), plan.regime, (planned,), ()))
        self.tensors = [
            [_OfSites(*code.stack([code.part(group, term, link, _argument(link), bundles)])) for link in each.links]
            for term, each in zip(group.terms, self.chains, strict=True)
        ]
        self.code: fx.GraphModule = code.finish()
        self.inputs = tuple(code.inputs)
        self.indices = tuple(index for _, index in code.indices.values())

    def constants(self) -> Iterator[Index]:
        """What it reads at every call."""
        yield from self.indices
        yield from (tensor.index for tensors in self.tensors for tensor in tensors)

    @property
    def has_base(self) -> bool:
        """Whether the base weight is one of the factors."""
        return BASE_WEIGHT in self.inputs

    def __call__(self, factors: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[Built]:
        """The tensors for factors by the names of their blocks; autograd records how they come about."""
        given = tuple(factors[name] for name in self.inputs)
        device = given[0].device
        indices = tuple(index.on(device) for index in self.indices)
        found = prologue.stacked(self.code, dtype, device, given, (None,) * len(given), indices)
        for term, each, tensors in zip(self.group.terms, self.chains, self.tensors, strict=True):
            yield Built(term, each, each.sign * self.group.scale, tuple(tensor(found) for tensor in tensors))


def _argument(link: Link) -> Argument:
    return Argument(link.operands, tuple((mode,) for mode in link.modes), link.trainable, False)


class _OfSites:
    """Which stack has the tensors of a link, and which of its rows is each site's; several may share one."""

    def __init__(self, stack: int, rows: Rows) -> None:
        self.stack, self.rows, self.index = stack, rows, Index.of(np.array(rows))

    def __call__(self, stacks: tuple[Tensor, ...]) -> Tensor:  # shape: (sites, ...)
        stack = stacks[self.stack]
        if self.rows == tuple(range(len(stack))):
            return stack
        if len({*self.rows}) == 1:
            return stack[self.rows[0]].expand(len(self.rows), *stack.shape[1:])
        return stack.index_select(0, self.index.on(stack.device))
