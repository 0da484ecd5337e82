"""Emits one strand into the graphs of its input set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import getitem

import torch
from torch import fx

from tensorpeft.emission import ops
from tensorpeft.emission.contraction import Code, Modes, Named
from tensorpeft.emission.lowering import Met, Piece, Strand
from tensorpeft.planning.chain import SITE

ROW = "task"  # of an activation: the row of the batch, whose task chooses among a factor's


@dataclass
class Given:
    """The nodes of what a strand is given in a graph, each made when it is asked for."""

    piece: Callable[[int], fx.Node]
    index: Callable[
        [str], fx.Node
    ]  # of ``columns``, which it reads, and ``kept``, the rows of the site that it changes
    number: int = 0  # of the strand
    ids: fx.Node | None = None  # the task of each row
    training: fx.Node | None = None
    into: Callable[[int], fx.Node] | None = None  # where the gradient of a piece is added up


@dataclass
class Slot:
    """Where the gradient of an activation comes together; the first to arrive makes it, unless it is a part of another."""

    code: Code
    modes: Modes
    named: Named | None = None
    filled: bool = False

    def add(self, a: Named, b: Named, alpha: float = 1) -> None:
        if self.named is None:
            self.named = self.code.contract(a, b, self.modes, alpha)
        else:
            self.code.accumulate(self.named, a, b, alpha, keep=self.filled)
        self.filled = True

    @property
    def found(self) -> Named:
        assert self.named is not None
        return self.named


@dataclass
class Run:
    """What a strand's forward pass leaves for its landing and its backward pass."""

    inputs: dict[int, Named] = field(default_factory=dict)  # of each link: the activation that it meets
    masks: dict[int, tuple[fx.Node, tuple[Modes, ...]]] = field(
        default_factory=dict
    )  # behind a link: what dropout left
    tensor: Named | None = None  # of the last link, where it was built


