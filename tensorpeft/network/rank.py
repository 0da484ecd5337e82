"""How large the matrix rank of dW can be: the minimum cut of the network between its output and its input."""

from __future__ import annotations

from math import log

import networkx as nx

from tensorpeft.network.graph import graph, modes
from tensorpeft.network.network import Group, Network, Term


def lora_rank(network: Network) -> int:
    """The rank at which LoRA holds every update of this network: the largest bound of its groups."""
    return max((rank_bound(group) for group in network.groups), default=0)


def rank_bound(group: Group) -> int:
    """An upper bound of the rank of dW at the sites of a group: over its products, the sum of their minimum cuts."""
    bound = sum(term.size(minimum_cut(term)) for term in group.terms)
    return min(bound, group.sites[0].d_out, group.sites[0].d_in)


def minimum_cut(term: Term) -> tuple[str, ...]:
    """The modes of least total size whose removal parts the output side of a product from its input side.

    Factors and modes are the two kinds of nodes of one graph. Cutting a mode costs the logarithm of its size, however many
    factors carry it (a copy tensor is cut once); factors cannot be cut. Site modes are fixed at a site and do not count.
    """
    network = graph(term)
    cuttable = sorted(modes(network, "input", "output", "bond"))
    flow = nx.DiGraph()
    for mode in cuttable:
        flow.add_edge(("in", mode), ("out", mode), capacity=log(term.sizes[mode]))
        for factor in network.neighbors(mode):
            flow.add_edge(("out", mode), factor)
            flow.add_edge(factor, ("in", mode))
    flow.add_edges_from(("input", ("in", mode)) for mode in term.d_in)
    flow.add_edges_from((("out", mode), "output") for mode in term.d_out)
    reachable = nx.minimum_cut(flow, "input", "output")[1][0]
    return tuple(m for m in cuttable if ("in", m) in reachable and ("out", m) not in reachable)
