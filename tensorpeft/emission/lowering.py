"""Plans as their code sees them: chains, the products that these share, and the modules in which their sites are.

A chain is one product of the update, at the sites of one group that read one tensor. Forward, the activation meets link
after link but for the last, which each site meets by itself. What it was before a trained link is kept: the backward pass
needs it for the link's gradient. Tensors that are built at the site are built again there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from tensorpeft.emission.named_tensor import Modes
from tensorpeft.model.shape import Rows
from tensorpeft.network.network import Operand, Term
from tensorpeft.planning.base_product import base_rows
from tensorpeft.planning.chain import SITE, Link, differ
from tensorpeft.planning.plan import GroupPlan


@dataclass(frozen=True)
class Argument:
    """A tensor that a chain is given: what the prologue made of some factors, or the base weight (d_out, d_in)."""

    operands: tuple[int, ...]  # of the term
    axes: tuple[Modes, ...]
    trainable: bool
    own: bool  # whether each of several sites has one of its own
    base: tuple[Modes, Modes] | None = None  # of the base weight: the modes of its two axes
    cut: tuple[bool, ...] = ()  # of which masks leave some positions only

    @property
    def is_base(self) -> bool:
        return self.base is not None


@dataclass(frozen=True)
class Stage:
    """A link as a chain meets it: what it is built from, if it is more than one argument."""

    link: Link
    arguments: tuple[Argument, ...]
    dropout: float  # the probability with which the activation is dropped behind it

    @property
    def by_task(self) -> bool:
        """Whether the rows of a batch each choose their own part of the tensor."""
        return "task" in self.link.batch


@dataclass(frozen=True)
class LoweredChain:
    """A product at ``members`` sites; modes are called SITE only where there are several."""

    members: int
    alpha: float
    sizes: tuple[tuple[str, int], ...]
    d_in: Modes
    d_out: Modes
    stages: tuple[Stage, ...]
    columns: bool  # whether it reads some columns of the input only
    kept: bool  # whether it changes some rows of the output only

    @property
    def by_task(self) -> bool:
        return any(stage.by_task for stage in self.stages)

    @property
    def has_projection(self) -> bool:
        """Whether its first link is a matrix over all features, so that it can be one product with those of other chains."""
        first = self.stages[0].link
        special = first.at_site or first.batch or self.columns or self.stages[0].dropout
        has_new = bool(first.new or first.own)
        return len(self.stages) > 1 and has_new and not special and first.contracted == self.d_in


@dataclass(frozen=True)
class ModuleSite:
    """A site in a module: its chains, one per product, which of their sites it is, and its rows among the module's outputs."""

    chains: tuple[int, ...]
    member: int
    rows: Rows | None


@dataclass(frozen=True)
class FusedProjection:
    """One product of the input with the concatenated first links of some chains, each of which has columns of the result."""

    argument: int
    trainable: bool
    width: int
    columns: tuple[tuple[int, int, int], ...]  # (chain, first, how many)


@dataclass(frozen=True)
class SetKind:
    """The properties that input sets of the same code share; it is the key of that code."""

    chains: tuple[LoweredChain, ...]
    # of each chain the numbers of its arguments; -1 where it has none, or the base weight
    arguments: tuple[tuple[int, ...], ...]
    trainable: tuple[bool, ...]  # of each argument
    projections: tuple[FusedProjection, ...]
    modules: tuple[tuple[ModuleSite, ...], ...]
    d_in: int
    d_out: tuple[int, ...]  # of the modules
    dropout: float  # of the input

    @cached_property
    def sizes(self) -> dict[tuple[int, str], int]:
        """Of the chains' modes, by the number of the chain."""
        return {(number, mode): size for number, chain in enumerate(self.chains) for mode, size in chain.sizes}

    @cached_property
    def outline(self) -> SetKind:
        """All of it but those."""
        return replace(self, chains=tuple(replace(chain, sizes=()) for chain in self.chains))

    @property
    def by_task(self) -> bool:
        return any(chain.by_task for chain in self.chains)

    @property
    def by_base(self) -> bool:
        return any(argument.is_base for chain in self.chains for stage in chain.stages for argument in stage.arguments)


def lower_chains(plan: GroupPlan, members: int, dropout: dict[str, float]) -> tuple[LoweredChain, ...]:
    """The chains of a group, one per product, where ``members`` of its sites read one tensor."""
    found = []
    for term, chain in zip(plan.group.terms, plan.chains, strict=True):
        *links, last = (_of_members(link, members) for link in chain.links)
        stages = [
            # bonds that the activation gets from a link are dropped behind it
            Stage(link, _arguments(plan, term, link), 1 - prod(1 - dropout.get(mode, 0) for mode in link.new))
            for link in links
        ]
        stages.append(Stage(last, _arguments(plan, term, last, last=True), 0.0))
        alpha, sizes = chain.sign * plan.group.scale, tuple({**term.sizes, SITE: members}.items())
        cuts = term.columns is not None, term.rows is not None
        found.append(LoweredChain(members, alpha, sizes, term.d_in, term.d_out, tuple(stages), *cuts))
    return tuple(found)


def _of_members(link: Link, members: int) -> Link:
    """A link as its code sees it: whatever it costs, and without SITE where there is one."""
    link = replace(link, flops=0)
    if members > 1:
        return link
    before, after = (tuple(mode for mode in modes if mode != SITE) for modes in (link.before, link.after))
    return replace(link, before=before, after=after, own=False)


def _arguments(plan: GroupPlan, term: Term, link: Link, *, last: bool = False) -> tuple[Argument, ...]:
    if link.at_site:
        return tuple(_factor(plan, i, term.operands[i], several=link.own) for i in link.operands)
    site = (SITE,) if link.own else ()
    batch = [(mode,) for mode in link.batch]
    # one matrix makes the activations of all sites
    merged = bool(link.contracted) and not last and SITE not in link.before
    axes = (*batch, (*site, *link.new), link.contracted) if merged else (site, *batch, link.new, link.contracted)
    return (Argument(link.operands, tuple(axis for axis in axes if axis), link.trainable, link.own),)


def _factor(plan: GroupPlan, number: int, operand: Operand, *, several: bool) -> Argument:
    """A factor by itself, of a link that is built at the site."""
    if operand.is_base:
        first, cut = base_rows(operand), tuple(some is not None for some in operand.take)
        base = operand.modes[:first], operand.modes[first:]
        return Argument((number,), tuple((mode,) for mode in operand.modes), False, False, base, cut)
    own = several and differ([operand], plan.bundles)
    modes = (SITE, *operand.modes) if own else operand.modes
    return Argument((number,), tuple((mode,) for mode in modes), operand.block.trainable, own)
