"""Plan -> torch code, through torch.fx.

Two kinds of functions are emitted. The **prologue** takes the stored blocks and returns *stacks*: for each link its tensor at
every site, stacked over the first axis. A **site program** takes an activation, the base's output and the tensors of one site,
and returns the output with the update added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx
from torch.fx.node import Argument

from tensorpeft.language.spec import SITE_MODES
from tensorpeft.network.network import Block, Group, Key, Operand, Term
from tensorpeft.network.shapes import Rows, Site
from tensorpeft.planning.plan import TOKEN, GroupPlan, Link, Plan, operand_modes
from tensorpeft.runtime import ops

_KEY_ORDER = (*SITE_MODES, "site")


@dataclass(frozen=True)
class Piece:
    """Where a site finds the tensor of a link: which stack, and which row of it."""

    stack: int
    row: int


@dataclass(frozen=True)
class Call:
    """What happens at one site: its program, and what it is given.

    The program's arguments are x, y, the task ids if ``by_task``, the kept columns and rows if masked (``indices``), and the
    pieces in order.
    """

    site: Site
    code: fx.GraphModule
    by_task: bool
    indices: tuple[Tensor, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Emitted:
    """All emitted code of an adapter, with one call for each site of the network, in its order."""

    prologue: fx.GraphModule
    inputs: tuple[str, ...]  # names of the blocks that the prologue takes, in order
    calls: tuple[Call, ...]


def emit(plan: Plan) -> Emitted:
    """The code of a plan. Sites with the same code share one module."""
    prologue = _Prologue(plan)
    calls: list[Call] = []
    known: dict[str, fx.GraphModule] = {}
    for group_plan in plan.groups:
        group = group_plan.group
        links = [
            (term, link) for term, chain in zip(group.terms, group_plan.chains, strict=True) for link in chain.links
        ]
        stacked = [prologue.stack(group, term, link) for term, link in links]
        by_rows: dict[Rows | None, fx.GraphModule] = {}
        for number, site in enumerate(group.sites):
            if site.rows not in by_rows:
                code = _site_program(group_plan, site.rows)
                by_rows[site.rows] = known.setdefault(code.code, code)
            pieces = tuple(Piece(stack, rows[number]) for stack, rows in stacked)
            calls.append(Call(site, by_rows[site.rows], _by_task(group_plan), _indices(group, site), pieces))
    return Emitted(prologue.finish(), tuple(prologue.inputs), tuple(calls))


def _indices(group: Group, site: Site) -> tuple[Tensor, ...]:
    """For each product, the kept columns of the input and the kept rows among the module's outputs, if masks drop some."""
    found = []
    for term in group.terms:
        rows = None if term.rows is None else site.row_indices()[term.rows]
        found += [torch.from_numpy(index) for index in (term.columns, rows) if index is not None]
    return tuple(found)


