"""Plan -> torch code, through torch.fx.

The **prologue** takes the stored blocks and returns *stacks*: the tensors that sites are given, one row for each that differs.
Each **kind** of input set has functions of its own (``set_code``); an input set is a kind and its rows of the stacks.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from tensorpeft.emission.index import Index
from tensorpeft.emission.lowering import FusedProjection, LoweredChain, ModuleSite, SetKind, lower_chains
from tensorpeft.emission.norms import NormCode
from tensorpeft.emission.program import SetProgram, program
from tensorpeft.emission.prologue import PrologueCode, StackPart
from tensorpeft.model.shape import Site
from tensorpeft.network.network import Group, Term
from tensorpeft.planning.chain import Bundles
from tensorpeft.planning.plan import Plan
from tensorpeft.planning.shared_inputs import InputSet


@dataclass(frozen=True)
class SetCall:
    """A call of an input set's program: with which rows of the stacks, and which positions."""

    program: SetProgram
    at: str  # from what to what it goes, as its groups say
    modules: tuple[Site, ...]  # the first site of each module
    arguments: tuple[tuple[int, int], ...]  # of each: which stack, and which row of it
    indices: Mapping[str, Index]


@dataclass(frozen=True)
class PlanCode:
    """All emitted code of a plan."""

    plan: Plan
    prologue: fx.GraphModule
    inputs: tuple[str, ...]  # names of the blocks that the prologue takes, in order
    indices: tuple[Index, ...]  # and behind them these
    sets: tuple[SetCall, ...]

    def on(self, device: torch.device) -> tuple[tuple[Tensor, ...], tuple[Mapping[str, Tensor], ...]]:
        """The indices of the prologue and of the sets, on a device."""
        of_sets = ({name: index.on(device) for name, index in call.indices.items()} for call in self.sets)
        return tuple(index.on(device) for index in self.indices), tuple(of_sets)

    def __str__(self) -> str:
        return "\n\n".join(f"# {caption}\n{text}" for caption, text in self.listings())

    def listings(self) -> Iterator[tuple[str, str]]:
        """The text of every function, with what it is for."""
        yield "once per forward pass", listing("prologue", self.prologue)
        if self.plan.norms:
            norms = NormCode(self.plan.norms, (block for block in self.plan.network.blocks if block.rule.norm))
            yield "once per forward pass: the norms of W + dW", listing("norms", norms.code)
        counts = Counter(call.program for call in self.sets)
        for call in {call.program: call for call in reversed(self.sets)}.values():
            modules = ", ".join(site.module for site in call.modules)
            read = "output" if call.at == "output" else "input"
            changed = "input" if call.at == "input" else "output"
            where = f"at {counts[call.program]} {read}s like that of {modules}"
            yield f"{where}: what its sites have in common", listing("forward", call.program.forward.code)
            for function, site in zip(call.program.epilogues, call.modules, strict=True):
                yield f"{where}: the {changed} of {site.module}", listing("epilogue", function.code)
            yield f"{where}: backward", listing("backward", call.program.whole.code)


def listing(name: str, code: fx.GraphModule) -> str:
    """Emitted code as it is read: a function of that name, without what only frees memory."""
    text = re.sub(r"; ( *\w+ =)+ None", "", code.code.strip())
    return text.replace("def forward(self, ", f"def {name}(").replace("tensorpeft_emission_ops_", "ops.").rstrip()


def emit(plan: Plan) -> PlanCode:
    """The code of a plan."""
    prologue = PrologueCode(block.name for block in plan.network.blocks)
    alike: dict[object, list[InputSet]] = defaultdict(list)
    for each in plan.sets:
        alike[_signature(plan, each)].append(each)
    calls = [call for sets in alike.values() for call in _kind(plan, prologue, sets)]
    code = prologue.finish()
    indices = tuple(index for _, index in prologue.indices.values())
    return PlanCode(plan, code, tuple(prologue.inputs), indices, tuple(calls))


def _signature(plan: Plan, each: InputSet) -> object:
    """Sets of one signature have their sites in the same groups, and in modules of the same make."""
    modules = (tuple((at, member, site.rows) for site, at, member in sites) for sites in _modules(plan, each))
    return tuple((bundle.group, len(bundle.sites)) for bundle in each.bundles), *modules


def _modules(plan: Plan, each: InputSet) -> list[list[tuple[Site, int, int]]]:
    """Of each module of a set the sites, with their bundles and their numbers there."""
    found: dict[str, list[tuple[Site, int, int]]] = defaultdict(list)
    for at, bundle in enumerate(each.bundles):
        for member, number in enumerate(bundle.sites):
            site = plan.groups[bundle.group].group.sites[number]
            found[site.path].append((site, at, member))
    return list(found.values())


