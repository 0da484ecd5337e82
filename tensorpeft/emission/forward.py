"""Emits the code of an input set: what its sites compute together, what each module does with it, and the backward pass.

    forward   (x, what is given) -> activations
    landing   (y, some of these) -> y, for each module: the last links, added in y's own memory
    backward  (x, some of these, the gradient of each y) -> the gradient of x; those of the pieces are added up in place

Strands whose first links are plain matrices over the whole input share one product with all of these matrices (``Head``).
Tensors have names, by which the three find each other's: x, y, what is given (``p0``, ``ids``, ``columns0`` ...), the activations
``a0`` ... that the forward pass leaves, the gradients ``g0`` ... of the modules' outputs, and ``into0`` ... for those of pieces.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import getitem

from torch import fx

from tensorpeft.emission import ops
from tensorpeft.emission.chain_code import ROW, Run
from tensorpeft.emission.contraction import Code, Modes, Named
from tensorpeft.emission.graph import HEAD, INPUT, Function, SetGraph, rows_of
from tensorpeft.emission.input_kind import Head, Place, SetKind
from tensorpeft.emission.lowering import Strand
from tensorpeft.planning.orders import TOKEN


class SetCode:
    """The functions of kinds of input sets that differ in nothing but sizes that are not in the forward pass."""

    def __init__(self, kind: SetKind) -> None:
        self.kind = kind
        self.graph = SetGraph(kind)
        self.runs = [Run() for _ in kind.strands]
        self.exported: dict[fx.Node, str] = {}
        self.x, self.lead = self.graph.flat("x", kind.d_in)
        self.mask: fx.Node | None = None
        self._forward()
        self._name_exports()
        self.forward = self.graph.finish(tuple(self.exported), tuple(self.exported.values()), "Forward")

    @property
    def read(self) -> Mapping[tuple[int, str], int]:
        """Which sizes of strands are in the forward pass."""
        return self.forward.read

    # Forward

    def _forward(self) -> None:
        code = self.graph.code
        if self.kind.dropout:
            dropped = code.call(ops.dropout, self.x, self.kind.dropout, self.graph.take("training"))
            self.x, self.mask = (code.call(getitem, dropped, n) for n in (0, 1))
        heads = {strand: head for head in self.kind.heads for strand, _, _ in head.columns}
        results = {head: self._head(head) for head in self.kind.heads}
        for number, strand in enumerate(self.kind.strands):
            emitted = self.graph.strand(number)
            emitted.use()
            if number in heads:
                emitted.forward(self.columns(code, results[heads[number]], heads[number], number), self.runs[number], 1)
            else:
                emitted.forward(self._input(self.graph, self.x, strand, number), self.runs[number])

    def _head(self, head: Head) -> Named:
        code = self.graph.code
        code.sizes[HEAD] = head.width
        matrix = Named(self.graph.take(f"p{head.piece}"), ((HEAD,), (INPUT,)))
        return code.contract(Named(self.x, (*self.lead, (INPUT,))), matrix, (ROW, TOKEN, HEAD))

    def columns(self, code: Code, whole: Named, head: Head, number: int) -> Named:
        """The part of a head's result, or of its gradient, that is a strand's."""
        first, count = next(columns for strand, *columns in head.columns if strand == number)
        axes = (*whole.axes[:-1], self.kind.strands[number].met[0].pieces[0].axes[0])
        if count == head.width:
            return Named(whole.node, axes)
        return Named(code.once("narrow", whole.node, -1, first, count), axes, frozenset({len(axes) - 2}))

    def _input(self, graph: SetGraph, x: fx.Node, strand: Strand, number: int) -> Named:
        if strand.columns:
            x = graph.code.once("index_select", x, -1, graph.take(f"columns{number}"))
        return Named(x, (*self.lead, strand.d_in))

    def _name_exports(self) -> None:
        """What landings and the backward pass need of the forward pass: it returns this."""
        needed = [] if self.mask is None else [self.mask, self.x]
        for strand, run in zip(self.kind.strands, self.runs, strict=True):
            last = len(strand.met) - 1
            needed += [run.inputs[n].node for n in run.inputs if n == last or strand.met[n].link.trainable]
            needed += [mask for mask, _ in run.masks.values()]
            needed += [] if run.tensor is None else [run.tensor.node]
        for node in needed:
            if node is not self.x or self.mask is not None:
                self.exported.setdefault(node, f"a{len(self.exported)}")

    def export(self, graph: SetGraph, named: Named) -> Named:
        """A tensor of the forward pass in another graph."""
        if named.node is self.x and self.mask is None:
            return replace(named, node=graph.flat("x", self.kind.d_in)[0])
        return replace(named, node=self.export_node(graph, named.node))

    def export_node(self, graph: SetGraph, node: fx.Node) -> fx.Node:
        return graph.take(self.exported[node])

    # Landing

    def landing(self, kind: SetKind, module: int, *, in_place: bool) -> Function:
        """Add the updates of a module's sites to its output."""
        graph = SetGraph(kind)
        y, lead = graph.flat("y", kind.d_out[module])
        for place in kind.modules[module]:
            for number in place.strands:
                y = self._land(graph, y, lead, place, number, in_place=in_place)
        whole = graph.take("y")
        return graph.finish(
            whole if in_place else graph.code.call("reshape", y, graph.code.call(getattr, whole, "shape")),
            ("y",),
            "Landing",
        )

    def _land(
        self, graph: SetGraph, y: fx.Node, lead: tuple[Modes, ...], place: Place, number: int, *, in_place: bool
    ) -> fx.Node:
        strand, code, rows = graph.kind.strands[number], graph.code, place.rows
        emitted = graph.strand(number)
        emitted.use()
        last = len(strand.met) - 1
        built = self.runs[number].tensor
        run = Run({last: self.export(graph, self.runs[number].inputs[last])})
        run.tensor = None if built is None else self.export(graph, built)
        axes = (*lead, strand.d_out)
        if in_place and not strand.kept:
            target = rows_of(graph, Named(y, axes), rows)
            if target is not None and emitted.land(run, place.member, target):
                return y
        node = code.grouped(emitted.update(run, place.member, Named(y, axes).modes), axes)
        added = self._added(graph, y, node, number, place, in_place=in_place)
        return y if in_place else added

    def _added(
        self, graph: SetGraph, y: fx.Node, update: fx.Node, number: int, place: Place, *, in_place: bool
    ) -> fx.Node:
        rows = place.rows
        if graph.kind.strands[number].kept:
            index = graph.take(f"rows{number}_{place.member}")
            return graph.code.call("index_add_" if in_place else "index_add", y, -1, index, update)
        if rows is None:
            return graph.code.call("add_" if in_place else "add", y, update)
        function = ops.add_rows_ if in_place else ops.with_rows
        return graph.code.call(function, y, update, rows.offset, rows.count, rows.period)
