"""Emits one chain into the graphs of its input set."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from operator import getitem

import torch
from torch import fx

from tensorpeft.emission import ops
from tensorpeft.emission.contraction import Code
from tensorpeft.emission.graph import ROW, SetGraph
from tensorpeft.emission.lowering import Stage
from tensorpeft.emission.named_tensor import Modes, NamedTensor
from tensorpeft.planning.chain import SITE

Members = dict[int, NamedTensor]  # at some sites of a chain, by their numbers in it


@dataclass
class GradientSlot:
    """Where the gradient of an activation comes together; the first to arrive makes it, unless it is a part of another."""

    code: Code
    modes: Modes
    tensor: NamedTensor | None = None
    filled: bool = False

    def add(self, a: NamedTensor, b: NamedTensor, alpha: float = 1) -> None:
        if self.tensor is None:
            self.tensor = self.code.contract(a, b, self.modes, alpha)
        else:
            self.code.accumulate(self.tensor, a, b, alpha, keep=self.filled)
        self.filled = True

    @property
    def found(self) -> NamedTensor:
        assert self.tensor is not None
        return self.tensor


@dataclass
class ChainTrace:
    """The activations of a chain's forward pass that its epilogue and its backward pass read."""

    inputs: dict[int, NamedTensor] = field(default_factory=dict)  # of each link: the activation that it meets
    # behind a link: what dropout left
    masks: dict[int, tuple[fx.Node, tuple[Modes, ...]]] = field(default_factory=dict)
    tensor: NamedTensor | None = None  # of the last link, where it was built


