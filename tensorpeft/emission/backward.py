"""Emits the backward pass of an input set."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from tensorpeft.emission import ops
from tensorpeft.emission.chain_code import Run, Slot, StrandCode
from tensorpeft.emission.contraction import Named
from tensorpeft.emission.forward import SetCode
from tensorpeft.emission.graph import HEAD, INPUT, Function, SetGraph, rows_of
from tensorpeft.emission.input_kind import Head, Place, SetKind
from tensorpeft.emission.lowering import Strand


class Backward:
    """From the gradients of the modules in ``present`` to that of x, and to those of the pieces, in one graph."""

    def __init__(
        self, forward: SetCode, kind: SetKind, present: frozenset[int], *, to_x: bool, to_pieces: bool
    ) -> None:
        self.forward, self.kind = forward, kind
        self.to_x, self.to_pieces = to_x, to_pieces
        self.graph = SetGraph(self.kind)
        self.code = self.graph.code
        self.gradients = self._gradients(present)
        self.dx = Slot(self.code, (*(mode for axis in forward.lead for mode in axis), INPUT))
        self.parts: dict[str, fx.Node] = {}

    def function(self) -> Function:
        headed = {strand for head in self.kind.heads for strand, _, _ in head.columns}
        for head in self.kind.heads:
            self._head(head)
        for number in self.gradients:
            if number not in headed:
                self._alone(number)
        found = self.dx.named.node if self.dx.named is not None else None
        if found is not None and self.forward.mask is not None:
            mask = self.forward.export_node(self.graph, self.forward.mask)
            found = self.code.call(ops.undrop, found, mask, self.kind.dropout)
        return self.graph.finish((found, *self.parts.values()), ("dx", *self.parts), "Backward")

    def _gradients(self, present: frozenset[int]) -> dict[int, dict[int, Named]]:
        """Of each strand, the gradient of the output at each of its sites."""
        found: dict[int, dict[int, Named]] = {}
        for module in sorted(present):
            node, lead = self.graph.flat(f"g{module}", self.kind.d_out[module])
            self.code.tokens = node, len(lead) - 1
            for place in self.kind.modules[module]:
                for number in place.strands:
                    axes = (*lead, self.kind.strands[number].d_out)
                    found.setdefault(number, {})[place.member] = self._of_site(Named(node, axes), place, number)
        return {number: dict(sorted(members.items())) for number, members in sorted(found.items())}

    def _of_site(self, gradient: Named, place: Place, number: int) -> Named:
        if self.kind.strands[number].kept:
            index = self.graph.take(f"rows{number}_{place.member}")
            return Named(self.code.once("index_select", gradient.node, -1, index), gradient.axes)
        part = rows_of(self.graph, gradient, place.rows)
        if part is None:
            assert place.rows is not None
            rows = place.rows
            node = self.code.once(ops.rows_of, gradient.node, rows.offset, rows.count, rows.period)
            part = Named(self.code.once("flatten", node, -2), gradient.axes)
        return part

    def _run(self, number: int) -> tuple[StrandCode, Run]:
        """A strand's code here, and of its activations those that its links' gradients need."""
        emitted = self.graph.strand(number, gradients=self.to_pieces)
        emitted.use()
        run, links = self.forward.runs[number], self.kind.strands[number].met
        needed = {n for n, met in enumerate(links) if met.link.trainable and self.to_pieces}
        inputs = {
            n: self.forward.export(self.graph, named) if n in needed else named for n, named in run.inputs.items()
        }
        masks = {n: (self.forward.export_node(self.graph, mask), axes) for n, (mask, axes) in run.masks.items()}
        return emitted, Run(inputs, masks)

    def _finish(self, number: int, emitted: StrandCode) -> None:
        for piece, node in emitted.parts.items():
            self.parts[f"into{self.kind.pieces[number][piece]}"] = node

    def _alone(self, number: int) -> None:
        """A strand that has its first link for itself."""
        strand = self.kind.strands[number]
        emitted, run = self._run(number)
        dx = self._slot_of_x(strand) if self.to_x else None
        if len(strand.met) == 1:
            emitted.land_back(self.gradients[number], run, dx)
        else:
            last = Slot(self.code, run.inputs[len(strand.met) - 1].modes)
            emitted.land_back(self.gradients[number], run, last)
            emitted.back(run, last, dx)
        self._finish(number, emitted)
        if dx is not None:
            self._put_x(number, strand, self.code.regrouped(dx.found, (*self.forward.lead, strand.d_in)))

    def _slot_of_x(self, strand: Strand) -> Slot:
        modes = (*self.dx.modes[:-1], *strand.d_in)
        if self.dx.named is None or strand.columns:
            return Slot(self.code, modes)
        return Slot(self.code, modes, replace(self.dx.named, axes=(*self.dx.named.axes[:-1], strand.d_in)), filled=True)

    def _put_x(self, number: int, strand: Strand, part: Named) -> None:
        if strand.columns:
            if self.dx.named is None:
                self.dx.named = self.code.empty(part.node, self.dx.modes)
                self.code.call("zero_", self.dx.named.node)
            whole = self.code.grouped(self.dx.named, (*self.forward.lead, (INPUT,)))
            self.code.call("index_add_", whole, -1, self.graph.take(f"columns{number}"), part.node)
        elif self.dx.named is None:
            self.dx.named = replace(part, axes=(*self.forward.lead, (INPUT,)))
        self.dx.filled = True

    def _head(self, head: Head) -> None:
        """The strands of a head, and then the head."""
        whole: Named | None = None
        present = [(strand, *columns) for strand, *columns in head.columns if strand in self.gradients]
        if not present:
            return
        filled: set[int] = set()
        for number, first, count in present:
            emitted, run = self._run(number)
            if whole is None and count < head.width:
                self.code.sizes[HEAD] = head.width
                like = next(iter(self.gradients[number].values())).node
                whole = self.code.empty(like, (*self.dx.modes[:-1], HEAD))
                if len(present) < len(head.columns):
                    self.code.call("zero_", whole.node)
            modes = run.inputs[1].modes
            part = None if whole is None else self.forward.columns(self.code, whole, head, number)
            into = Slot(self.code, modes, part, filled=first in filled)
            if len(self.kind.strands[number].met) == 2:
                emitted.land_back(self.gradients[number], run, into)
            else:
                last = Slot(self.code, run.inputs[len(self.kind.strands[number].met) - 1].modes)
                emitted.land_back(self.gradients[number], run, last)
                emitted.back(run, last, into, stop=1)
            filled.add(first)
            self._finish(number, emitted)
            if whole is None:
                axes = (*self.forward.lead, self.kind.strands[number].met[0].pieces[0].axes[0])
                whole = replace(self.code.regrouped(into.found, axes), axes=(*self.forward.lead, (HEAD,)))
        assert whole is not None
        self._head_back(head, whole)

    def _head_back(self, head: Head, gradient: Named) -> None:
        self.code.sizes[HEAD] = head.width
        axes = ((HEAD,), (INPUT,))
        if head.trainable and self.to_pieces:
            x = self.forward.export(self.graph, Named(self.forward.x, (*self.forward.lead, (INPUT,))))
            self.code.accumulate(Named(self.graph.take(f"into{head.piece}"), axes), gradient, x)
        if self.to_x:
            self.dx.add(gradient, Named(self.graph.take(f"p{head.piece}"), axes))
