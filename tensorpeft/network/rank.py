"""An upper bound of the matrix rank of dW: the minimum cut of the network between its output and its input."""

from __future__ import annotations

from collections.abc import Mapping, Set
from math import log, prod
from typing import Any

from tensorpeft.language.keywords import TASK_MODE
from tensorpeft.network.graph import graph, modes
from tensorpeft.network.network import Group, Network, Term


def lora_rank(network: Network) -> int:
    """The rank at which LoRA holds every update of this network: the largest bound of its groups."""
    return max((rank_bound(group) for group in network.groups), default=0)


def rank_bound(group: Group) -> int:
    """An upper bound of the rank of dW at the sites of a group: over its products, the sum of their minimum cuts."""
    bound = sum(prod(_cut(term, {**term.sizes, **_entries(term)}).values()) for term in group.terms)
    return min(bound, group.sites[0].d_out, group.sites[0].d_in)


def minimum_cut(term: Term) -> tuple[str, ...]:
    """The modes of least total size whose removal parts the output side of a product from its input side."""
    return tuple(mode for mode in _cut(term, term.sizes) if isinstance(mode, str))


def _entries(term: Term) -> dict[int, int]:
    """For each operand with a mask on entries, the most entries that any of its keys keeps."""
    masked = ((number, o.block.entries, o.keys) for number, o in enumerate(term.operands))
    return {number: max(entries[key].count for key in keys) for number, entries, keys in masked if entries is not None}


def _cut(term: Term, costs: Mapping[Any, int]) -> dict[str | int, int]:
    """The nodes that part the output side from the input side at the least product of costs, with these.

    Factors and modes are the two kinds of nodes of one graph. Cutting a mode costs its size, however many factors carry it (a
    copy tensor is cut once). A factor of few entries is a sum of as many tensors that have no mode left, so it may be cut at
    their number; other factors cannot be cut. Site modes are fixed at a site and do not count.
    """
    if costs == term.sizes and (mode := _bottleneck(term)):
        return {mode: costs[mode]}
    import networkx as nx  # late: a fifth of a second to import

    network = graph(term)
    joining = sorted(modes(network, "input", "output", "bond"))
    flow = nx.DiGraph()
    nodes = (*joining, *range(len(term.operands)))
    for node in nodes:
        limit = {"capacity": log(costs[node])} if node in costs else {}
        flow.add_edge(("in", node), ("out", node), **limit)
    for mode in joining:
        for factor in network.neighbors(mode):
            flow.add_edge(("out", mode), ("in", factor))
            flow.add_edge(("out", factor), ("in", mode))
    flow.add_edges_from(("input", ("in", mode)) for mode in term.d_in)
    flow.add_edges_from((("out", mode), "output") for mode in term.d_out)
    reachable = nx.minimum_cut(flow, "input", "output")[1][0]
    return {node: costs[node] for node in nodes if ("in", node) in reachable and ("out", node) not in reachable}


def _bottleneck(term: Term) -> str | None:
    """The mode that every way from input to output passes, if one way is wider elsewhere: then it is the only minimum cut."""
    sizes = {mode: term.sizes[mode] for operand in term.operands for mode in operand.modes if mode != TASK_MODE}
    if 1 in sizes.values():  # these are cut beside it at no cost
        return None
    for mode, size in sizes.items():
        narrow = {other for other in sizes if sizes[other] <= size and other != mode}
        if _is_joined(term, {TASK_MODE, *narrow}) and not _is_joined(term, {TASK_MODE, mode}):
            return mode
    return None


def _is_joined(term: Term, cut: Set[str]) -> bool:
    """Whether modes outside a cut lead from the input to the output."""
    return any(not {*term.d_out}.isdisjoint({*term.operands[at].modes} - cut) for at in distances(term, cut))


def distances(term: Term, cut: Set[str]) -> dict[int, int]:
    """How many factors away from the input each operand is, of those alone that are joined to it by modes outside the cut."""
    found: dict[int, int] = {}
    reached = {*term.d_in} - cut
    for steps in range(len(term.operands)):
        near = [i for i, each in enumerate(term.operands) if i not in found and not reached.isdisjoint(each.modes)]
        found |= dict.fromkeys(near, steps)
        reached |= {mode for i in near for mode in term.operands[i].modes} - cut
    return found