class ChainCode:
    """A chain in one graph, whose modes have its sizes from now on."""

    def __init__(self, graph: SetGraph, number: int, *, gradients: bool = False) -> None:
        self.graph, self.code, self.number, self.gradients = graph, graph.code, number, gradients
        self.chain = graph.kind.chains[number]
        self.parts: dict[str, fx.Node] = {}  # gradients of arguments that no kernel adds up in place
        self._tensors: dict[int, NamedTensor] = {}
        self._built: dict[int, list[NamedTensor]] = {}
        self._whole: dict[int, GradientSlot] = {}  # gradients of tensors that are built
        self._arguments = [argument for stage in self.chain.stages for argument in stage.arguments]
        # of each link: the number of its first argument
        self._first = [*accumulate((len(stage.arguments) for stage in self.chain.stages), initial=0)]
        self.ids = graph.take("ids") if graph.kind.by_task else None  # the task of each row
        self.training = graph.take("training") if any(stage.dropout for stage in self.chain.stages) else None
        self.code.sizes.use(number, self.chain.sizes)
        if self.ids is not None:
            self.code.sizes[ROW] = self.code.length(self.ids, 0)

    # Tensors

    def tensor(self, link: int) -> NamedTensor:
        """The tensor of a link."""
        if link not in self._tensors:
            stage = self.chain.stages[link]
            self._tensors[link] = self._build(link, stage) if stage.link.at_site else self._argument(self._first[link])
        return self._tensors[link]

    def _argument(self, number: int) -> NamedTensor:
        """An argument; one that has tasks as the rows of the batch choose from it."""
        argument, node = self._arguments[number], self._given(number)
        if argument.base is not None:
            for axis, cut in enumerate(argument.cut):
                if cut:
                    index = self.graph.take(f"take{argument.operands[0]}_{axis}_{self.number}")
                    node = self.code.once("index_select", node, axis, index)
            whole = NamedTensor(node, argument.base, frozenset({0}))  # Conv1D holds it the other way round
            gaps = frozenset({len(argument.base[0]) - 1})
            return NamedTensor(self.code.grouped(whole, argument.axes), argument.axes, gaps)
        if (ROW,) in argument.axes:
            node = self.code.once("index_select", node, argument.axes.index((ROW,)), self.ids)
        return NamedTensor(node, argument.axes)

    def _given(self, number: int) -> fx.Node:
        argument = self.graph.kind.arguments[self.number][number]
        return self.graph.take("w" if argument < 0 else f"p{argument}")

    def _build(self, link: int, stage: Stage) -> NamedTensor:
        """The tensor of a link, of its arguments; ``_built`` keeps them and what comes of each step."""
        self._built[link] = made = [self._argument(self._first[link] + n) for n in range(len(stage.arguments))]
        for step in stage.link.steps:
            one, other = step.inputs
            made.append(self.code.contract(made[one], made[other], (SITE, *step.result)))
        return made[-1]

    # Forward

    def forward(self, activation: NamedTensor, trace: ChainTrace, start: int = 0) -> None:
        """From the activation that link ``start`` meets to the one that the last link meets."""
        last = len(self.chain.stages) - 1
        for link in range(start, last):
            stage, tensor = self.chain.stages[link], self.tensor(link)
            activation = trace.inputs[link] = self.code.arranged(activation, tensor, stage.link.after)
            activation = self.code.contract(activation, tensor, stage.link.after)
            if stage.dropout:
                dropped = self.code.call(ops.dropout, activation.node, stage.dropout, self.training)
                trace.masks[link] = self.code.call(getitem, dropped, 1), activation.axes
                activation = NamedTensor(self.code.call(getitem, dropped, 0), activation.axes)
        stage = self.chain.stages[last]
        if stage.link.at_site:
            tensor = trace.tensor = self.tensor(last)
        else:  # as it will be: nothing of it is emitted here
            tensor = NamedTensor(self._given(self._first[last]), stage.arguments[0].axes)
        trace.inputs[last] = self.code.arranged(activation, tensor, stage.link.after, each_site=True)

    def add_update(self, trace: ChainTrace, member: int, y: NamedTensor) -> bool:
        """Add the update at one site to its output, in place; False, and nothing done, where that takes more than a kernel."""
        return self.code.add(y, *self._at(trace, member), self.chain.alpha)

    def update(self, trace: ChainTrace, member: int, keep: Modes) -> NamedTensor:
        """The update at one site by itself."""
        return self.code.contract(*self._at(trace, member), keep, self.chain.alpha)

    def _at(self, trace: ChainTrace, member: int) -> tuple[NamedTensor, NamedTensor]:
        last = len(self.chain.stages) - 1
        tensor = trace.tensor or self.tensor(last)
        return self.code.member(trace.inputs[last], member), self.code.member(tensor, member)

    # Backward

    def backward(self, gradients: Members, trace: ChainTrace, into: GradientSlot | None, stop: int = 0) -> None:
        """From the gradients of the outputs at some sites to that of what meets link ``stop``, which goes to ``into``."""
        last = len(self.chain.stages) - 1
        slot = into if last == stop else GradientSlot(self.code, trace.inputs[last].modes)
        self._backward_epilogue(gradients, trace, slot)
        for link in range(last - 1, stop - 1, -1):
            assert slot is not None
            tensor, activation = self.tensor(link), trace.inputs[link]
            gradient = self.code.arranged(self._undropped(link, slot.found, trace), tensor, activation.modes)
            self.gradient(link, gradient, activation)
            slot = into if link == stop else GradientSlot(self.code, activation.modes)
            if slot is not None:
                slot.add(gradient, tensor)

    def _backward_epilogue(self, gradients: Members, trace: ChainTrace, slot: GradientSlot | None) -> None:
        """From the gradients of the outputs at the sites, some or all, to that of what the last link meets."""
        last = len(self.chain.stages) - 1
        activation, tensor, alpha = trace.inputs[last], self.tensor(last), self.chain.alpha
        several = SITE in activation.modes
        if several and {*tensor.modes} <= {*activation.modes}:
            gradient = self._together(gradients)
            self.gradient(last, gradient, activation, alpha)
            if slot is not None:
                slot.add(gradient, tensor, alpha)
            return
        if slot is not None and slot.tensor is None and several:
            slot.tensor = self.code.empty(next(iter(gradients.values())).node, activation.modes)
            if len(gradients) < self.chain.members:
                self.code.call("zero_", slot.tensor.node)
        for number, gradient in gradients.items():
            if slot is not None:
                mine = self._part(slot, number) if several else slot
                mine.add(gradient, self.code.member(tensor, number), alpha)
            if self._trains(last):
                self.gradient(last, gradient, self.code.member(activation, number), alpha, number)
        if slot is not None:
            slot.filled = True
        if last in self._whole:
            self._unbuild(last)

    def _part(self, slot: GradientSlot, number: int) -> GradientSlot:
        part = self.code.member(slot.found, number)
        return GradientSlot(self.code, part.modes, part, slot.filled)

    def _together(self, gradients: Members) -> NamedTensor:
        first = next(iter(gradients.values()))
        nodes = [self.code.grouped(gradient, first.axes) for gradient in gradients.values()]
        missing = self.chain.members - len(nodes)
        if missing:
            zero = self.code.call(torch.zeros_like, nodes[0])
            nodes = [nodes.pop(0) if number in gradients else zero for number in range(self.chain.members)]
        return NamedTensor(self.code.call(torch.stack, nodes), ((SITE,), *first.axes))

    def _undropped(self, link: int, gradient: NamedTensor, trace: ChainTrace) -> NamedTensor:
        if link not in trace.masks:
            return gradient
        mask, axes = trace.masks[link]
        node = self.code.call(ops.undrop, self.code.grouped(gradient, axes), mask, self.chain.stages[link].dropout)
        return NamedTensor(node, axes)

    # Gradients of arguments

    def _trains(self, link: int) -> bool:
        return self.gradients and self.chain.stages[link].link.trainable

    def gradient(self, link: int, a: NamedTensor, b: NamedTensor, alpha: float = 1, member: int | None = None) -> None:
        """Add the product of an activation and a gradient to that of a link's tensor; to that of one site, or whole."""
        if self._trains(link):
            if self.chain.stages[link].link.at_site:
                self._gradient_of_built(link, a, b, alpha, member)
            else:
                self._deliver(self._first[link], a, b, alpha, member)

    def _deliver(
        self, number: int, a: NamedTensor, b: NamedTensor, alpha: float = 1, member: int | None = None
    ) -> None:
        name = f"into{self.graph.kind.arguments[self.number][number]}"
        node = self.graph.take(name)
        axes = self._arguments[number].axes
        into = NamedTensor(node, axes) if member is None else self.code.member(NamedTensor(node, axes), member)
        if (ROW,) in into.axes:
            found = self.code.grouped(self.code.contract(a, b, into.modes, alpha), into.axes)
            self.code.call("index_add_", into.node, into.axes.index((ROW,)), self.ids, found)
        elif not self.code.add(into, a, b, alpha):
            result = self.code.contract(a, b, into.modes, alpha)
            if into.node is node and name not in self.parts:
                self.parts[name] = self.code.grouped(result, axes)
            else:
                self.code.put(into, result)

    def _gradient_of_built(self, link: int, a: NamedTensor, b: NamedTensor, alpha: float, member: int | None) -> None:
        """Of a tensor that was built; whole, it goes on to its arguments, and else when all sites have brought their share."""
        tensor = self.tensor(link)
        if member is None or SITE not in tensor.modes:
            self._whole.setdefault(link, GradientSlot(self.code, tensor.modes)).add(a, b, alpha)
        else:
            if link not in self._whole:
                made = self.code.empty(a.node, tensor.modes)
                self.code.call("zero_", made.node)
                self._whole[link] = GradientSlot(self.code, tensor.modes, made)
            part = self.code.member(self._whole[link].found, member)
            self.code.accumulate(part, a, b, alpha, keep=False)
        if member is None:
            self._unbuild(link)

    def _unbuild(self, link: int) -> None:
        """Bring the gradient of a tensor that was built to its arguments."""
        stage, made = self.chain.stages[link], self._built[link]
        n_arguments, pairs = len(stage.arguments), stage.link.pairs
        wanted = [argument.trainable for argument in stage.arguments]
        wanted += (wanted[one] or wanted[other] for one, other in pairs)  # each asks those before it
        arrived = {len(made) - 1: self._whole[link].found}
        for number in range(len(made) - 1, n_arguments - 1, -1):
            one, other = pairs[number - n_arguments]
            for mine, its in ((one, other), (other, one)):
                if wanted[mine] and mine < n_arguments:
                    self._deliver(self._first[link] + mine, arrived[number], made[its])
                elif wanted[mine]:
                    arrived[mine] = self.code.contract(arrived[number], made[its], made[mine].modes)