class _Prologue:
    """Builds the prologue's graph; asks for one stack after another."""

    def __init__(self, plan: Plan) -> None:
        self.graph = fx.Graph()
        self.dtype = self.graph.placeholder("dtype")
        self.inputs = {b.name: self.graph.placeholder(_identifier(b.name)) for b in plan.network.blocks}
        self.known: dict[tuple[object, ...], tuple[int, dict[Key, int]]] = {}
        self.cast: dict[str, fx.Node] = {}
        self.stacks: list[fx.Node] = []

    def finish(self) -> fx.GraphModule:
        self.graph.output(tuple(self.stacks))
        return fx.GraphModule({}, self.graph, "Prologue")

    def stack(self, group: Group, term: Term, link: Link) -> tuple[int, tuple[int, ...]]:
        """The number of a link's stack, and for every site of its group the row in it."""
        operands = [term.operands[i] for i in link.operands]
        if len(operands) > 1:
            return self._computed(group, term, operands, link)
        operand = operands[0]
        what = (operand.block.name, operand.modes, operand.sizes, operand.take, _only_key(operand), link.modes)
        if what not in self.known:
            self.known[what] = self._raw(operand, link)
        number, rows = self.known[what]
        return number, tuple(rows[key] for key in operand.keys)

    def _raw(self, operand: Operand, link: Link) -> tuple[int, dict[Key, int]]:
        """A factor as it is, cast once for all of its uses."""
        name = operand.block.name
        if name not in self.cast:
            self.cast[name] = self._call("to", self.inputs[name], self.dtype)
        node, keys = self._by_key(self.cast[name], operand)
        return self._append(node, operand, link), {key: row for row, key in enumerate(keys)}

    def _append(self, node: fx.Node, operand: Operand, link: Link) -> int:
        """Lay a stack (n, *modes of the operand) out as its link wants it."""
        order = (0, *(1 + operand.modes.index(mode) for mode in link.modes))
        if order != tuple(range(len(order))):
            node = self._call("permute", node, order)
        self.stacks.append(self._laid_out(node, link, dict(zip(operand.modes, operand.sizes, strict=True))))
        return len(self.stacks) - 1

    def _laid_out(self, node: fx.Node, link: Link, sizes: dict[str, int]) -> fx.Node:
        if not is_matmul(link):
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
        bound = [i for i, axis in enumerate(block.axes) if axis.labels is not None]
        bound.sort(key=lambda i: _KEY_ORDER.index(block.axes[i].mode))
        order = (*bound, *(i for i in range(len(block.axes)) if i not in bound))
        if order != tuple(range(len(order))):
            node = self._call("permute", node, order)
        if len(bound) > 1:
            return self._call("flatten", node, 0, len(bound) - 1)
        return node if bound else self._call("unsqueeze", node, 0)

    def _at_key(self, node: fx.Node, block: Block, key: Key) -> fx.Node:
        """What one key holds, over the free axes."""
        if block.kept is not None:
            position = block.keys.index(key)
            start, length = sum(block.key_sizes[:position]), block.key_sizes[position]
            return self._call("view", self._call("narrow", node, 0, start, length), block.key_shape(key))
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
        equation = _equation([ms for _, ms in operands], modes)
        return self.graph.call_function(torch.einsum, (equation, *(node for node, _ in operands)))

    def _call(self, method: str, node: fx.Node, *args: Argument) -> fx.Node:
        return self.graph.call_method(method, (node, *args))


def _only_key(operand: Operand) -> Key | None:
    """The key to read by itself: of a packed factor, or of one that is cut for this key alone."""
    alone = operand.block.kept is not None or any(take is not None for take in operand.take)
    return operand.keys[0] if alone and len({*operand.keys}) == 1 else None


def is_matmul(link: Link) -> bool:
    """Whether the activation's features are all contracted at once: then the link is a matrix (features, new features)."""
    features = link.before[link.before.index(TOKEN) + 1 :]
    return features == link.contracted and set(link.batch) <= {"task"}


def _site_program(plan: GroupPlan, rows: Rows | None) -> fx.GraphModule:
    graph, group = fx.Graph(), plan.group
    x, y = graph.placeholder("x"), graph.placeholder("y")
    ids = graph.placeholder("ids") if _by_task(plan) else None
    kept = iter(_index_placeholders(graph, group))
    number = 0
    for chain, term in zip(plan.chains, group.terms, strict=True):
        h, alpha = x, chain.sign * group.scale
        if term.columns is not None:
            h = graph.call_method("index_select", (x, -1, next(kept)))
        out = None if term.rows is None else next(kept)
        for link in chain.links:
            piece = graph.placeholder(f"p{number}")
            number += 1
            if "task" in link.batch:
                piece = graph.call_method("index_select", (piece, 0, ids))
            last = link is chain.links[-1]
            if last and is_matmul(link) and not link.batch and out is None and rows is None:
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
    if is_matmul(link) and not link.batch:
        return graph.call_function(torch.matmul, (h, piece))
    if link.modes == before == after and len(after) == 1:
        return graph.call_function(torch.mul, (h, piece))
    if is_matmul(link):
        return graph.call_function(torch.einsum, ("z...k,zkn->z...n", h, piece))
    if len(before) != 1:
        h = graph.call_function(ops.split, (h, tuple(term.sizes[mode] for mode in before)))
    lead = tuple(mode for mode in link.before[: link.before.index(TOKEN)])
    equation = _equation([(*lead, ..., *before), link.modes], (*lead, ..., *after))
    h = graph.call_function(torch.einsum, (equation, h, piece))
    return h if len(after) == 1 else graph.call_function(ops.merge, (h, len(after)))


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


def _by_task(plan: GroupPlan) -> bool:
    return any("task" in link.batch for chain in plan.chains for link in chain.links)


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


def _equation(inputs: Sequence[tuple[object, ...]], output: tuple[object, ...]) -> str:
    known: dict[object, str] = {...: "..."}

    def letters(modes: tuple[object, ...]) -> str:
        return "".join(
            known.setdefault(m, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"[len(known) - 1]) for m in modes
        )

    return f"{','.join(map(letters, inputs))}->{letters(output)}"


def _identifier(name: str) -> str:
    return f"block_{name}"
