"""Emits site programs: from an activation and the base's output to the output with the update added."""

from __future__ import annotations

import torch
from torch import fx

from tensorpeft.network.network import Group, Operand, Term
from tensorpeft.network.shapes import Rows
from tensorpeft.planning.plan import TOKEN, GroupPlan, Link
from tensorpeft.runtime import ops


def site_program(plan: GroupPlan, rows: Rows | None) -> fx.GraphModule:
    """The program of a group's sites, for a whole module or for the ``rows`` of a fused one."""
    graph, group = fx.Graph(), plan.group
    x, y = graph.placeholder("x"), graph.placeholder("y")
    ids = graph.placeholder("ids") if plan.by_task else None
    base = graph.placeholder("w") if plan.by_base else None
    kept = iter(_index_placeholders(graph, group))
    number = 0
    for chain, term in zip(plan.chains, group.terms, strict=True):
        h, alpha = x, chain.sign * group.scale
        if term.columns is not None:
            h = graph.call_method("index_select", (x, -1, next(kept)))
        out = None if term.rows is None else next(kept)
        for link in chain.links:
            own = [i for i in link.operands if not term.operands[i].is_base]
            pieces = [graph.placeholder(f"p{number + n}") for n in range(len(own) if link.at_site else 1)]
            number += len(pieces)
            piece = pieces[0] if base is None or not link.at_site else _built(graph, term, link, base, pieces)
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


def _built(graph: fx.Graph, term: Term, link: Link, base: fx.Node, pieces: list[fx.Node]) -> fx.Node:
    """The tensor of a link that has the base weight (d_out, d_in) in it, as the link wants it."""
    factors = iter(pieces)
    operands = [term.operands[i] for i in link.operands]
    live = [(base_atoms(graph, base, o) if o.is_base else next(factors), o.modes) for o in operands]
    for step in link.path or ((0,),):
        picked = [live[i] for i in step]
        live = [each for i, each in enumerate(live) if i not in step]
        needed = {*link.modes, *(mode for _, modes in live for mode in modes)}
        modes = link.modes if not live else tuple(dict.fromkeys(m for _, ms in picked for m in ms if m in needed))
        equation = ops.equation([ms for _, ms in picked], modes)
        live.append((graph.call_function(torch.einsum, (equation, *(node for node, _ in picked))), modes))
    node = live[0][0]
    if not link.is_matmul:
        return node
    batch = tuple(term.sizes[mode] for mode in link.batch)
    return graph.call_method("reshape", (node, (*batch, term.size(link.contracted), term.size(link.new))))


def built_program(term: Term, link: Link) -> fx.GraphModule:
    """The tensor of such a link by itself, from the base weight and the pieces."""
    graph = fx.Graph()
    base = graph.placeholder("w")
    own = [i for i in link.operands if not term.operands[i].is_base]
    graph.output(_built(graph, term, link, base, [graph.placeholder(f"p{n}") for n in range(len(own))]))
    return fx.GraphModule({}, graph, "BuiltLink")


def base_atoms(graph: fx.Graph, base: fx.Node, operand: Operand) -> fx.Node:
    """The base weight (d_out, d_in), or what masks leave of it, over the atoms of its sides."""
    for axis, positions in enumerate(operand.take):
        if positions is not None:
            base = graph.call_function(ops.select, (base, axis, tuple(positions)))
    return graph.call_method("reshape", (base, operand.sizes))


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