def _kind(plan: Plan, prologue: PrologueCode, sets: list[InputSet]) -> list[SetCall]:
    """The calls of input sets of one signature."""
    given = SetInputs(plan, prologue, sets)
    modules = _modules(plan, sets[0])
    first = [sites[0][0] for sites in modules]
    kind = SetKind(
        chains=tuple(given.chains),
        arguments=tuple(given.arguments),
        trainable=tuple(given.trainable),
        projections=given.projections(),
        modules=tuple(
            tuple(ModuleSite(given.of_bundle[at], member, site.rows) for site, at, member in sites) for sites in modules
        ),
        d_in=first[0].d_in,
        d_out=tuple(site.module_d_out for site in first),
        dropout=dict(plan.network.spec.dropout).get("x", 0.0),
    )
    at = plan.groups[sets[0].bundles[0].group].group.at
    firsts = [tuple(sites[0][0] for sites in _modules(plan, each)) for each in sets]
    arguments = [tuple((stack, rows[n]) for stack, rows in given.stacks) for n in range(len(sets))]
    return [SetCall(program(kind), at, *each, given.indices) for each in zip(firsts, arguments, strict=True)]


class SetInputs:
    """Collects the chains of input sets of one signature, and the stacks that are their arguments."""

    def __init__(self, plan: Plan, prologue: PrologueCode, sets: list[InputSet]) -> None:
        self.prologue = prologue
        self.chains: list[LoweredChain] = []
        self.of_bundle: list[tuple[int, ...]] = []
        self.stacks: list[tuple[int, tuple[int, ...]]] = []  # of each argument: its stack, and the row of each set
        self.trainable: list[bool] = []
        self.arguments: list[tuple[int, ...]] = []  # of each chain
        self.indices: dict[str, Index] = {}
        self._first: dict[int, StackPart] = {}  # of each chain that shares its first link
        dropout = dict(plan.network.spec.dropout)
        for at, bundle in enumerate(sets[0].bundles):
            planned = plan.groups[bundle.group]
            mine = lower_chains(planned, len(bundle.sites), dropout)
            self.of_bundle.append(tuple(range(len(self.chains), len(self.chains) + len(mine))))
            for term, chain in zip(planned.group.terms, mine, strict=True):
                self._add(planned.group, term, chain, tuple(each.bundles[at].sites for each in sets))

    def _add(self, group: Group, term: Term, chain: LoweredChain, bundles: Bundles) -> None:
        number = len(self.chains)
        self.chains.append(chain)
        numbers = []
        for stage in chain.stages:
            for argument in stage.arguments:
                numbers.append(-1)  # what it keeps where it is the base weight, or in a projection
                if argument.is_base:
                    continue
                part = self.prologue.part(group, term, stage.link, argument, bundles)
                if chain.has_projection and stage is chain.stages[0]:
                    self._first[number] = part
                else:
                    numbers[-1] = self._argument([part], argument.trainable)
        self.arguments.append(tuple(numbers))
        if term.columns is not None:
            self.indices[f"columns{number}"] = Index.of(term.columns)
        for i, operand in enumerate(term.operands):
            for axis, positions in enumerate(operand.take if operand.is_base else ()):
                if positions is not None:
                    self.indices[f"take{i}_{axis}_{number}"] = Index.of(np.array(positions))
        if term.rows is not None:
            for member, site in enumerate(bundles[0]):
                rows = group.sites[site].row_indices()[term.rows]
                self.indices[f"rows{number}_{member}"] = Index.of(rows)

    def _argument(self, parts: Sequence[StackPart], trainable: bool) -> int:
        self.stacks.append(self.prologue.stack(parts))
        self.trainable.append(trainable)
        return len(self.stacks) - 1

    def projections(self) -> tuple[FusedProjection, ...]:
        """The first links that are one product: apart are those that train, and those that are the same for every set."""
        classes: dict[tuple[bool, bool], dict[tuple[object, ...], list[int]]] = defaultdict(dict)
        for number, part in self._first.items():
            trainable = self.chains[number].stages[0].link.trainable
            classes[trainable, part.count > 1].setdefault((part.node, part.rows), []).append(number)
        projections = []
        for (trainable, _), alike in classes.items():
            parts = [self._first[numbers[0]] for numbers in alike.values()]
            columns, start = [], 0
            for part, numbers in zip(parts, alike.values(), strict=True):
                columns += [(number, start, part.shape[0]) for number in numbers]
                start += part.shape[0]
            projections.append(FusedProjection(self._argument(parts, trainable), trainable, start, tuple(columns)))
        return tuple(projections)
