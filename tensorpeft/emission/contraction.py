"""Emitted tensors with named modes, and how a contraction of two of them becomes torch's kernels.

Everything that a site does is a contraction of two tensors: forward, for the activation's gradient, and for a factor's. The
modes of the two and of the result say which kernel it is:

    nothing summed                                    a product with broadcasting   (addcmul_ where it is added)
    summed, and no mode in both and in the result     a matrix product              (addmm_)
    summed, with such modes                           a batch of matrix products    (baddbmm_)
    summed, and nothing left to multiply out          a product, then a sum

Sizes are known but for tokens and rows of a batch, so it is known here which views need no copy.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx

from tensorpeft.emission.named_tensor import Modes, NamedTensor, one_site
from tensorpeft.planning.chain import SITE
from tensorpeft.planning.orders import TOKEN


@dataclass(frozen=True)
class _Roles:
    """The roles of two tensors' modes in a contraction."""

    batch: Modes
    left: Modes
    right: Modes
    summed: Modes

    @property
    def of_result(self) -> tuple[Modes, ...]:
        """The axes of a product of matrices, or of a batch of them."""
        return (*((self.batch,) if self.batch else ()), self.left, self.right)


class ModeSizes(dict[str, "int | fx.Node"]):
    """The sizes of modes; it remembers which of a chain's were asked for."""

    def __init__(self, known: Mapping[str, int | fx.Node]) -> None:
        super().__init__(known)
        self.read: dict[tuple[int, str], int] = {}  # by the number of the chain
        self._of_chain: dict[str, int] = {}

    def use(self, number: int, sizes: Iterable[tuple[str, int]]) -> None:
        """Let modes have a chain's sizes."""
        for mode, size in sizes:
            self[mode] = size
            self._of_chain[mode] = number

    def __getitem__(self, mode: str) -> int | fx.Node:
        size = super().__getitem__(mode)
        if mode in self._of_chain and isinstance(size, int):
            self.read[self._of_chain[mode], mode] = size
        return size


