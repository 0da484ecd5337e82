"""How large the matrix rank of dW can be: the minimum cut of the network between its output and its input."""

from __future__ import annotations

from math import log

import networkx as nx

from tensorpeft.language.spec import SITE_MODES
from tensorpeft.network.network import Group, Network, Term


def lora_rank(network: Network) -> int:
    """The rank at which LoRA holds every update of this network: the largest bound of its groups."""
    return max(rank_bound(group) for group in network.groups)


def rank_bound(group: Group) -> int:
    """An upper bound of the rank of dW at the sites of a group: over its products, the sum of their minimum cuts."""
    bound = sum(term.size(minimum_cut(term)) for term in group.terms)
    return min(bound, group.sites[0].d_out, group.sites[0].d_in)


def minimum_cut(term: Term) -> tuple[str, ...]:
    """The modes of least total size whose removal parts the output side of a product from its input side.

    Factors and modes are the two kinds of nodes of one graph. Cutting a mode costs the logarithm of its size, however many
    factors carry it (a copy tensor is cut once); factors cannot be cut. Site modes are fixed at a site and do not count.
    """
    graph = nx.DiGraph()
    modes = sorted({mode for operand in term.operands for mode in operand.modes} - {*SITE_MODES, "task"})
    for mode in modes:
        graph.add_edge(("in", mode), ("out", mode), capacity=log(term.sizes[mode]))
    for number, operand in enumerate(term.operands):
        for mode in sorted({*modes}.intersection(operand.modes)):
            graph.add_edge(("out", mode), number)
            graph.add_edge(number, ("in", mode))
    for mode in term.d_in:
        graph.add_edge("input", ("in", mode))
    for mode in term.d_out:
        graph.add_edge(("out", mode), "output")
    reachable = nx.minimum_cut(graph, "input", "output")[1][0]
    return tuple(m for m in modes if ("in", m) in reachable and ("out", m) not in reachable)
