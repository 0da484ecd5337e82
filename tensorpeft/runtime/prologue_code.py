"""Emits the prologue: from the stored blocks to the tensor of every link at every site.

The results are *stacks*, one for each link, with the sites (or, where they share a tensor, its keys) on the first axis.
"""

from __future__ import annotations

from math import prod
from operator import getitem

import torch
from torch import fx
from torch.fx.node import Argument

from tensorpeft.language.spec import SITE_MODES
from tensorpeft.network.network import Block, Group, Operand, Term
from tensorpeft.network.shapes import Key
from tensorpeft.planning.plan import Link, Plan, operand_modes
from tensorpeft.runtime import ops

_KEY_ORDER = (*SITE_MODES, "site")


class PrologueCode:
    """Builds the prologue's graph, one stack after another."""

    def __init__(self, plan: Plan) -> None:
        self.graph = fx.Graph()
        self.dtype = self.graph.placeholder("dtype")
        names = [block.name for block in plan.network.blocks]  # numbered: fx takes `G` and `g` for one name
        self.inputs = {name: self.graph.placeholder(f"block{n}_{name}") for n, name in enumerate(names)}
        self.known: dict[tuple[object, ...], tuple[int, dict[Key, int]]] = {}
        self.cast: dict[str, fx.Node] = {}
        self.parts: dict[fx.Node, fx.Node] = {}
        self.stacks: list[fx.Node] = []
        self.dense: dict[fx.Node, fx.Node] = {}
        self.positions: dict[str, torch.Tensor] = {}

    def finish(self) -> fx.GraphModule:
        self.graph.output(tuple(self.stacks))
        return fx.GraphModule(self.positions, self.graph, "Prologue")

    def stacks_of(self, group: Group, term: Term, link: Link) -> list[tuple[int, tuple[int, ...]]]:
        """The number of a link's stack, and for every site of its group the row in it; several where a site builds the link."""
        operands = [term.operands[i] for i in link.operands]
        if link.at_site:
            return [self._known(operand, None) for operand in operands if not operand.is_base]
        return [self._computed(group, term, operands, link) if len(operands) > 1 else self._known(operands[0], link)]

    def _known(self, operand: Operand, link: Link | None) -> tuple[int, tuple[int, ...]]:
        modes = operand.modes if link is None else link.modes
        what = (operand.block.name, operand.modes, operand.sizes, operand.take, _only_key(operand), modes, link is None)
        if what not in self.known:
            self.known[what] = self._raw(operand, link)
        number, rows = self.known[what]
        return number, tuple(rows[key] for key in operand.keys)

    def _raw(self, operand: Operand, link: Link | None) -> tuple[int, dict[Key, int]]:
        """A factor as it is, cast once for all of its uses, and laid out as its link wants it, if it is one by itself."""
        name = operand.block.name
        if name not in self.cast:
            self.cast[name] = self._call("to", self.inputs[name], self.dtype)
        node, keys = self._by_key(self.cast[name], operand)
        if link is not None:
            order = (0, *(1 + operand.modes.index(mode) for mode in link.modes))
            if order != tuple(range(len(order))):
                node = self._call("permute", node, order)
            node = self._laid_out(node, link, dict(zip(operand.modes, operand.sizes, strict=True)))
        self.stacks.append(node)
        return len(self.stacks) - 1, {key: row for row, key in enumerate(keys)}

    def _laid_out(self, node: fx.Node, link: Link, sizes: dict[str, int]) -> fx.Node:
        if not link.is_matmul:
            return node
        batch = tuple(sizes[mode] for mode in link.batch)
        shape = (*batch, prod(sizes[m] for m in link.contracted), prod(sizes[m] for m in link.new))
        return node if len(link.contracted) == len(link.new) == 1 else self._call("reshape", node, (-1, *shape))

    def _by_key(self, node: fx.Node, operand: Operand) -> tuple[fx.Node, tuple[Key, ...]]:
        """What the keys of a block hold, as (keys, *modes of the operand); and which keys these are."""
        block, only = operand.block, _only_key(operand)
        if only is None:
            node, keys = self._stacked(node, block), block.keys
        else:
            node, keys = self._call("unsqueeze", self._at_key(node, block, only), 0), (only,)
        for axis, positions in enumerate(operand.take, start=1):
            if isinstance(positions, range):
                node = self._call("narrow", node, axis, 0, len(positions))
            elif positions is not None:
                node = self.graph.call_function(ops.select, (node, axis, positions))
        if len(operand.modes) != len(block.free_axes):
            node = self._call("reshape", node, (-1, *operand.sizes))
        return node, keys

    def _stacked(self, node: fx.Node, block: Block) -> fx.Node:
        """A whole block as (keys, *free axes)."""
        if block.entries is not None:
            return self._scattered(node, block)
        bound = [i for i, axis in enumerate(block.axes) if axis.labels is not None]
        bound.sort(key=lambda i: _KEY_ORDER.index(block.axes[i].mode))
        order = (*bound, *(i for i in range(len(block.axes)) if i not in bound))
        if order != tuple(range(len(order))):
            node = self._call("permute", node, order)
        if len(bound) > 1:
            return self._call("flatten", node, 0, len(bound) - 1)
        return node if bound else self._call("unsqueeze", node, 0)

    def _scattered(self, node: fx.Node, block: Block) -> fx.Node:
        """A block of which entries are kept, with zeros where there are none: its backward is one gathering."""
        if node not in self.dense:
            name = f"positions_{self.graph._graph_namespace.create_name(block.name, None)}"
            self.positions[name] = torch.from_numpy(block.positions)
            shape = (len(block.keys), *(axis.size for axis in block.free_axes))
            self.dense[node] = self.graph.call_function(ops.scatter, (node, self.graph.get_attr(name), shape))
        return self.dense[node]

    def _at_key(self, node: fx.Node, block: Block, key: Key) -> fx.Node:
        """What one key holds, over the free axes."""
        if block.entries is not None:
            return self._call("select", self._scattered(node, block), 0, block.keys.index(key))
        if block.kept is not None:
            if node not in self.parts:  # one split for all keys: its backward is one concatenation
                self.parts[node] = self._call("split", node, block.key_sizes)
            part = self.graph.call_function(getitem, (self.parts[node], block.keys.index(key)))
            return self._call("view", part, block.key_shape(key))
        bound = [i for i, axis in enumerate(block.axes) if axis.labels is not None]
        modes = sorted((block.axes[i].mode for i in bound), key=_KEY_ORDER.index)
        for i in reversed(bound):
            axis = block.axes[i]
            assert axis.labels is not None
            label = key if axis.mode == "site" else key[modes.index(axis.mode)]
            node = self._call("select", node, i, axis.labels.index(label))
        return node

    def _computed(self, group: Group, term: Term, operands: list[Operand], link: Link) -> tuple[int, tuple[int, ...]]:
        """A product of factors for all sites of a group, contracted in the factors' own dtype and cast once."""
        live = [(self._gathered(group, operand), operand_modes(group, operand)) for operand in operands]
        goal = (*link.site_modes, *link.modes)
        for step in link.path:
            picked = [live[i] for i in step]
            live = [each for i, each in enumerate(live) if i not in step]
            needed = {*goal, *(mode for _, modes in live for mode in modes)}
            modes = goal if not live else tuple(dict.fromkeys(m for _, ms in picked for m in ms if m in needed))
            live.append((self._einsum(picked, modes), modes))
        node, n_site = live[0][0], len(link.site_modes)
        if n_site == 0:
            node = self._call("unsqueeze", node, 0)
        elif n_site > 1:
            node = self._call("flatten", node, 0, n_site - 1)
        self.stacks.append(self._call("to", self._laid_out(node, link, term.sizes), self.dtype))
        return len(self.stacks) - 1, _rows(group, link.site_modes)

    def _gathered(self, group: Group, operand: Operand) -> fx.Node:
        """An operand with the group's site axes first."""
        node, keys = self._by_key(self.inputs[operand.block.name], operand)
        axes = operand_modes(group, operand)[: -len(operand.modes) or None]
        if not axes:
            return self._call("squeeze", node, 0)
        row = {key: number for number, key in enumerate(keys)}
        wanted = tuple(row[operand.keys[sites[0]]] for sites in _group_rows(group, axes))
        if wanted != tuple(range(len(keys))):
            node = self.graph.call_function(ops.select, (node, 0, wanted))
        if len(axes) > 1:
            node = self._call("unflatten", node, 0, tuple(len(_labels(group, mode)) for mode in axes))
        return node

    def _einsum(self, operands: list[tuple[fx.Node, tuple[str, ...]]], modes: tuple[str, ...]) -> fx.Node:
        equation = ops.equation([ms for _, ms in operands], modes)
        return self.graph.call_function(torch.einsum, (equation, *(node for node, _ in operands)))

    def _call(self, method: str, node: fx.Node, *args: Argument) -> fx.Node:
        return self.graph.call_method(method, (node, *args))


def _only_key(operand: Operand) -> Key | None:
    """The key to read by itself: of a packed factor, or of one that is cut for this key alone."""
    alone = operand.block.kept is not None or any(take is not None for take in operand.take)
    return operand.keys[0] if alone and len({*operand.keys}) == 1 else None


def _labels(group: Group, mode: str) -> list[str | int]:
    return list(dict.fromkeys(getattr(site, mode) for site in group.sites))


def _group_rows(group: Group, axes: tuple[str, ...]) -> list[list[int]]:
    """The sites (by number) at each index of the stacked site axes of a group, in order."""
    if axes == ("site",):
        return [[number] for number in range(len(group.sites))]
    grid: dict[Key, list[int]] = {(): []}
    for mode in axes:
        grid = {(*key, label): [] for key in grid for label in _labels(group, mode)}
    for number, site in enumerate(group.sites):
        grid[tuple(getattr(site, mode) for mode in axes)].append(number)
    return list(grid.values())


def _rows(group: Group, axes: tuple[str, ...]) -> tuple[int, ...]:
    """For each site of a group, its index on the stacked axes."""
    index = {number: row for row, numbers in enumerate(_group_rows(group, axes)) for number in numbers}
    return tuple(index[number] for number in range(len(group.sites)))
