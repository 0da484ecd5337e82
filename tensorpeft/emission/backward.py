"""Emits the backward pass of an input set."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from tensorpeft.emission import ops
from tensorpeft.emission.chain_code import ChainCode, ChainTrace, GradientSlot
from tensorpeft.emission.forward import SetCode
from tensorpeft.emission.graph import INPUT, OUTPUT, PROJECTION, Function, SetGraph, rows_of
from tensorpeft.emission.lowering import FusedProjection, LoweredChain, ModuleSite, SetKind
from tensorpeft.emission.named_tensor import NamedTensor


class Backward:
    """From the gradients of the modules in ``present`` to that of x, and to those of the arguments, in one graph."""

    def __init__(
        self, forward: SetCode, kind: SetKind, present: frozenset[int], *, to_x: bool, to_arguments: bool
    ) -> None:
        self.forward, self.kind = forward, kind
        self.to_x, self.to_arguments = to_x, to_arguments
        self.graph = SetGraph(kind)
        self.code = self.graph.code
        self.gradients = self._gradients(present)
        self.dx = GradientSlot(self.code, (*(mode for axis in forward.lead for mode in axis), INPUT))
        self.parts: dict[str, fx.Node] = {}

    def function(self) -> Function:
        projected = {chain for projection in self.kind.projections for chain, _, _ in projection.columns}
        for projection in self.kind.projections:
            self._projection(projection)
        for number in self.gradients:
            if number not in projected:
                self._alone(number)
        found = None if self.dx.tensor is None else self.dx.tensor.node
        if found is not None and self.forward.mask is not None:
            mask = self.forward.export_node(self.graph, self.forward.mask)
            found = self.code.call(ops.undrop, found, mask, self.kind.dropout)
        return self.graph.finish((found, *self.parts.values()), ("dx", *self.parts), "Backward")

    def _gradients(self, present: frozenset[int]) -> dict[int, dict[int, NamedTensor]]:
        """Of each chain, the gradient of the output at each of its sites."""
        found: dict[int, dict[int, NamedTensor]] = {}
        for module in sorted(present):
            gradient = self.graph.flat(f"g{module}", (OUTPUT,), self.kind.d_out[module])
            self.code.tokens = gradient.node, len(gradient.axes) - 2
            for site in self.kind.modules[module]:
                for number in site.chains:
                    of_chain = replace(gradient, axes=(*gradient.axes[:-1], self.kind.chains[number].d_out))
                    found.setdefault(number, {})[site.member] = self._of_site(of_chain, site, number)
        return {number: dict(sorted(members.items())) for number, members in sorted(found.items())}

    def _of_site(self, gradient: NamedTensor, site: ModuleSite, number: int) -> NamedTensor:
        if self.kind.chains[number].kept:
            index = self.graph.take(f"rows{number}_{site.member}")
            return NamedTensor(self.code.once("index_select", gradient.node, -1, index), gradient.axes)
        part, rows = rows_of(self.graph, gradient, site.rows), site.rows
        if part is not None or rows is None:
            return part or gradient
        node = self.code.once(ops.rows_of, gradient.node, rows.offset, rows.count, rows.period)
        return replace(gradient, node=self.code.once("flatten", node, -2))

    def _trace(self, number: int) -> tuple[ChainCode, ChainTrace]:
        """A chain's code here, and of its activations those that its links' gradients need."""
        emitted = ChainCode(self.graph, number, gradients=self.to_arguments)
        trace, stages = self.forward.traces[number], self.kind.chains[number].stages
        inputs = dict(trace.inputs)
        for n, tensor in trace.inputs.items():
            if stages[n].link.trainable and self.to_arguments:
                inputs[n] = self.forward.export(self.graph, tensor)
        masks = {n: (self.forward.export_node(self.graph, mask), axes) for n, (mask, axes) in trace.masks.items()}
        return emitted, ChainTrace(inputs, masks)

    def _alone(self, number: int) -> None:
        """A chain that has its first link for itself."""
        chain = self.kind.chains[number]
        emitted, trace = self._trace(number)
        dx = self._slot_of_x(chain) if self.to_x else None
        emitted.backward(self.gradients[number], trace, dx)
        self.parts |= emitted.parts
        if dx is not None:
            self._put_x(number, chain, self.code.regrouped(dx.found, (*self.forward.lead, chain.d_in)))

    def _slot_of_x(self, chain: LoweredChain) -> GradientSlot:
        modes = (*self.dx.modes[:-1], *chain.d_in)
        if self.dx.tensor is None or chain.columns:
            return GradientSlot(self.code, modes)
        whole = replace(self.dx.tensor, axes=(*self.dx.tensor.axes[:-1], chain.d_in))
        return GradientSlot(self.code, modes, whole, filled=True)

    def _put_x(self, number: int, chain: LoweredChain, part: NamedTensor) -> None:
        if chain.columns:
            if self.dx.tensor is None:
                self.dx.tensor = self.code.empty(part.node, self.dx.modes)
                self.code.call("zero_", self.dx.tensor.node)
            whole = self.code.grouped(self.dx.tensor, (*self.forward.lead, (INPUT,)))
            self.code.call("index_add_", whole, -1, self.graph.take(f"columns{number}"), part.node)
        elif self.dx.tensor is None:
            self.dx.tensor = replace(part, axes=(*self.forward.lead, (INPUT,)))
        self.dx.filled = True

    def _projection(self, projection: FusedProjection) -> None:
        """The chains of a projection, and then the projection."""
        whole: NamedTensor | None = None
        present = [(chain, *columns) for chain, *columns in projection.columns if chain in self.gradients]
        if not present:
            return
        filled: set[int] = set()
        for number, first, count in present:
            emitted, trace = self._trace(number)
            if whole is None and count < projection.width:
                self.code.sizes[PROJECTION] = projection.width
                like = next(iter(self.gradients[number].values())).node
                whole = self.code.empty(like, (*self.dx.modes[:-1], PROJECTION))
                if len(present) < len(projection.columns):
                    self.code.call("zero_", whole.node)
            part = whole and self.forward.columns(self.code, whole, projection, number)
            into = GradientSlot(self.code, trace.inputs[1].modes, part, filled=first in filled)
            emitted.backward(self.gradients[number], trace, into, stop=1)
            filled.add(first)
            self.parts |= emitted.parts
            if whole is None:
                axes = (*self.forward.lead, self.kind.chains[number].stages[0].arguments[0].axes[0])
                whole = replace(self.code.regrouped(into.found, axes), axes=(*self.forward.lead, (PROJECTION,)))
        assert whole is not None
        self._projection_back(projection, whole)

    def _projection_back(self, projection: FusedProjection, gradient: NamedTensor) -> None:
        self.code.sizes[PROJECTION] = projection.width
        axes = ((PROJECTION,), (INPUT,))
        if projection.trainable and self.to_arguments:
            x = self.forward.export(self.graph, self.forward.input((INPUT,)))
            self.code.accumulate(NamedTensor(self.graph.take(f"into{projection.argument}"), axes), gradient, x)
        if self.to_x:
            self.dx.add(gradient, NamedTensor(self.graph.take(f"p{projection.argument}"), axes))
