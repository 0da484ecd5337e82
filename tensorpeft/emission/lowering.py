"""A chain: one product of the update, at the sites of one group that read one tensor.

Forward, the activation meets link after link but for the last, which each site meets by itself. What it was before a trained
link is kept: the backward pass needs it for the link's gradient. Tensors that are built at the site are built again there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tensorpeft.emission.named_tensor import Modes
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
        plain = bool(first.new or first.own) and not (
            first.at_site or first.batch or self.columns or self.stages[0].dropout
        )
        return len(self.stages) > 1 and plain and first.contracted == self.d_in


def lower_chains(plan: GroupPlan, members: int, dropout: dict[str, float]) -> tuple[LoweredChain, ...]:
    """The chains of a group, one per product, where ``members`` of its sites read one tensor."""
    found = []
    for term, chain in zip(plan.group.terms, plan.chains, strict=True):
        links = [_of_members(link, members) for link in chain.links]
        stages = []
        for link in links:
            arguments = _arguments(plan, term, link, last=link is links[-1])
            stages.append(Stage(link, arguments, 0.0 if link is links[-1] else _dropped(link, dropout)))
        found.append(
            LoweredChain(
                members=members,
                alpha=chain.sign * plan.group.scale,
                sizes=tuple({**term.sizes, SITE: members}.items()),
                d_in=term.d_in,
                d_out=term.d_out,
                stages=tuple(stages),
                columns=term.columns is not None,
                kept=term.rows is not None,
            )
        )
    return tuple(found)


def _of_members(link: Link, members: int) -> Link:
    """A link as its code sees it: whatever it costs, and without SITE where there is one."""
    link = replace(link, flops=0)
    if members > 1:
        return link
    before, after = (tuple(mode for mode in modes if mode != SITE) for modes in (link.before, link.after))
    return replace(link, before=before, after=after, own=False)


def _dropped(link: Link, dropout: dict[str, float]) -> float:
    """Bonds that the activation gets from a link are dropped behind it."""
    kept = 1.0
    for mode in link.new:
        kept *= 1 - dropout.get(mode, 0)
    return 1 - kept


def _arguments(plan: GroupPlan, term: Term, link: Link, *, last: bool) -> tuple[Argument, ...]:
    if link.at_site:
        return tuple(_factor(plan, i, term.operands[i], several=link.own) for i in link.operands)
    site = (SITE,) if link.own else ()
    merged = (
        bool(link.contracted) and not last and SITE not in link.before
    )  # one matrix makes the activations of all sites
    axes = (
        () if merged else site,
        *((mode,) for mode in link.batch),
        (*site, *link.new) if merged else link.new,
        link.contracted,
    )
    return (Argument(link.operands, tuple(axis for axis in axes if axis), link.trainable, link.own),)


def _factor(plan: GroupPlan, number: int, operand: Operand, *, several: bool) -> Argument:
    """A factor by itself, of a link that is built at the site."""
    if operand.is_base:
        first = base_rows(operand)
        axes = tuple((mode,) for mode in operand.modes)
        cut = tuple(some is not None for some in operand.take)
        return Argument((number,), axes, False, False, (operand.modes[:first], operand.modes[first:]), cut)
    own = several and differ([operand], plan.bundles)
    modes = (SITE, *operand.modes) if own else operand.modes
    return Argument((number,), tuple((mode,) for mode in modes), operand.block.trainable, own)
