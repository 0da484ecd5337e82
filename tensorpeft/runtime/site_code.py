"""Emits site programs: from an activation and the base's output to the output with the update added."""

from __future__ import annotations

import torch
from torch import fx

from tensorpeft.network.network import Group, Term
from tensorpeft.network.shapes import Rows
from tensorpeft.planning.plan import TOKEN, GroupPlan, Link
from tensorpeft.runtime import ops


def site_program(plan: GroupPlan, rows: Rows | None) -> fx.GraphModule:
    """The program of a group's sites, for a whole module or for the ``rows`` of a fused one."""
    graph, group = fx.Graph(), plan.group
    x, y = graph.placeholder("x"), graph.placeholder("y")
    ids = graph.placeholder("ids") if plan.by_task else None
    kept = iter(_index_placeholders(graph, group))
    number = 0
    for chain, term in zip(plan.chains, group.terms, strict=True):
        h, alpha = x, chain.sign * group.scale
        if term.columns is not None:
            h = graph.call_method("index_select", (x, -1, next(kept)))
        out = None if term.rows is None else next(kept)
        for link in chain.links:
            piece = graph.placeholder(f"p{number}")
            number += 1
            if "task" in link.batch:
                piece = graph.call_method("index_select", (piece, 0, ids))
            last = link is chain.links[-1]
            if last and link.is_matmul and not link.batch and out is None and rows is None:
                y = graph.call_function(ops.add_matmul, (y, h, piece, alpha))
                break
            h = _step(graph, term, link, h, piece)
        else:
            y = _added(graph, y, h, alpha, out, rows)
    graph.output(y)
    _placeholders_first(graph)
    return fx.GraphModule({}, graph, "SiteProgram")


def _index_placeholders(graph: fx.Graph, group: Group) -> list[fx.Node]:
    """One for each of ``_indices``, before the pieces."""
    named = [index for i, t in enumerate(group.terms) for index in ((t.columns, f"columns{i}"), (t.rows, f"rows{i}"))]
    return [graph.placeholder(name) for index, name in named if index is not None]


def _step(graph: fx.Graph, term: Term, link: Link, h: fx.Node, piece: fx.Node) -> fx.Node:
    """One link: the activation's features go from ``before`` to ``after``, flat on both ends."""
    before, after = (modes[modes.index(TOKEN) + 1 :] for modes in (link.before, link.after))
    if link.is_matmul and not link.batch:
        return graph.call_function(torch.matmul, (h, piece))
    if link.modes == before == after and len(after) == 1:
        return graph.call_function(torch.mul, (h, piece))
    if link.is_matmul:
        return graph.call_function(torch.einsum, ("z...k,zkn->z...n", h, piece))
    if len(before) != 1:
        h = graph.call_function(ops.split, (h, tuple(term.sizes[mode] for mode in before)))
    lead = tuple(mode for mode in link.before[: link.before.index(TOKEN)])
    equation = ops.equation([(*lead, ..., *before), link.modes], (*lead, ..., *after))
    h = graph.call_function(torch.einsum, (equation, h, piece))
    return h if len(after) == 1 else graph.call_function(ops.merge, (h, len(after)))


def _added(
    graph: fx.Graph, y: fx.Node, update: fx.Node, alpha: float, kept: fx.Node | None, rows: Rows | None
) -> fx.Node:
    if kept is not None:
        return graph.call_function(ops.add_at, (y, update, kept, alpha))
    if rows is not None:
        return graph.call_function(ops.add_rows, (y, update, rows.offset, rows.count, rows.period, alpha))
    return graph.call_function(ops.add, (y, update, alpha))


def _placeholders_first(graph: fx.Graph) -> None:
    """Fx wants every placeholder above the first operation."""
    first = next((node for node in graph.nodes if node.op != "placeholder"), None)
    for node in list(graph.nodes):
        if node.op == "placeholder" and first is not None and first < node:
            first.prepend(node)
