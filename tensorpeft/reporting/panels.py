"""Network -> panels: each product of the update as a graph, and where its factors and modes stand in a picture.

The input's modes are in the first column; every other node is as many columns further as it is edges away from them. Factors and
modes take turns, so every edge is between neighbouring columns. Modes that are bound from outside (sites, tasks) are in
no column: they are rails below.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx

from tensorpeft.language.syntax import ranges
from tensorpeft.model.shape import Site
from tensorpeft.network.graph import graph, modes
from tensorpeft.network.network import Network, Operand, Term
from tensorpeft.network.rank import minimum_cut

GraphNode = int | str  # a factor's position in its product, or a mode's name
_SWEEPS = 6
_MANY = 4  # sizes of which only the ends are told


@dataclass(frozen=True)
class Panel:
    """A product of the update, at all sites where it is the same graph."""

    sign: int
    is_summand: bool  # there are other products at its sites
    graph: nx.Graph  # of the first of its groups
    cut: frozenset[str]  # a minimum cut, where it is widest
    sites: tuple[Site, ...]
    sizes: dict[str, tuple[int, ...]]  # of every mode: several where it is ragged
    counts: tuple[int, ...]  # how many numbers each factor has, at all of these sites together

    @property
    def operands(self) -> tuple[Operand, ...]:
        return tuple(operand for _, operand in self.graph.nodes(data="operand") if operand is not None)

    @property
    def edges(self) -> tuple[tuple[int, str], ...]:
        """Which factor carries which mode."""
        return tuple((at, mode) for at in range(len(self.counts)) for mode in self.graph.neighbors(at))

    @property
    def rails(self) -> tuple[str, ...]:
        """The modes that are bound from outside."""
        return tuple(modes(self.graph, "site", "task"))


def panels(network: Network) -> tuple[Panel, ...]:
    """The products of a network, those of equal graphs as one."""
    alike: dict[Any, list[tuple[Term, tuple[Site, ...]]]] = {}
    for group in network.groups:
        for term in group.terms:
            factors = tuple((o.factor, o.modes, o.site_modes) for o in term.operands)
            key = (term.sign, len(group.terms) > 1, factors, term.d_out, term.d_in)
            alike.setdefault(key, []).append((term, group.sites))
    return tuple(_panel(sign, is_summand, members) for (sign, is_summand, *_), members in alike.items())


def _panel(sign: int, is_summand: bool, members: list[tuple[Term, tuple[Site, ...]]]) -> Panel:
    terms = [term for term, _ in members]
    first = graph(terms[0])
    widest = max(terms, key=lambda term: term.size(minimum_cut(term)))
    sizes = {mode: tuple(sorted({term.sizes[mode] for term in terms})) for mode in terms[0].sizes}
    for mode in modes(first, "site"):
        sizes[mode] = (len({getattr(site, mode) for _, sites in members for site in sites}),)
    blocks = [
        {o[at].block.name: o[at].block for o in (term.operands for term in terms)}
        for at in range(len(terms[0].operands))
    ]
    return Panel(
        sign=sign,
        is_summand=is_summand,
        graph=first,
        cut=frozenset(mode for mode in minimum_cut(widest) if widest.sizes[mode] > 1),
        sites=tuple(site for _, sites in members for site in sites),
        sizes=sizes,
        counts=tuple(sum(block.count for block in each.values()) for each in blocks),
    )


def sites_of(sites: tuple[Site, ...]) -> str:
    """``64 sites: query, value of layers 0-31, dW 4,096 x 4,096``."""
    names = ", ".join(dict.fromkeys(site.matrix for site in sites))
    layers = ranges({site.layer for site in sites})
    shapes = " | ".join(dict.fromkeys(f"{site.d_out:,} x {site.d_in:,}" for site in sites))
    many = len(sites) > 1
    return f"{len(sites)} site{'s' * many}: {names} of layer{'s' * (not layers.isdecimal())} {layers}, dW {shapes}"


def span_of(sizes: Iterable[int]) -> str:
    """``8 | 64``, or the least and the largest of many."""
    shown = [f"{size:,}" for size in sorted(sizes)]
    return " | ".join(shown) if len(shown) < _MANY else f"{shown[0]} to {shown[-1]}"


def columns(panel: Panel) -> list[list[GraphNode]]:
    """The nodes of every column, from top to bottom, so that few edges cross."""
    inner = panel.graph.subgraph(node for node in panel.graph if node not in panel.rails)
    distance = _distances(inner, modes(panel.graph, "input"))
    found: list[list[GraphNode]] = [[] for _ in range(max(distance.values()) + 1)]
    for node, at in distance.items():
        found[at].append(node)
    for _ in range(_SWEEPS):
        for before, column in pairwise(found):
            _arrange(column, before, inner)
        for after, column in pairwise(reversed(found)):
            _arrange(column, after, inner)
    return found


def _distances(inner: nx.Graph, sources: Iterable[GraphNode]) -> dict[GraphNode, int]:
    """Edges from the nearest source; what no source reaches begins a row of its own."""
    distance: dict[GraphNode, int] = dict(nx.multi_source_dijkstra_path_length(inner, set(sources)))
    for node in inner:
        if node not in distance:
            start = 1 if isinstance(node, int) else 0
            lengths = nx.single_source_shortest_path_length(inner, node)
            distance |= {other: start + length for other, length in lengths.items()}
    return {node: distance[node] for node in inner}


def _arrange(column: list[GraphNode], beside: list[GraphNode], inner: nx.Graph) -> None:
    """Sort a column by the mean height of its neighbours in the column beside it."""
    height, now = heights(beside), heights(column)

    def wanted(node: GraphNode) -> float:
        near = [height[other] for other in inner.neighbors(node) if other in height]
        return sum(near) / len(near) if near else now[node]

    column.sort(key=wanted)


def heights(column: list[GraphNode]) -> dict[GraphNode, float]:
    """Rows above or below the middle of the picture."""
    return {node: at - (len(column) - 1) / 2 for at, node in enumerate(column)}
