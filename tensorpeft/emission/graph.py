"""A graph of an input set's code, and the tensors with names that it takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

from torch import fx
from torch.fx.node import Argument as FxArgument

from tensorpeft.emission.contraction import Code
from tensorpeft.emission.intern import module
from tensorpeft.emission.lowering import SetKind
from tensorpeft.emission.named_tensor import Modes, NamedTensor
from tensorpeft.model.shape import Rows
from tensorpeft.planning.orders import TOKEN

# all features of the input, of an output; all columns of a projection
INPUT, OUTPUT, PROJECTION = "<input>", "<output>", "<projection>"
ROW = "task"  # of an activation: the row of the batch, whose task chooses among a factor's


@dataclass(frozen=True)
class Function:
    """An emitted function: the names of what it takes, and of what it returns; and which sizes of chains are in its code."""

    code: fx.GraphModule
    takes: tuple[str, ...]
    returns: tuple[str, ...]
    read: Mapping[tuple[int, str], int]

    @cached_property
    def run(self) -> Callable[..., Any]:
        """The code, to be called."""
        return self.code.forward

    @cached_property
    def pick(self) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
        """From values by their names to those that it takes, in order."""
        return picker(self.takes)

    @cached_property
    def accumulated(self) -> tuple[tuple[str, int], ...]:
        """Of a backward pass: where gradients of arguments are added up in place, by name and by the argument's number."""
        return tuple((name, int(name.removeprefix("into"))) for name in self.takes if name.startswith("into"))

    @cached_property
    def delivered(self) -> tuple[int, ...]:
        """Of a backward pass: the arguments whose gradients it returns, behind that of x."""
        return tuple(int(name.removeprefix("into")) for name in self.returns[1:])


def picker(names: tuple[str, ...]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """A function that picks the values of names, by a single call of the interpreter's where there are several."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda given: tuple([given[name] for name in names])


class SetGraph:
    """A graph of an input set."""

    def __init__(self, kind: SetKind) -> None:
        self.kind, self.code = kind, Code({INPUT: kind.d_in})
        self.takes: dict[str, fx.Node] = {}
        self.features: dict[fx.Node, int] = {}  # of an activation

    def take(self, name: str) -> fx.Node:
        """The placeholder of a named tensor."""
        if name not in self.takes:
            self.takes[name] = self.code.placeholder(name)
        return self.takes[name]

    def flat(self, name: str, features: Modes, n_features: int, *, in_place: bool = False) -> NamedTensor:
        """An activation (..., features) as (tokens, features), behind an axis for the rows of the batch where these have tasks.

        What is given may lie in memory as it likes: products of matrices take it as it is, so that it is only copied where
        axes are merged. What is changed ``in_place`` lies there contiguously.
        """
        lead = (self.code.length(self.take("ids"), 0),) if self.kind.by_task else ()
        node = self.code.once("view" if in_place else "reshape", self.take(name), (*lead, -1, n_features))
        gaps = frozenset({0} if not (lead or in_place) else ())
        if lead and not in_place:
            node = self.code.once("contiguous", node)
        self.features[node] = n_features
        return NamedTensor(node, (*(((ROW,),) if lead else ()), (TOKEN,), features), gaps)

    def finish(self, outputs: FxArgument, returns: tuple[str, ...], name: str) -> Function:
        self.code.graph.output(outputs)
        code = module(self.code.graph, name)
        return Function(code, tuple(self.takes), returns, self.code.sizes.read)


def rows_of(graph: SetGraph, y: NamedTensor, rows: Rows | None) -> NamedTensor | None:
    """The outputs of one matrix as a view with one axis; None where they do not lie together."""
    if rows is None:
        return y
    if rows.period != graph.features[y.node]:
        return None
    node = graph.code.once("narrow", y.node, -1, rows.offset, rows.count)
    return NamedTensor(node, y.axes, frozenset({len(y.axes) - 2}))
