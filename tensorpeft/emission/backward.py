"""Emits the backward pass of an input set."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from tensorpeft.emission import ops
from tensorpeft.emission.chain_code import ChainCode, ChainTrace, GradientSlot
from tensorpeft.emission.forward import SetCode
from tensorpeft.emission.graph import INPUT, OUTPUT, PROJECTION, Function, SetGraph, rows_of
from tensorpeft.emission.input_kind import FusedProjection, ModuleSite, SetKind
from tensorpeft.emission.lowering import LoweredChain
from tensorpeft.emission.named_tensor import NamedTensor


class Backward:
    """From the gradients of the modules in ``present`` to that of x, and to those of the arguments, in one graph."""

    def __init__(
        self, forward: SetCode, kind: SetKind, present: frozenset[int], *, to_x: bool, to_arguments: bool
    ) -> None:
        self.forward, self.kind = forward, kind
        self.to_x, self.to_arguments = to_x, to_arguments
        self.graph = SetGraph(self.kind)
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
        found = self.dx.tensor.node if self.dx.tensor is not None else None
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
                    axes = (*gradient.axes[:-1], self.kind.chains[number].d_out)
                    found.setdefault(number, {})[site.member] = self._of_site(
                        replace(gradient, axes=axes), site, number
                    )
        return {number: dict(sorted(members.items())) for number, members in sorted(found.items())}

    def _of_site(self, gradient: NamedTensor, site: ModuleSite, number: int) -> NamedTensor:
        if self.kind.chains[number].kept:
            index = self.graph.take(f"rows{number}_{site.member}")
            return NamedTensor(self.code.once("index_select", gradient.node, -1, index), gradient.axes)
        part = rows_of(self.graph, gradient, site.rows)
        if part is None:
            assert site.rows is not None
            rows = site.rows
            node = self.code.once(ops.rows_of, gradient.node, rows.offset, rows.count, rows.period)
            part = replace(gradient, node=self.code.once("flatten", node, -2))
        return part

    def _trace(self, number: int) -> tuple[ChainCode, ChainTrace]:
        """A chain's code here, and of its activations those that its links' gradients need."""
        emitted = self.graph.chain(number, gradients=self.to_arguments)
        emitted.use()
        trace, links = self.forward.traces[number], self.kind.chains[number].stages
        needed = {n for n, stage in enumerate(links) if stage.link.trainable and self.to_arguments}
        inputs = {
            n: self.forward.export(self.graph, tensor) if n in needed else tensor for n, tensor in trace.inputs.items()
        }
        masks = {n: (self.forward.export_node(self.graph, mask), axes) for n, (mask, axes) in trace.masks.items()}
        return emitted, ChainTrace(inputs, masks)

    def _finish(self, number: int, emitted: ChainCode) -> None:
        for argument, node in emitted.parts.items():
            self.parts[f"into{self.kind.arguments[number][argument]}"] = node

    def _alone(self, number: int) -> None:
        """A chain that has its first link for itself."""
        chain = self.kind.chains[number]
        emitted, trace = self._trace(number)
        dx = self._slot_of_x(chain) if self.to_x else None
        if len(chain.stages) == 1:
            emitted.backward_epilogue(self.gradients[number], trace, dx)
        else:
            last = GradientSlot(self.code, trace.inputs[len(chain.stages) - 1].modes)
            emitted.backward_epilogue(self.gradients[number], trace, last)
            emitted.backward(trace, last, dx)
        self._finish(number, emitted)
        if dx is not None:
            self._put_x(number, chain, self.code.regrouped(dx.found, (*self.forward.lead, chain.d_in)))

    def _slot_of_x(self, chain: LoweredChain) -> GradientSlot:
        modes = (*self.dx.modes[:-1], *chain.d_in)
        if self.dx.tensor is None or chain.columns:
            return GradientSlot(self.code, modes)
        return GradientSlot(
            self.code, modes, replace(self.dx.tensor, axes=(*self.dx.tensor.axes[:-1], chain.d_in)), filled=True
        )

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
            modes = trace.inputs[1].modes
            part = None if whole is None else self.forward.columns(self.code, whole, projection, number)
            into = GradientSlot(self.code, modes, part, filled=first in filled)
            if len(self.kind.chains[number].stages) == 2:
                emitted.backward_epilogue(self.gradients[number], trace, into)
            else:
                last = GradientSlot(self.code, trace.inputs[len(self.kind.chains[number].stages) - 1].modes)
                emitted.backward_epilogue(self.gradients[number], trace, last)
                emitted.backward(trace, last, into, stop=1)
            filled.add(first)
            self._finish(number, emitted)
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
