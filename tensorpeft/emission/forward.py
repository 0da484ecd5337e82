"""Emits the forward pass of an input set, and the epilogue of each of its modules.

    forward   (x, what is given) -> activations: what the sites compute together
    epilogue  (y, some of these) -> y, one for each module: its last links, added in the memory of y
    backward  (x, some of these, the gradient of each y) -> the gradient of x; those of the arguments are added up in place

Chains that begin with plain matrices over the whole input share one product with all of them (``FusedProjection``). Tensors
have names, by which one function finds what another returns: x, y, what is given (``p0``, ``ids``, ``columns0`` ...), the
activations ``a0`` ... of the forward pass, the gradients ``g0`` ... of the outputs, ``into0`` ... for those of the arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from operator import getitem

from torch import fx

from tensorpeft.emission import ops
from tensorpeft.emission.chain_code import ChainCode, ChainTrace
from tensorpeft.emission.contraction import Code
from tensorpeft.emission.graph import INPUT, OUTPUT, PROJECTION, ROW, Function, SetGraph, rows_of
from tensorpeft.emission.lowering import FusedProjection, LoweredChain, ModuleSite, SetKind
from tensorpeft.emission.named_tensor import Modes, NamedTensor
from tensorpeft.planning.orders import TOKEN


class SetCode:
    """The functions of kinds of input sets that differ in nothing but sizes that are not in the forward pass."""

    def __init__(self, kind: SetKind) -> None:
        self.kind = kind
        self.graph = SetGraph(kind)
        self.traces = [ChainTrace() for _ in kind.chains]
        self.exported: dict[fx.Node, str] = {}
        x = self.graph.flat("x", (INPUT,), kind.d_in)
        self.x, self.lead, self.gaps = x.node, x.axes[:-1], x.gaps
        self.mask: fx.Node | None = None
        self._forward()
        self._name_exports()
        self.forward = self.graph.finish(tuple(self.exported), tuple(self.exported.values()), "Forward")

    @property
    def read(self) -> Mapping[tuple[int, str], int]:
        """Which sizes of chains are in the forward pass."""
        return self.forward.read

    # Forward

    def _forward(self) -> None:
        code = self.graph.code
        if self.kind.dropout:
            dropped = code.call(ops.dropout, self.x, self.kind.dropout, self.graph.take("training"))
            self.x, self.mask = (code.call(getitem, dropped, n) for n in (0, 1))
        projections = {chain: projection for projection in self.kind.projections for chain, _, _ in projection.columns}
        results = {projection: self._projection(projection) for projection in self.kind.projections}
        for number, chain in enumerate(self.kind.chains):
            emitted = ChainCode(self.graph, number)
            if (projection := projections.get(number)) is None:
                emitted.forward(self._input(chain, number), self.traces[number])
            else:
                columns = self.columns(code, results[projection], projection, number)
                emitted.forward(columns, self.traces[number], 1)

    def _projection(self, projection: FusedProjection) -> NamedTensor:
        code = self.graph.code
        code.sizes[PROJECTION] = projection.width
        matrix = NamedTensor(self.graph.take(f"p{projection.argument}"), ((PROJECTION,), (INPUT,)))
        return code.contract(self.input((INPUT,)), matrix, (ROW, TOKEN, PROJECTION))

    def input(self, features: Modes) -> NamedTensor:
        """The input as the sites read it, behind dropout; shape: (*lead, features)."""
        return NamedTensor(self.x, (*self.lead, features), self.gaps)

    def columns(self, code: Code, whole: NamedTensor, projection: FusedProjection, number: int) -> NamedTensor:
        """The part of a projection's result, or of its gradient, that is a chain's."""
        first, count = next(columns for chain, *columns in projection.columns if chain == number)
        axes = (*whole.axes[:-1], self.kind.chains[number].stages[0].arguments[0].axes[0])
        if count == projection.width:
            return NamedTensor(whole.node, axes)
        widths = dict(sorted((first, count) for _, first, count in projection.columns))
        parts = code.once("split_with_sizes", whole.node, tuple(widths.values()), -1)
        return NamedTensor(code.once(getitem, parts, [*widths].index(first)), axes, frozenset({len(axes) - 2}))

    def _input(self, chain: LoweredChain, number: int) -> NamedTensor:
        if chain.columns:
            columns = self.graph.code.once("index_select", self.x, -1, self.graph.take(f"columns{number}"))
            return NamedTensor(columns, (*self.lead, chain.d_in))
        return self.input(chain.d_in)

    def _name_exports(self) -> None:
        """Name the tensors that the forward pass returns: those that epilogues and the backward pass read."""
        needed = [] if self.mask is None else [self.mask, self.x]
        for chain, trace in zip(self.kind.chains, self.traces, strict=True):
            last = len(chain.stages) - 1
            needed += [trace.inputs[n].node for n in trace.inputs if n == last or chain.stages[n].link.trainable]
            needed += [mask for mask, _ in trace.masks.values()]
            needed += [] if trace.tensor is None else [trace.tensor.node]
        for node in needed:
            if node is not self.x or self.mask is not None:
                self.exported.setdefault(node, f"a{len(self.exported)}")

    def export(self, graph: SetGraph, tensor: NamedTensor) -> NamedTensor:
        """A tensor of the forward pass in another graph."""
        if tensor.node is self.x and self.mask is None:
            return replace(tensor, node=graph.flat("x", (INPUT,), self.kind.d_in).node)
        return replace(tensor, node=self.export_node(graph, tensor.node))

    def export_node(self, graph: SetGraph, node: fx.Node) -> fx.Node:
        return graph.take(self.exported[node])

    # Epilogue

    def epilogue(self, kind: SetKind, module: int, *, in_place: bool) -> Function:
        """Add the updates of a module's sites to its output."""
        graph = SetGraph(kind)
        whole = graph.take("y")  # first: what calls it has the rest at hand before there is an output
        y = graph.flat("y", (OUTPUT,), kind.d_out[module], in_place=in_place)
        for site in kind.modules[module]:
            for number in site.chains:
                added = self._add_update(graph, y, site, number, in_place=in_place)
                y = y if in_place else replace(y, node=added)
        shape = None if in_place else graph.code.call(getattr, whole, "shape")
        result = whole if in_place else graph.code.call("reshape", y.node, shape)
        return graph.finish(result, ("y",), "Epilogue")

    def _add_update(
        self, graph: SetGraph, whole: NamedTensor, site: ModuleSite, number: int, *, in_place: bool
    ) -> fx.Node:
        """The output with the update of one chain at a site, by one kernel where there is one."""
        chain, code, rows = graph.kind.chains[number], graph.code, site.rows
        emitted = ChainCode(graph, number)
        last = len(chain.stages) - 1
        built = self.traces[number].tensor
        trace = ChainTrace({last: self.export(graph, self.traces[number].inputs[last])})
        trace.tensor = None if built is None else self.export(graph, built)
        y = NamedTensor(whole.node, (*whole.axes[:-1], chain.d_out))
        if in_place and not chain.kept:
            target = rows_of(graph, y, rows)
            if target is not None and emitted.add_update(trace, site.member, target):
                return y.node
        update = code.grouped(emitted.update(trace, site.member, y.modes), y.axes)
        if chain.kept:
            index = graph.take(f"rows{number}_{site.member}")
            return code.call("index_add_" if in_place else "index_add", y.node, -1, index, update)
        if rows is None:
            return code.call("add_" if in_place else "add", y.node, update)
        function = ops.add_rows_ if in_place else ops.with_rows
        return code.call(function, y.node, update, rows.offset, rows.count, rows.period)
