"""Chains: the tensors that an activation meets, one after the other.

Each such tensor is a **link**: a factor as it is, or a product of factors that is contracted beforehand, in the **prologue**,
for all sites of a group at once. LoRA is a chain of two raw links; LoRTA's second link is the product of four factors; a chain
of one link is dW itself. A product as large as dW, or one with the base weight in it, is built at each site instead, so that
there is never one for every site at once.

Sites that read one tensor go together. A link that is the same for all of them is met once; with the first one of which each
has its own, the activation gets the mode SITE. The last link is met at each site, where its result joins the base's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tensorpeft.language.spec import SITE_MODES
from tensorpeft.network.network import Group, Operand, Term
from tensorpeft.planning.orders import TOKEN, Order, activation
from tensorpeft.planning.steps import Step, contraction_steps

SITE = "<site>"  # which of the sites that read one tensor
ANY_SITE = "<any site>"  # which of the sites of a group
Bundles = tuple[tuple[int, ...], ...]  # the sites of a group, by number, that read one tensor


@dataclass(frozen=True)
class Link:
    """One tensor that the activation meets.

    ``operands`` are positions in the term; ``steps`` make the tensor of them. ``modes`` are the tensor's modes: ``batch``
    (kept, shared with the activation), ``contracted``, then ``new`` ones; where it is made for all sites of a group at once,
    ``site_modes`` come before them. ``before`` and ``after`` are the activation's modes.
    """

    operands: tuple[int, ...]
    steps: tuple[Step, ...]
    batch: tuple[str, ...]
    contracted: tuple[str, ...]
    new: tuple[str, ...]
    site_modes: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    own: bool  # whether sites that read one tensor have each a tensor of their own here
    shared: bool  # whether it is met once for all sites that read one tensor
    trainable: bool
    flops: int  # of the activation's step, at one site, over all tokens
    at_site: bool = False  # built when a site needs it, and again in its backward pass

    @property
    def building(self) -> int:
        """FLOPs of building the tensor: in the prologue, for all sites of the group, or else at one site."""
        return sum(step.flops for step in self.steps)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """In which order the operands are contracted."""
        return tuple(step.inputs for step in self.steps)

    @property
    def prologue_flops(self) -> int:
        """FLOPs of building the tensor beforehand, for all sites of the group."""
        return 0 if self.at_site else self.building

    @property
    def site_flops(self) -> int:
        """FLOPs at one site: of the activation's step, and of building the tensor there."""
        return self.flops + (self.building if self.at_site else 0)

    @property
    def modes(self) -> tuple[str, ...]:
        return (*self.batch, *self.contracted, *self.new)


@dataclass(frozen=True)
class Chain:
    """The links of one product, in the order in which the activation meets them."""

    sign: int
    links: tuple[Link, ...]


def by_itself(group: Group) -> Bundles:
    """Bundles of one site each."""
    return tuple((number,) for number in range(len(group.sites)))


def chain(group: Group, term: Term, order: Order, tokens: int, bundles: Bundles, *, beforehand: bool = False) -> Chain:
    """The chain of one product in an order of its operands; ``beforehand`` no tensor of it is left to be built at the site."""
    before = activation(term)
    links = []
    for position in range(len(order)):
        links.append(_link(group, term, order[position:], before, tokens, bundles, beforehand))
        before = links[-1].after
    return Chain(term.sign, tuple(links))


def _link(
    group: Group, term: Term, order: Order, before: tuple[str, ...], tokens: int, bundles: Bundles, beforehand: bool
) -> Link:
    """The first link of what is left of an order."""
    operands, *later = order
    last = not later
    mine = [term.operands[i] for i in operands]
    needed = {*term.d_out, "task", TOKEN, *(mode for rest in later for i in rest for mode in term.operands[i].modes)}
    carried = dict.fromkeys(mode for operand in mine for mode in operand.modes)
    batch = tuple(mode for mode in before if mode in carried and mode in needed)
    contracted = tuple(mode for mode in before if mode in carried and mode not in needed)
    new = tuple(mode for mode in carried if mode not in before and mode in needed)
    own = differ(mine, bundles)
    lead = before[: before.index(TOKEN) + 1]
    features = tuple(mode for mode in before if mode not in (*lead, SITE, *contracted))
    if last:
        features, new = term.d_out, tuple(mode for mode in term.d_out if mode in new)
    site = (SITE,) if not last and (own or SITE in before) else ()
    after = (*lead, *site, *(features if last else (*features, *new)))
    sizes = {**term.sizes, TOKEN: tokens, "task": 1, SITE: 1}
    flops = prod(sizes[mode] for mode in {*before, *batch, *new}) * (2 if contracted else 1)
    large = len(mine) > 1 and term.size((*batch, *contracted, *new)) >= term.size(term.sides)
    at_site = not beforehand and (large or any(operand.is_base for operand in mine))
    site_modes = () if at_site else site_axes(group, {mode for operand in mine for mode in operand.site_modes})
    inputs = [operand.modes if at_site else operand_modes(group, operand) for operand in mine]
    output = (*site_modes, *batch, *contracted, *new)
    return Link(
        operands=operands,
        steps=contraction_steps(inputs, output, {**term.sizes, **site_sizes(group)}),
        batch=batch,
        contracted=contracted,
        new=new,
        site_modes=site_modes,
        before=before,
        after=after,
        own=own,
        shared=not (last or own or SITE in before),
        trainable=any(operand.block.trainable and not operand.is_base for operand in mine),
        flops=flops,
        at_site=at_site,
    )


def differ(operands: list[Operand], bundles: Bundles) -> bool:
    """Whether sites that read one tensor use different numbers of some operand."""
    several = [sites for sites in bundles if len(sites) > 1]
    return any(o.is_base or len({o.keys[site] for site in sites}) > 1 for o in operands for sites in several)


def site_axes(group: Group, carried: set[str]) -> tuple[str, ...]:
    """The axes over which tensors of a group are stacked: its site modes, or one axis for all where its sites fill no grid."""
    if not carried:
        return ()
    if prod(group.site_sizes.values()) == len(group.sites):
        return tuple(mode for mode in SITE_MODES if mode in carried)
    return (ANY_SITE,)


def site_sizes(group: Group) -> dict[str, int]:
    """How many values each site mode takes in a group."""
    return {**group.site_sizes, ANY_SITE: len(group.sites)}


def operand_modes(group: Group, operand: Operand) -> tuple[str, ...]:
    """The modes of an operand when its group's sites are stacked: site axes first."""
    return (*site_axes(group, {*operand.site_modes}), *operand.modes)
