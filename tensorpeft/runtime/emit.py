"""Plan -> torch code, through torch.fx.

Two kinds of functions are emitted. The **prologue** takes the stored blocks and returns *stacks*: for each link its tensor at
every site, stacked over the first axis. A **site program** takes an activation, the base's output and the tensors of one site,
and returns the output with the update added.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from tensorpeft.network.network import Group
from tensorpeft.network.shapes import Rows, Site
from tensorpeft.planning.plan import Plan
from tensorpeft.runtime.prologue_code import PrologueCode
from tensorpeft.runtime.site_code import site_program


@dataclass(frozen=True)
class Piece:
    """Where a site finds the tensor of a link: which stack, and which row of it."""

    stack: int
    row: int


@dataclass(frozen=True)
class Call:
    """What happens at one site: its program, and what it is given.

    The program's arguments are x, y, the task ids if ``by_task``, the base weight if ``by_base``, the kept columns and rows if
    masked (``indices``), and the pieces in order.
    """

    site: Site
    code: fx.GraphModule
    by_task: bool
    by_base: bool
    indices: tuple[Tensor, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Emitted:
    """All emitted code of an adapter, with one call for each site of the network, in its order."""

    prologue: fx.GraphModule
    inputs: tuple[str, ...]  # names of the blocks that the prologue takes, in order
    calls: tuple[Call, ...]


def emit(plan: Plan) -> Emitted:
    """The code of a plan. Sites with the same code share one module."""
    prologue = PrologueCode(plan)
    calls: list[Call] = []
    known: dict[str, fx.GraphModule] = {}
    for group_plan in plan.groups:
        group = group_plan.group
        stacked = [
            stack
            for term, chain in zip(group.terms, group_plan.chains, strict=True)
            for link in chain.links
            for stack in prologue.stacks_of(group, term, link)
        ]
        by_rows: dict[Rows | None, fx.GraphModule] = {}
        for number, site in enumerate(group.sites):
            if site.rows not in by_rows:
                code = site_program(group_plan, site.rows)
                by_rows[site.rows] = known.setdefault(code.code, code)
            pieces = tuple(Piece(stack, rows[number]) for stack, rows in stacked)
            calls.append(
                Call(site, by_rows[site.rows], group_plan.by_task, group_plan.by_base, _indices(group, site), pieces)
            )
    return Emitted(prologue.finish(), tuple(prologue.inputs), tuple(calls))


def _indices(group: Group, site: Site) -> tuple[Tensor, ...]:
    """For each product, the kept columns of the input and the kept rows among the module's outputs, if masks drop some."""
    found = []
    for term in group.terms:
        rows = None if term.rows is None else site.row_indices()[term.rows]
        found += [torch.from_numpy(index) for index in (term.columns, rows) if index is not None]
    return tuple(found)