class StrandCode:
    """A strand in one graph."""

    def __init__(self, code: Code, strand: Strand, given: Given) -> None:
        self.code, self.strand, self.given = code, strand, given
        self.parts: dict[int, fx.Node] = {}  # gradients of pieces that no kernel adds up in place
        self._tensors: dict[int, Named] = {}
        self._built: dict[int, list[Named]] = {}
        self._whole: dict[int, Slot] = {}  # gradients of tensors that are built
        first = 0
        self._first: list[int] = []  # of each link: the number of its first piece
        for met in strand.met:
            self._first.append(first)
            first += len(met.pieces)

    def use(self) -> None:
        """Let the graph's modes have this strand's sizes."""
        self.code.sizes.use(self.given.number, self.strand.sizes)
        if self.given.ids is not None:
            self.code.sizes[ROW] = self.code.once("size", self.given.ids, 0)

    # Tensors

    def tensor(self, link: int) -> Named:
        """The tensor of a link."""
        if link not in self._tensors:
            met = self.strand.met[link]
            self._tensors[link] = self._build(link, met) if met.link.at_site else self._piece(self._first[link])
        return self._tensors[link]

    def _piece(self, number: int) -> Named:
        """A piece; one that has tasks as the rows of the batch choose from it."""
        piece = [piece for met in self.strand.met for piece in met.pieces][number]
        node = self.given.piece(number)
        if piece.base is not None:
            for axis, cut in enumerate(piece.cut):
                index = self.given.index(f"take{piece.operands[0]}_{axis}_") if cut else None
                node = node if index is None else self.code.once("index_select", node, axis, index)
            whole = Named(node, piece.base, frozenset({0}))  # Conv1D holds it the other way round
            return Named(self.code.grouped(whole, piece.axes), piece.axes, frozenset({len(piece.base[0]) - 1}))
        if (ROW,) in piece.axes:
            node = self.code.once("index_select", node, piece.axes.index((ROW,)), self.given.ids)
        return Named(node, piece.axes)

    def _build(self, link: int, met: Met) -> Named:
        """The tensor of a link, of its pieces; ``_built`` keeps them and what comes of each step."""
        self._built[link] = made = [self._piece(self._first[link] + n) for n in range(len(met.pieces))]
        for step in met.link.steps:
            one, other = step.inputs
            made.append(self.code.contract(made[one], made[other], (SITE, *step.result)))
        return made[-1]

    # Forward

    def forward(self, activation: Named, run: Run, start: int = 0) -> None:
        """From the activation that link ``start`` meets to the one that the last link meets."""
        last = len(self.strand.met) - 1
        for link in range(start, last):
            met, tensor = self.strand.met[link], self.tensor(link)
            activation = run.inputs[link] = self.code.arranged(activation, tensor, met.link.after)
            activation = self.code.contract(activation, tensor, met.link.after)
            if met.dropout:
                dropped = self.code.call(ops.dropout, activation.node, met.dropout, self.given.training)
                run.masks[link] = self.code.call(getitem, dropped, 1), activation.axes
                activation = Named(self.code.call(getitem, dropped, 0), activation.axes)
        keep = self.strand.met[last].link.after
        run.inputs[last] = self.code.arranged(activation, self._outline(last), keep, each_site=True)

        if self.strand.met[last].link.at_site:
            run.tensor = self.tensor(last)

    def _outline(self, link: int) -> Named:
        """A link's tensor as it will be, before anything of it is emitted."""
        met = self.strand.met[link]
        if met.link.at_site:
            return self.tensor(link)
        return Named(self.given.piece(self._first[link]), met.pieces[0].axes)

    def land(self, run: Run, member: int, y: Named) -> bool:
        """Add the update at one site to its output, in place; False, and nothing done, where that takes more than a kernel."""
        return self.code.add(y, *self._at(run, member), self.strand.alpha)

    def update(self, run: Run, member: int, keep: Modes) -> Named:
        """The update at one site by itself."""
        return self.code.contract(*self._at(run, member), keep, self.strand.alpha)

    def _at(self, run: Run, member: int) -> tuple[Named, Named]:
        last = len(self.strand.met) - 1
        tensor = run.tensor or self.tensor(last)
        return self.code.member(run.inputs[last], member), self.code.member(tensor, member)

    # Backward

    def land_back(self, gradients: dict[int, Named], run: Run, slot: Slot | None) -> None:
        """From the gradients of the outputs at the sites, some or all, to that of the activation that the last link met."""
        last = len(self.strand.met) - 1
        activation, tensor, alpha = run.inputs[last], self.tensor(last), self.strand.alpha
        several = SITE in activation.modes
        if several and {*tensor.modes} <= {*activation.modes}:
            gradient = self._together(gradients)
            self.gradient(last, gradient, activation, alpha)
            if slot is not None:
                slot.add(gradient, tensor, alpha)
            return
        if slot is not None and slot.named is None and several:
            slot.named = self.code.empty(next(iter(gradients.values())).node, activation.modes)
            if len(gradients) < self.strand.members:
                self.code.call("zero_", slot.named.node)
        for number, gradient in gradients.items():
            if slot is not None:
                mine = self._part(slot, number) if several else slot
                mine.add(gradient, self.code.member(tensor, number), alpha)
            if self._trains(last):
                self.gradient(last, gradient, self.code.member(activation, number), alpha, number)
        if slot is not None:
            slot.filled = True
        if last in self._whole:
            self._unbuild(last, self.strand.met[last], self._whole[last].found)

    def _part(self, slot: Slot, number: int) -> Slot:
        part = self.code.member(slot.found, number)
        return Slot(self.code, part.modes, part, slot.filled)

    def _together(self, gradients: dict[int, Named]) -> Named:
        first = next(iter(gradients.values()))
        nodes = [self.code.grouped(gradient, first.axes) for gradient in gradients.values()]
        missing = self.strand.members - len(nodes)
        if missing:
            zero = self.code.call(torch.zeros_like, nodes[0])
            nodes = [nodes.pop(0) if number in gradients else zero for number in range(self.strand.members)]
        return Named(self.code.call(torch.stack, nodes), ((SITE,), *first.axes))

    def back(self, run: Run, slot: Slot, dx: Slot | None, stop: int = 0) -> None:
        """From the gradient of the last link's activation to that of what link ``stop`` met, which goes to ``dx``."""
        for link in range(len(self.strand.met) - 2, stop - 1, -1):
            tensor, activation = self.tensor(link), run.inputs[link]
            gradient = self.code.arranged(self._undropped(link, slot.found, run), tensor, activation.modes)
            self.gradient(link, gradient, activation)
            into = dx if link == stop else Slot(self.code, activation.modes)
            if into is not None:
                into.add(gradient, tensor)
                slot = into

    def _undropped(self, link: int, gradient: Named, run: Run) -> Named:
        if link not in run.masks:
            return gradient
        mask, axes = run.masks[link]
        node = self.code.call(ops.undrop, self.code.grouped(gradient, axes), mask, self.strand.met[link].dropout)
        return Named(node, axes)

    # Gradients of pieces

    def _trains(self, link: int) -> bool:
        return self.given.into is not None and self.strand.met[link].link.trainable

    def gradient(self, link: int, a: Named, b: Named, alpha: float = 1, member: int | None = None) -> None:
        """Add the product of an activation and a gradient to that of a link's tensor; to that of one site, or whole."""
        met = self.strand.met[link]
        if not self._trains(link):
            return
        if met.link.at_site:
            self._gradient_of_built(link, met, a, b, alpha, member)
        else:
            self._deliver(self._first[link], met.pieces[0], a, b, alpha, member)

    def _deliver(
        self, number: int, piece: Piece, a: Named, b: Named, alpha: float = 1, member: int | None = None
    ) -> None:
        assert self.given.into is not None
        node = self.given.into(number)
        into = Named(node, piece.axes)
        into = into if member is None else self.code.member(into, member)
        if (ROW,) in into.axes:
            found = self.code.grouped(self.code.contract(a, b, into.modes, alpha), into.axes)
            self.code.call("index_add_", into.node, into.axes.index((ROW,)), self.given.ids, found)
        elif not self.code.add(into, a, b, alpha):
            result = self.code.contract(a, b, into.modes, alpha)
            if into.node is node and number not in self.parts:
                self.parts[number] = self.code.grouped(result, piece.axes)
            else:
                self.code.put(into, result)

    def _gradient_of_built(self, link: int, met: Met, a: Named, b: Named, alpha: float, member: int | None) -> None:
        """Of a tensor that was built; whole, it goes on to its pieces, and else when all sites have brought their share."""
        tensor = self.tensor(link)
        if member is None or SITE not in tensor.modes:
            self._whole.setdefault(link, Slot(self.code, tensor.modes)).add(a, b, alpha)
        else:
            if link not in self._whole:
                made = self.code.empty(a.node, tensor.modes)
                self.code.call("zero_", made.node)
                self._whole[link] = Slot(self.code, tensor.modes, made)
            part = self.code.member(self._whole[link].found, member)
            self.code.accumulate(part, a, b, alpha, keep=False)
        if member is None:
            self._unbuild(link, met, self._whole[link].found)

    def _unbuild(self, link: int, met: Met, gradient: Named) -> None:
        made, n_pieces, pairs = self._built[link], len(met.pieces), met.link.pairs
        wanted = [piece.trainable for piece in met.pieces]
        for one, other in pairs:
            wanted.append(wanted[one] or wanted[other])
        arrived = {len(made) - 1: gradient}
        for number in range(len(made) - 1, n_pieces - 1, -1):
            one, other = pairs[number - n_pieces]
            for mine, its in ((one, other), (other, one)):
                if wanted[mine] and mine < n_pieces:
                    self._deliver(self._first[link] + mine, met.pieces[mine], arrived[number], made[its])
                elif wanted[mine]:
                    arrived[mine] = self.code.contract(arrived[number], made[its], made[mine].modes)
