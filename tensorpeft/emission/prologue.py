"""Emits the prologue: from the stored blocks to the tensors that input sets are given.

A *part* holds what some input sets are given of one kind, with one row for each that differs: a factor as it is stored, or a
product of factors, for one site or for all sites that read one tensor. Parts become *stacks*: cast to the dtype of the
activations and laid out as the sites want them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from operator import getitem
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.fx.node import Argument as FxArgument

from tensorpeft.emission import ops
from tensorpeft.emission.index import Index
from tensorpeft.emission.intern import module
from tensorpeft.emission.lowering import Argument
from tensorpeft.language.spec import SITE_MODES
from tensorpeft.model.shape import Key
from tensorpeft.network.network import Block, Group, Operand, Term
from tensorpeft.planning.chain import ANY_SITE, SITE, Bundles, Link, operand_modes
from tensorpeft.planning.cost import prologue_key

KEY_ORDER = (*SITE_MODES, "site")  # "site" is the axis of a block whose sites fill no grid
Rows = tuple[int, ...]


@dataclass(frozen=True)
class StackPart:
    """A tensor of ``count`` rows, of which each of some input sets is given one."""

    node: fx.Node  # shape: (rows, one axis for each mode)
    shape: tuple[int, ...]  # of a row, over the axes of the argument
    merged: bool  # whether some axis stands for several modes
    count: int
    rows: Rows


class PrologueCode:
    """Builds the prologue's graph, which takes the blocks of these names."""

    def __init__(self, names: Iterable[str]) -> None:
        self.graph = fx.Graph()
        self.dtype = self.graph.placeholder("dtype")
        # numbered: fx takes `G` and `g` for one name
        self.inputs = {name: self.graph.placeholder(f"block{n}_{name}") for n, name in enumerate(names)}
        self.indices: dict[object, tuple[fx.Node, Index]] = {}  # that it is given behind the blocks
        self._stacks: dict[tuple[object, ...], int] = {}
        self._outputs: list[fx.Node] = []
        self._calls: dict[tuple[object, ...], fx.Node] = {}
        self._ready: set[fx.Node] = set()  # that are contiguous, and of that dtype
        self._products: dict[tuple[object, ...], fx.Node] = {}

    def finish(self) -> fx.GraphModule:
        self.graph.output(tuple(self._outputs))
        return module(self.graph, "Prologue")

    # Parts and stacks

    def part(self, group: Group, term: Term, link: Link, argument: Argument, bundles: Bundles) -> StackPart:
        """The tensor whose rows are an argument at the input sets of some bundles."""
        if len(argument.operands) == 1:
            operand = term.operands[argument.operands[0]]
            is_plain = operand.modes == sum(argument.axes, ()) and all(take is None for take in operand.take)
            node, keys = self._factor(operand, cast=is_plain)
            numbers = {key: number for number, key in enumerate(keys)}
            modes, count, of_site = operand.modes, len(keys), tuple(numbers[key] for key in operand.keys)
        else:
            axes = tuple(reversed(link.site_modes)) if argument.own else link.site_modes
            node, of_site = self._product(group, term, link, axes), _rows(group, axes)
            modes, count = (*link.batch, *link.new, *link.contracted), max(of_site) + 1
        wanted = [tuple(of_site[n] for n in (sites if argument.own else sites[:1])) for sites in bundles]
        items = {item: number for number, item in enumerate(dict.fromkeys(wanted))}
        if argument.own:
            node, modes = self._grid(node, count, tuple(items)), (SITE, *modes)
        else:
            node = self._picked(node, count, [row for (row,) in items])
        order = (0, *(1 + modes.index(mode) for axis in argument.axes for mode in axis))
        if order != tuple(range(len(order))):
            node = self._call("permute", node, order)
        sizes = {**term.sizes, SITE: len(wanted[0])}
        shape = tuple(prod(sizes[mode] for mode in axis) for axis in argument.axes)
        merged = any(len(axis) > 1 for axis in argument.axes)
        return StackPart(node, shape, merged, len(items), tuple(items[item] for item in wanted))

    def stack(self, parts: Sequence[StackPart]) -> tuple[int, Rows]:
        """The number of a stack, and for each input set its row; of several parts one behind the other, on their first axis."""
        if len(parts) == 1:
            node, merged, rows = parts[0].node, parts[0].merged, parts[0].rows
        else:
            wanted = list(zip(*(part.rows for part in parts), strict=True))
            items = {item: number for number, item in enumerate(dict.fromkeys(wanted))}
            flat = tuple(self._chosen(part, tuple(item[n] for item in items)) for n, part in enumerate(parts))
            node, merged, rows = self._call(torch.cat, flat, 1), False, tuple(items[item] for item in wanted)
        key = (node, parts[0].shape)
        if key not in self._stacks:
            cast = node if node in self._ready else self._call(ops.cast, node, self.dtype)
            self._stacks[key] = len(self._outputs)
            self._outputs.append(self._call("view", cast, (-1, *parts[0].shape)) if merged else cast)
        return self._stacks[key], rows

    def _chosen(self, part: StackPart, rows: Rows) -> fx.Node:
        node = self._picked(part.node, part.count, rows)
        return self._call("reshape", node, (-1, *part.shape)) if part.merged else node

    def _grid(self, node: fx.Node, count: int, items: tuple[Rows, ...]) -> fx.Node:
        """From (count, ...) to (items, rows of an item, ...); a view where the items are a grid of all rows turned over."""
        n, m = len(items), len(items[0])
        if n * m == count and items == tuple(tuple(j * n + i for j in range(m)) for i in range(n)):
            return self._call("transpose", self._call("unflatten", node, 0, (m, n)), 0, 1)
        return self._call("unflatten", self._picked(node, count, [row for item in items for row in item]), 0, (n, m))

    def _picked(self, node: fx.Node, count: int, rows: Sequence[int]) -> fx.Node:
        """Some of ``count`` rows; a view where they are all, or follow each other."""
        if list(rows) == list(range(count)):
            return node
        if list(rows) == list(range(rows[0], rows[0] + len(rows))):
            return self._call("narrow", node, 0, rows[0], len(rows))
        return self._selected(node, 0, tuple(rows))

    def _selected(self, node: fx.Node, axis: int, positions: Rows) -> fx.Node:
        return self._call("index_select", node, axis, self._index(positions, lambda: Index.of(np.array(positions))))

    def _index(self, key: object, index: Callable[[], Index]) -> fx.Node:
        if key not in self.indices:
            inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
            with self.graph.inserting_after(inputs[-1]):
                self.indices[key] = self.graph.placeholder(f"index{len(self.indices)}"), index()
        return self.indices[key][0]

    # Factors

    def _factor(self, operand: Operand, *, cast: bool = False) -> tuple[fx.Node, tuple[Key, ...]]:
        """The tensors of a block's keys, (keys, one axis for each mode of the operand), and these keys.

        With ``cast`` a packed block comes in the dtype of the activations: one kernel for all of its keys.
        """
        block = operand.block
        # to be read by itself: the key of a packed factor, or of one that is cut for this key alone
        is_alone = (block.packed or any(take is not None for take in operand.take)) and len({*operand.keys}) == 1
        only = operand.keys[0] if is_alone else None
        node = self.inputs[block.name]
        if only is None:
            node, keys = self._by_key(node, block), block.keys
        elif block.kept is not None and block.entries is None:
            source = self._call(ops.cast, node, self.dtype) if cast else node
            parts = self._call("split_with_sizes", source, block.key_sizes)  # its backward is one concatenation
            part = self._call(getitem, parts, block.keys.index(only))
            node, keys = self._call("view", part, (1, *block.key_shape(only))), (only,)
            if cast:
                self._ready.add(node)
        else:
            node, keys = self._call(getitem, self._at_key(node, block, only), None), (only,)
        for axis, positions in enumerate(operand.take, start=1):
            if isinstance(positions, range):
                node = self._call("narrow", node, axis, 0, len(positions))
            elif positions is not None:
                node = self._selected(node, axis, tuple(positions))
        if len(operand.modes) != len(block.free_axes):
            node = self._call("reshape", node, (-1, *operand.sizes))
        return node, keys

    def _by_key(self, node: fx.Node, block: Block) -> fx.Node:
        """A whole block as (keys, *free axes)."""
        if block.entries is not None:
            return self._scattered(node, block)
        bound = [i for i, axis in enumerate(block.axes) if axis.labels is not None]
        bound.sort(key=lambda i: KEY_ORDER.index(block.axes[i].mode))
        order = (*bound, *(i for i in range(len(block.axes)) if i not in bound))
        if order != tuple(range(len(order))):
            node = self._call("permute", node, order)
        if len(bound) > 1:
            return self._call("flatten", node, 0, len(bound) - 1)
        return node if bound else self._call(getitem, node, None)

    def _scattered(self, node: fx.Node, block: Block) -> fx.Node:
        """A block of which entries are kept, with zeros where there are none: its backward is one gathering."""
        shape = (len(block.keys), *(axis.size for axis in block.free_axes))
        index = self._index(block.name, lambda: Index(block.count, lambda: block.positions))
        return self._call(ops.scatter, node, index, shape)

    def _at_key(self, node: fx.Node, block: Block, key: Key) -> fx.Node:
        """The tensor of one key, (*free axes)."""
        if block.entries is not None:
            return self._call("select", self._scattered(node, block), 0, block.keys.index(key))
        bound = [i for i, axis in enumerate(block.axes) if axis.labels is not None]
        modes = sorted((block.axes[i].mode for i in bound), key=KEY_ORDER.index)
        for i in reversed(bound):
            axis = block.axes[i]
            assert axis.labels is not None
            label = key if axis.mode == "site" else key[modes.index(axis.mode)]
            node = self._call("select", node, i, axis.labels.index(label))
        return node

    # Products of factors

    def _product(self, group: Group, term: Term, link: Link, axes: tuple[str, ...]) -> fx.Node:
        """A product of factors for all sites of a group, (rows, one axis for each mode), contracted in the factors' own dtype."""
        key = (prologue_key(term, link), axes)
        if key in self._products:
            return self._products[key]
        operands = [term.operands[i] for i in link.operands]
        made = [self._gathered(group, operand) for operand in operands]
        goal = (*axes, *link.batch, *link.new, *link.contracted)  # what the sites want to find in memory
        for step in link.steps:
            equation = ops.equation([step.left, step.right], goal if step is link.steps[-1] else step.result)
            made.append(self._call(torch.einsum, equation, *(made[number] for number in step.inputs)))
        node = made[-1]
        if not axes:
            node = self._call("unsqueeze", node, 0)
        elif len(axes) > 1:
            node = self._call("flatten", node, 0, len(axes) - 1)
        self._products[key] = node
        return node

    def _gathered(self, group: Group, operand: Operand) -> fx.Node:
        """An operand with the group's site axes first."""
        node, keys = self._factor(operand)
        axes = operand_modes(group, operand)[: -len(operand.modes) or None]
        if not axes:
            return self._call(getitem, node, 0)
        row = {key: number for number, key in enumerate(keys)}
        wanted = [row[operand.keys[sites[0]]] for sites in _sites_by_row(group, axes)]
        node = self._picked(node, len(keys), wanted)
        if len(axes) > 1:
            node = self._call("unflatten", node, 0, tuple(len(_labels(group, mode)) for mode in axes))
        return node

    def _call(self, function: Any, *args: FxArgument) -> fx.Node:
        """A call of a method of the first argument, or of a function; the same one is made once."""
        key = (function, *args)
        if key not in self._calls:
            make = self.graph.call_method if isinstance(function, str) else self.graph.call_function
            self._calls[key] = make(function, args)
        return self._calls[key]


def _labels(group: Group, mode: str) -> list[Any]:
    return list(dict.fromkeys(getattr(site, mode) for site in group.sites))


def _sites_by_row(group: Group, axes: tuple[str, ...]) -> list[list[int]]:
    """The sites (by number) at each index of the stacked site axes of a group, in order."""
    if axes == (ANY_SITE,):
        return [[number] for number in range(len(group.sites))]
    grid: dict[Key, list[int]] = {(): []}
    for mode in axes:
        grid = {(*key, label): [] for key in grid for label in _labels(group, mode)}
    for number, site in enumerate(group.sites):
        grid[tuple(getattr(site, mode) for mode in axes)].append(number)
    return list(grid.values())


def _rows(group: Group, axes: tuple[str, ...]) -> Rows:
    """For each site of a group, its index on the stacked axes."""
    index = {number: row for row, numbers in enumerate(_sites_by_row(group, axes)) for number in numbers}
    return tuple(index[number] for number in range(len(group.sites)))
