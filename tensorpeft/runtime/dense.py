"""dW as a dense matrix, site by site."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx

from tensorpeft.emission.chain_code import ROW, ChainCode, ChainInputs
from tensorpeft.emission.contraction import Code
from tensorpeft.emission.emit import taken
from tensorpeft.emission.index import Index
from tensorpeft.emission.intern import module
from tensorpeft.emission.lowering import LoweredChain, lower_chains
from tensorpeft.emission.prologue import PrologueCode
from tensorpeft.language.errors import AdapterError
from tensorpeft.model.shape import Site
from tensorpeft.network.network import Group, Term
from tensorpeft.planning.plan import Plan, dense_plan
from tensorpeft.runtime import factor_cache as prologue
from tensorpeft.runtime.base_weight import base_weight

if TYPE_CHECKING:
    from tensorpeft.runtime.adapter import Adapter


class GroupCode:
    """Emitted code for the updates at the sites of a group, each as a matrix."""

    def __init__(self, planned: Plan, group: Group) -> None:
        self.group = group
        dense = Plan(planned.network, planned.regime, (dense_plan(group),), ())
        cut = lower_chains(dense.groups[0], 1, {})
        self.codes = [_code(chain) for chain in cut]
        self.takes = [[node.name for node in made.graph.nodes if node.op == "placeholder"] for made in self.codes]
        code, bundles = PrologueCode(dense), dense.groups[0].bundles
        # of each product's arguments the stack, and for each site its row; None stands for the base weight
        self.stacks = [
            [
                None if p.is_base else code.stack([code.part(group, term, chain.stages[0].link, p, bundles)])
                for p in chain.stages[0].arguments
            ]
            for term, chain in zip(group.terms, cut, strict=True)
        ]
        self.prologue = code.finish()
        self.inputs = tuple(code.inputs)
        self.indices = tuple(index for _, index in code.indices.values())
        self.taken = [taken(term) for term in group.terms]
        self.kept = [_positions(term, group.sites[0]) for term in group.terms]

    def constants(self) -> Iterator[Index]:
        """What it reads at every call."""
        yield from self.indices
        yield from (index for each in self.taken for index in each.values())
        yield from (index for each in self.kept for index in each or ())


class GroupUpdates:
    """The updates at the sites of a group, in the factors' own dtype. They carry gradients where autograd records.

    ``value`` gives the tensors of blocks, by their names.
    """

    def __init__(self, adapter: Adapter, code: GroupCode, task: int | None, value: Callable[[str], Tensor]) -> None:
        self.adapter, self.code, self.task = adapter, code, task
        factors = tuple(value(name) for name in code.inputs)
        device, over = factors[0].device, (None,) * len(factors)
        indices = tuple(index.on(device) for index in code.indices)
        self.rows = prologue.recorded(code.prologue, factors[0].dtype, device, factors, over, indices).rows

    def at(self, number: int) -> Tensor:  # shape: (d_out, d_in)
        """The update of a site."""
        like = self.adapter.factors[self.adapter.network.blocks[0].name]
        total = None
        for place in range(len(self.code.codes)):
            update = self._product(place, number, like).to(like.dtype)
            total = update if total is None else total + update
        assert total is not None
        return total

    def _product(self, place: int, number: int, like: Tensor) -> Tensor:  # shape: (d_out, d_in)
        """One product, zero where it has nothing."""
        code, site = self.code.codes[place], self.code.group.sites[number]
        stacks = self.code.stacks[place]
        tensors = [self._weight(site, like) if s is None else self.rows[s[0]][s[1][number]] for s in stacks]
        given = {f"p{n}": tensor for n, tensor in enumerate(tensors)}
        given |= {name: index.on(like.device) for name, index in self.code.taken[place].items()}
        if self.task is not None:
            given["ids"] = torch.tensor([self.task], device=like.device)
        update: Tensor = code.forward(*[given[name] for name in self.code.takes[place]])
        if self.code.kept[place] is None:
            return update
        rows, columns = (index.on(like.device) for index in self.code.kept[place] or ())
        return update.new_zeros(site.d_out, site.d_in).index_put((rows[:, None], columns), update)

    def _weight(self, site: Site, like: Tensor) -> Tensor:
        attachment = self.adapter.attachment
        if attachment is None:
            raise AdapterError(f"adapter `{self.adapter.name}` is not attached to a model, so there is no `W`")
        return base_weight(self.adapter, attachment.model.get_submodule(site.module), site).to(like)


def _code(chain: LoweredChain) -> fx.GraphModule:
    """From the arguments of a chain of one link to its update (d_out, d_in)."""
    code = Code()
    nodes: dict[str, fx.Node] = {}

    def take(name: str) -> fx.Node:
        if name not in nodes:
            nodes[name] = code.placeholder(name)
        return nodes[name]

    given = ChainInputs(lambda n: take(f"p{n}"), take, ids=take("ids") if chain.by_task else None)
    emitted = ChainCode(code, chain, given)
    emitted.use()
    tensor = emitted.tensor(0)
    groups = (*(((ROW,),) if chain.by_task else ()), chain.d_out, chain.d_in)
    node = code.grouped(tensor, groups)
    node = code.call("squeeze", node, 0) if chain.by_task else node
    code.graph.output(node if chain.alpha == 1 else code.call(torch.mul, node, chain.alpha))
    return module(code.graph, "Update")


def _positions(term: Term, site: Site) -> tuple[Index, Index] | None:
    """The rows and columns of a site's matrix that a product covers; None: all of them."""
    if term.rows is None and term.columns is None:
        return None
    rows, columns = (np.arange(n) if k is None else k for n, k in ((site.d_out, term.rows), (site.d_in, term.columns)))
    return Index.of(rows), Index.of(columns)
