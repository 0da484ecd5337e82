"""dW as a dense matrix, site by site."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx

from tensorpeft.emission.emit import taken
from tensorpeft.emission.module import module
from tensorpeft.emission.named import Code
from tensorpeft.emission.prologue_code import PrologueCode
from tensorpeft.emission.strand import Strand, strands
from tensorpeft.emission.strand_code import ROW, Given, StrandCode
from tensorpeft.language.errors import AdapterError
from tensorpeft.network.network import Group, Term
from tensorpeft.network.shapes import Site
from tensorpeft.planning.plan import Plan, dense_plan
from tensorpeft.runtime import prologue
from tensorpeft.runtime.weights import base_weight

if TYPE_CHECKING:
    from tensorpeft.runtime.adapter import Adapter


class GroupUpdates:
    """The updates at the sites of a group, in the factors' own dtype. They carry gradients where autograd records."""

    def __init__(self, adapter: Adapter, group: Group, task: int | None) -> None:
        self.adapter, self.group, self.task = adapter, group, task
        self.plan = Plan(adapter.network, adapter.plan.regime, (dense_plan(group),), ())
        self.strands = strands(self.plan.groups[0], 1, {})
        self.codes = [_code(strand) for strand in self.strands]

    @cached_property
    def pieces(self) -> list[list[tuple[tuple[Tensor, ...], tuple[int, ...]] | None]]:
        """Of each product's pieces: the tensors, and for each site which one is its own. None stands for the base weight."""
        code = PrologueCode(self.plan)
        planned = self.plan.groups[0]
        stacks = [
            [
                None if p.is_base else code.stack([code.part(self.group, term, strand.met[0].link, p, planned.bundles)])
                for p in strand.met[0].pieces
            ]
            for term, strand in zip(self.group.terms, self.strands, strict=True)
        ]
        factors = tuple(self.adapter.factors[name] for name in code.inputs)
        device = factors[0].device
        indices = tuple(index.on(device) for _, index in code.indices.values())
        rows = prologue.recorded(code.finish(), factors[0].dtype, device, factors, indices).rows
        return [[None if found is None else (rows[found[0]], found[1]) for found in each] for each in stacks]

    def at(self, number: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each product at a site: the update, and which rows and columns of the module's weight it is for."""
        site = self.group.sites[number]
        found = []
        for term, code, pieces in zip(self.group.terms, self.codes, self.pieces, strict=True):
            like = self.adapter.factors[self.adapter.network.blocks[0].name]
            tensors = [self._weight(site, like) if p is None else p[0][p[1][number]] for p in pieces]
            given = {f"p{n}": tensor for n, tensor in enumerate(tensors)}
            given |= {name: index.on(like.device) for name, index in taken(term).items()}
            if self.task is not None:
                given["ids"] = torch.tensor([self.task], device=like.device)
            update = code.forward(*(given[node.name] for node in code.graph.nodes if node.op == "placeholder"))
            found.append((update, *_positions(term, site, like.device)))
        return found

    def _weight(self, site: Site, like: Tensor) -> Tensor:
        attachment = self.adapter.attachment
        if attachment is None:
            raise AdapterError(f"adapter `{self.adapter.name}` is not attached to a model, so there is no `W`")
        return base_weight(self.adapter, attachment.model.get_submodule(site.module), site).to(like)


def _code(strand: Strand) -> fx.GraphModule:
    """From the pieces of a strand of one link to its update (d_out, d_in)."""
    code = Code()
    nodes: dict[str, fx.Node] = {}

    def take(name: str) -> fx.Node:
        if name not in nodes:
            nodes[name] = code.placeholder(name)
        return nodes[name]

    given = Given(lambda n: take(f"p{n}"), take, ids=take("ids") if strand.by_task else None)
    emitted = StrandCode(code, strand, given)
    emitted.use()
    tensor = emitted.tensor(0)
    groups = (*(((ROW,),) if strand.by_task else ()), strand.d_out, strand.d_in)
    node = code.grouped(tensor, groups)
    node = code.call("squeeze", node, 0) if strand.by_task else node
    code.graph.output(node if strand.alpha == 1 else code.call(torch.mul, node, strand.alpha))
    return module(code.graph, "Update")


def _positions(term: Term, site: Site, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows and columns of the module's weight that a product covers at a site."""
    rows = site.row_indices() if term.rows is None else site.row_indices()[term.rows]
    columns = np.arange(site.d_in) if term.columns is None else term.columns
    return torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)