class Code:
    """A graph under construction, with the sizes of its modes."""

    def __init__(self, sizes: Mapping[str, int | fx.Node] | None = None) -> None:
        self.graph = fx.Graph()
        self.sizes = ModeSizes(sizes or {})
        self.tokens: tuple[fx.Node, int] | None = None  # a tensor, and its axis that tells how many there are
        self._views: dict[tuple[object, ...], fx.Node] = {}

    def call(self, function: Any, *args: Any, **named: Any) -> fx.Node:
        """A call of a function, or of a method of the first argument."""
        if isinstance(function, str):
            return self.graph.call_method(function, args, named)
        return self.graph.call_function(function, args, named)

    def placeholder(self, name: str) -> fx.Node:
        """A new input; inputs come before everything else."""
        before = next((node for node in self.graph.nodes if node.op != "placeholder"), None)
        with self.graph.inserting_before(before) if before else nullcontext():
            return self.graph.placeholder(name)

    # Views

    def view(self, tensor: NamedTensor, groups: Sequence[Modes]) -> fx.Node | None:
        """The tensor with these axes, as a view; None where that takes a copy."""
        groups = tuple(groups)
        if groups == tensor.axes:
            return tensor.node
        at = [self._start(tensor, group) for group in groups]
        if None in at:
            return None
        order = sorted(range(len(groups)), key=lambda n: at[n] or 0)
        node = self._split(tensor, tuple(groups[n] for n in order))
        return self._permute(node, [order.index(n) for n in range(len(groups))])

    def grouped(self, tensor: NamedTensor, groups: Sequence[Modes]) -> fx.Node:
        """The tensor with these axes; a copy where they do not lie in memory like this."""
        groups = tuple(groups)
        found = self.view(tensor, groups)
        if found is not None:
            return found
        single = tuple((mode,) for mode in tensor.modes)
        order = [tensor.modes.index(mode) for group in groups for mode in group]
        if order == list(range(len(order))):
            return self.once("reshape", tensor.node, self._shape(groups))
        return self.once("reshape", self._permute(self._split(tensor, single), order), self._shape(groups))

    def regrouped(self, tensor: NamedTensor, groups: Sequence[Modes]) -> NamedTensor:
        """The same, and where memory jumps in it: behind every axis, if it is a view in another order."""
        groups = tuple(groups)
        at = [self._start(tensor, group) for group in groups]
        ends = [tensor.modes.index(group[-1]) + 1 for group in groups]
        if None in at:
            gaps: Iterable[int] = ()
        elif ends == sorted(ends):
            gaps = (n for n, end in enumerate(ends) if end in tensor.cuts)
        else:
            gaps = range(len(groups) - 1)
        return NamedTensor(self.grouped(tensor, groups), groups, frozenset(gaps))

    def arranged(self, a: NamedTensor, b: NamedTensor, keep: Iterable[str], *, each_site: bool = False) -> NamedTensor:
        """The tensor ``a``, copied if it does not lie in memory like its product with ``b`` wants it (at each site by itself)."""
        x, y = (one_site(a), one_site(b)) if each_site else (a, b)
        roles = self._roles(x, y, frozenset(keep))
        groups = tuple(group for group in (roles.batch, roles.left, roles.summed) if group)
        if not roles.summed or self._by_sum(x, roles) or all(self._start(x, group) is not None for group in groups):
            return a
        if each_site and SITE in a.modes:
            groups = ((SITE,), *groups)
        return self.regrouped(a, groups)

    def _start(self, tensor: NamedTensor, group: Modes) -> int | None:
        """Where a group of modes lies in memory, if its modes lie there one after the other."""
        start = tensor.modes.index(group[0])
        inside = range(start + 1, start + len(group))
        together = tensor.modes[start : start + len(group)] == group and not tensor.cuts.intersection(inside)
        return start if together else None

    def _split(self, tensor: NamedTensor, axes: tuple[Modes, ...]) -> fx.Node:
        return tensor.node if axes == tensor.axes else self.once("view", tensor.node, self._shape(axes))

    def _permute(self, node: fx.Node, order: list[int]) -> fx.Node:
        n = len(order)
        if order == list(range(n)):
            return node
        if order[-2:] == [n - 1, n - 2] and order[:-2] == list(range(n - 2)):  # an attribute costs no call
            return self.once(getattr, node, "T" if n == 2 else "mT")
        return self.once("permute", node, tuple(order))

    def once(self, function: Any, node: fx.Node, *args: Any) -> fx.Node:
        """A call whose result is the same wherever it is needed: a view, or a copy that nobody changes."""
        if (function, node, args) not in self._views:
            self._views[function, node, args] = self.call(function, node, *args)
        return self._views[function, node, args]

    def _shape(self, axes: Iterable[Modes]) -> tuple[int | fx.Node, ...]:
        shape = [self.size(axis) for axis in axes]
        row = next((n for n, size in enumerate(shape) if isinstance(size, fx.Node)), None)
        if row is not None and -1 not in shape:
            shape[row] = -1
        return tuple(shape)

    def size(self, axis: Modes) -> int | fx.Node:
        """How long an axis is; -1 where tokens are in it."""
        if TOKEN in axis:
            return -1
        sizes = [self.sizes[mode] for mode in axis]
        known = prod(size for size in sizes if isinstance(size, int))
        rows = [size for size in sizes if isinstance(size, fx.Node)]
        return known if not rows else rows[0] if known == 1 else self.call(operator.mul, rows[0], known)

    # Contractions

    def contract(self, a: NamedTensor, b: NamedTensor, keep: Iterable[str], alpha: float = 1) -> NamedTensor:
        """``alpha`` times the product of two tensors, summed over the modes that are not kept."""
        roles = self._roles(a, b, frozenset(keep))
        if not roles.summed or self._by_sum(a, roles):
            return self._elementwise(a, b, roles, alpha)
        x, y = self._matrices(a, b, roles)
        if alpha == 1:
            node = self.call(torch.bmm if roles.batch else torch.mm, x, y)
        else:  # in one kernel: what is scaled is added to nothing
            scaled, nothing = torch.baddbmm if roles.batch else torch.addmm, self.call("new_empty", x, ())
            node = self.call(scaled, nothing, x, y, beta=0, alpha=alpha)
        groups = roles.of_result
        for n in reversed([n for n, group in enumerate(groups) if not group]):
            node = self.call(operator.getitem, node, 0) if n == 0 else self.call("squeeze", node, n)
        return NamedTensor(node, tuple(group for group in groups if group))

    def accumulate(
        self, into: NamedTensor, a: NamedTensor, b: NamedTensor, alpha: float = 1, *, keep: bool = True
    ) -> None:
        """``add`` in two kernels where one cannot. Without ``keep`` what ``into`` held before is lost."""
        if not self.add(into, a, b, alpha, keep=keep):
            self.put(into, self.contract(a, b, into.modes, alpha), keep=keep)

    def put(self, into: NamedTensor, found: NamedTensor, *, keep: bool = True) -> None:
        """Add a tensor to another one, in the memory of that one, or overwrite it."""
        target = self.view(into, found.axes)
        source = found.node if target is not None else self.grouped(found, into.axes)
        self.call("add_" if keep else "copy_", into.node if target is None else target, source)

    def add(self, into: NamedTensor, a: NamedTensor, b: NamedTensor, alpha: float = 1, *, keep: bool = True) -> bool:
        """Add ``alpha`` times a product to ``into``, in its memory, in one kernel; False, and nothing done, if none can."""
        roles = self._roles(a, b, frozenset(into.modes))
        if not roles.summed:
            segments = self._segments(a, b, roles)
            target = self.view(into, segments)
            if target is None or not keep:
                return False
            left, right = self._aligned(a, segments), self._aligned(b, segments)
            self.call("addcmul_", target, left, right, **({} if alpha == 1 else {"value": alpha}))
            return True
        if self._by_sum(a, roles):
            return False
        groups = roles.of_result
        if self.view(into, tuple(group for group in groups if group)) is None:
            return False
        target, (x, y) = self._matrix(into, groups), self._matrices(a, b, roles)
        if keep:
            method = "baddbmm_" if roles.batch else "addmm_"
            self.call(method, target, x, y, **({} if alpha == 1 else {"alpha": alpha}))
        elif alpha == 1:
            self.call(torch.bmm if roles.batch else torch.mm, x, y, out=target)
        else:
            function = torch.baddbmm if roles.batch else torch.addmm
            self.call(function, target, x, y, beta=0, alpha=alpha, out=target)
        return True

    def _roles(self, a: NamedTensor, b: NamedTensor, keep: frozenset[str]) -> _Roles:
        """The modes of each role, in a's order unless b's saves a copy."""
        left, right = (tuple(m for m in one.modes if m not in other.modes) for one, other in ((a, b), (b, a)))
        both = [[m for m in one.modes if m in other.modes] for one, other in ((a, b), (b, a))]
        split = [[tuple(m for m in each if (m in keep) == kept) for kept in (True, False)] for each in both]
        found = [_Roles(batch, left, right, summed) for batch, summed in split]
        return min(found, key=lambda roles: self._copies(a, b, roles))

    def _copies(self, a: NamedTensor, b: NamedTensor, roles: _Roles) -> int:
        """How many copies a contraction takes; those of activations, which are larger, count twice."""
        needed = ((a, (roles.batch, roles.left, roles.summed)), (b, (roles.batch, roles.summed, roles.right)))
        return sum(
            1 + (TOKEN in tensor.modes)
            for tensor, groups in needed
            if any(group and self._start(tensor, group) is None for group in groups)
        )

    def _by_sum(self, a: NamedTensor, roles: _Roles) -> bool:
        """Whether to multiply and then sum: there is no matrix in it, or only vectors that lie across memory."""
        if not (roles.left or roles.right):
            return True
        return bool(roles.batch) and not (roles.left and roles.right) and a.modes[-1] in roles.batch

    def _matrices(self, a: NamedTensor, b: NamedTensor, roles: _Roles) -> tuple[fx.Node, fx.Node]:
        lead = (roles.batch,) if roles.batch else ()
        return self._matrix(a, (*lead, roles.left, roles.summed)), self._matrix(b, (*lead, roles.summed, roles.right))

    def _matrix(self, tensor: NamedTensor, groups: tuple[Modes, ...]) -> fx.Node:
        return self._unsqueezed(self.grouped(tensor, tuple(group for group in groups if group)), map(bool, groups))

    def _unsqueezed(self, node: fx.Node, there: Iterable[bool]) -> fx.Node:
        """A tensor with axes of size 1 where some are not ``there``."""
        for n, is_there in enumerate(there):
            if not is_there:
                node = self.once("unsqueeze", node, n) if n else self.once(operator.getitem, node, None)
        return node

    def _elementwise(self, a: NamedTensor, b: NamedTensor, roles: _Roles, alpha: float) -> NamedTensor:
        """The product with broadcasting, summed where something is."""
        segments = self._segments(a, b, roles)
        small, large = (a, b) if len(a.modes) < len(b.modes) else (b, a)
        right = self._aligned(small, segments)
        if alpha != 1:
            right = self.call(operator.mul, right, alpha)
        node = self.call(operator.mul, self._aligned(large, segments), right)
        summed = tuple(n for n, segment in enumerate(segments) if segment[0] in roles.summed)
        if summed:
            node = self.call("sum", node, summed)
        axes = tuple(segment for n, segment in enumerate(segments) if n not in summed)
        if len(axes) > 1 and not (self._in_order(a, segments) and self._in_order(b, segments)):
            node = self.call("contiguous", node)  # a product lies in memory like its factors
        return NamedTensor(node, axes)

    def _in_order(self, tensor: NamedTensor, segments: tuple[Modes, ...]) -> bool:
        """Whether a tensor is known to lie in memory in the order of these axes, but for those that it lacks."""
        starts = [tensor.modes.index(segment[0]) for segment in segments if segment[0] in tensor.modes]
        return not tensor.gaps and starts == sorted(starts)

    def _segments(self, a: NamedTensor, b: NamedTensor, roles: _Roles) -> tuple[Modes, ...]:
        """The modes of a product in runs that each tensor has as one axis or lacks: a's, with b's own behind them."""
        order = (*a.modes, *roles.right)
        if SITE in roles.right:  # which of several sites it is comes first
            order = (SITE, *(mode for mode in order if mode != SITE))
        runs: list[Modes] = []
        for mode in order:
            if runs and self._same(runs[-1], mode, a, b, roles.summed):
                runs[-1] = (*runs[-1], mode)
            else:
                runs.append((mode,))
        return tuple(runs)

    def _same(self, run: Modes, mode: str, a: NamedTensor, b: NamedTensor, summed: Modes) -> bool:
        if any((mode in modes) != (run[-1] in modes) for modes in (summed, a.modes, b.modes)):
            return False
        return all(self._start(tensor, (*run, mode)) is not None for tensor in (a, b) if mode in tensor.modes)

    def _aligned(self, tensor: NamedTensor, segments: tuple[Modes, ...]) -> fx.Node:
        """The tensor over the segments, of size 1 in those that it lacks; broadcasting sees to those before its first."""
        mine = tuple(segment for segment in segments if segment[0] in tensor.modes)
        behind = segments[segments.index(mine[0]) :] if mine else ()
        return self._unsqueezed(self.grouped(tensor, mine), (segment in mine for segment in behind))

    # Parts of a tensor

    def member(self, tensor: NamedTensor, number: int) -> NamedTensor:
        """One site's part of a tensor of several sites; the tensor itself if it has no such mode."""
        at = next((n for n, axis in enumerate(tensor.axes) if SITE in axis), None)
        if at is None:
            return tensor
        axis = tensor.axes[at]
        sizes = [size for mode in axis[1:] if isinstance(size := self.sizes.get(mode), int)]  # none of tokens, of rows
        if axis[0] == SITE and 1 < len(axis) == 1 + len(sizes):
            width = prod(sizes)
            return replace(one_site(tensor), node=self.once("narrow", tensor.node, at, number * width, width))
        parts = (axis[: axis.index(SITE)], (SITE,), axis[axis.index(SITE) + 1 :])
        whole = (*tensor.axes[:at], *(part for part in parts if part), *tensor.axes[at + 1 :])
        node, at = self._split(tensor, whole), whole.index((SITE,))
        part = self.once("select", node, at, number) if at else self.once(operator.getitem, node, number)
        return replace(one_site(tensor), node=part)

    def empty(self, like: fx.Node, modes: Modes) -> NamedTensor:
        """A new tensor with one axis for each mode; ``like`` gives dtype and device."""
        assert self.tokens is not None or TOKEN not in modes
        shape = tuple(
            self.length(*self.tokens) if mode == TOKEN and self.tokens else self.size((mode,)) for mode in modes
        )
        return NamedTensor(self.call("new_empty", like, shape), tuple((mode,) for mode in modes))

    def length(self, node: fx.Node, axis: int) -> fx.Node:
        """How long an axis of a tensor is when the code runs."""
        return self.once(operator.getitem, self.once(getattr, node, "shape"), axis)
