"""A product of factors as a graph: factors and modes are its two kinds of nodes, and an edge says that a factor carries a mode.

A mode of more than two factors (or of two, where a side of dW is open in it too) is a copy tensor. The rank bound cuts this
graph, and reports draw it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tensorpeft.language.spec import SITE_MODES
from tensorpeft.network.network import Term

if TYPE_CHECKING:
    import networkx as nx


def graph(term: Term) -> nx.Graph:
    """Nodes: operands under their positions, with ``operand``; modes under their names, with ``kind`` and ``size``.

    Atoms have the sizes that masks leave of them, site modes the number of their values at the sites of the term.
    """
    import networkx as nx  # late: a fifth of a second to import, which only what cuts or draws a network needs

    found = nx.Graph()
    for number, operand in enumerate(term.operands):
        found.add_node(number, operand=operand)
        for mode in operand.modes:
            found.add_node(mode, kind=_kind(mode, term), size=term.sizes[mode])
            found.add_edge(number, mode)
        for at, mode in enumerate(operand.site_modes):
            found.add_node(mode, kind="site", size=len({key[at] for key in operand.keys}))
            found.add_edge(number, mode)
    return found


def _kind(mode: str, term: Term) -> str:
    if mode in SITE_MODES:
        return "site"
    return "input" if mode in term.d_in else "output" if mode in term.d_out else "task" if mode == "task" else "bond"


def modes(found: nx.Graph, *kinds: str) -> list[str]:
    """The modes of these kinds, in the order in which the factors carry them."""
    return [node for node, kind in found.nodes(data="kind") if kind in kinds]


def is_copy(found: nx.Graph, mode: str) -> bool:
    """Whether a mode ties more than two ends together: factors, and the side of dW where it is open."""
    return found.degree(mode) + (found.nodes[mode]["kind"] in ("input", "output")) > 2
