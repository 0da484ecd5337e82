"""A graph -> a module, the same one for all graphs that say the same.

A compiled model that knows a module runs every adapter that has it: what was compiled for one of a spec serves the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

from torch import fx


@dataclass(frozen=True)
class GraphKey:
    """A graph's operations and arguments, without the names of its nodes: equal for graphs of the same code."""

    nodes: tuple[object, ...]
    name: str
    graph: fx.Graph = field(compare=False)


def module(graph: fx.Graph, name: str) -> fx.GraphModule:
    """A finished graph as a module of a class of this name."""
    numbers = {node: number for number, node in enumerate(graph.nodes)}
    nodes = ((node.op, node.target, node.args, node.kwargs) for node in graph.nodes)
    return _module(GraphKey(tuple(_value_of(node, numbers) for node in nodes), name, graph))


@lru_cache(maxsize=4096)
def _module(key: GraphKey) -> fx.GraphModule:
    return fx.GraphModule({}, key.graph, key.name)


def _value_of(argument: object, numbers: dict[fx.Node, int]) -> object:
    """An argument as a value that equals no other's: 1 and 1.0 are not the same."""
    if isinstance(argument, fx.Node):
        return fx.Node, numbers[argument]
    if isinstance(argument, (list, tuple)):
        return tuple(_value_of(each, numbers) for each in argument)
    if isinstance(argument, dict):
        return tuple((name, _value_of(each, numbers)) for name, each in argument.items())
    return type(argument), argument
