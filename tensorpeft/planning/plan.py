"""Network -> Plan: in which order to contract.

The update of an activation x is a **chain**: x meets one tensor after the other. Each such tensor is a **link**: a factor as
it is, or a product of factors that is contracted beforehand, in the **prologue**, for all sites of a group at once. LoRA is a
chain of two raw links; LoRTA's second link is the product of four factors; a chain of one link is dW itself.

This is the only module that asks opt_einsum for a path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import networkx as nx
import opt_einsum

from tensorpeft.language.spec import SITE_MODES
from tensorpeft.network.network import Group, Network, Operand, Term
from tensorpeft.network.rank import minimum_cut
from tensorpeft.planning.regime import Regime

TOKEN = "token"
Path = tuple[tuple[int, ...], ...]  # as opt_einsum writes paths: at each step, the positions of what is contracted
_EXACT = 7  # operands up to which the optimal path is searched exhaustively


@dataclass(frozen=True)
class Link:
    """One tensor that the activation meets.

    ``operands`` are positions in the term; ``path`` contracts them pair by pair. ``modes`` are the tensor's modes: ``batch``
    (kept, shared with the activation), ``contracted``, then ``new`` ones. ``before`` and ``after`` are the activation's modes.
    """

    operands: tuple[int, ...]
    path: Path
    batch: tuple[str, ...]
    contracted: tuple[str, ...]
    new: tuple[str, ...]
    site_modes: tuple[str, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    flops: (
        int  # at one site, over all tokens: of the activation's step, and of building the tensor if that happens there
    )
    prologue_flops: int  # of building the tensor beforehand, for all sites of the group
    at_site: bool = False  # the base weight is part of it, so it is built at each site, when the site needs it

    @property
    def modes(self) -> tuple[str, ...]:
        return (*self.batch, *self.contracted, *self.new)

    @property
    def is_matmul(self) -> bool:
        """Whether it contracts all of the activation's features at once: then it is a matrix (features, new features)."""
        features = self.before[self.before.index(TOKEN) + 1 :]
        return features == self.contracted and set(self.batch) <= {"task"}


@dataclass(frozen=True)
class Chain:
    """The links of one product, in the order in which the activation meets them."""

    sign: int
    links: tuple[Link, ...]


@dataclass(frozen=True)
class GroupPlan:
    """The chains of one group of sites, one per product of the update."""

    group: Group
    chains: tuple[Chain, ...]

    @property
    def by_task(self) -> bool:
        """Whether a site needs to know which task each row of a batch belongs to."""
        return any("task" in link.batch for chain in self.chains for link in chain.links)

    @property
    def by_base(self) -> bool:
        """Whether a site needs its base weight."""
        return any(link.at_site for chain in self.chains for link in chain.links)

    @property
    def site_flops(self) -> int:
        """FLOPs at one site: of the activation's steps, and of building tensors there."""
        return sum(link.flops for chain in self.chains for link in chain.links)

    @property
    def prologue_flops(self) -> int:
        """FLOPs on factors alone, for all sites of the group."""
        return sum(link.prologue_flops for chain in self.chains for link in chain.links)


@dataclass(frozen=True)
class Plan:
    """How every group of a network is contracted in a regime."""

    network: Network
    regime: Regime
    groups: tuple[GroupPlan, ...]

    @property
    def flops(self) -> int:
        """FLOPs of one forward pass of the whole adapter, prologue included."""
        return sum(g.prologue_flops + g.site_flops * len(g.group.sites) for g in self.groups)

    @property
    def flops_per_token(self) -> int:
        """FLOPs per token of the site programs alone, rounded up."""
        return -(-sum(g.site_flops * len(g.group.sites) for g in self.groups) // self.regime.tokens)

    def __str__(self) -> str:
        lines = [f"plan for {self.regime.tokens} tokens: {self.flops:,} FLOPs, {self.flops_per_token:,} per token"]
        for plan in self.groups:
            lines.append(
                f"  {len(plan.group.sites)} sites like {plan.group.sites[0]}: {plan.prologue_flops:,} beforehand"
            )
            for chain, term in zip(plan.chains, plan.group.terms, strict=True):
                for link in chain.links:
                    tensor = " ".join(term.operands[i].factor for i in link.operands)
                    shape = ", ".join(f"{mode}={term.sizes[mode]}" for mode in link.modes)
                    lines.append(
                        f"    {' '.join(link.before)} -> {' '.join(link.after)}  by {tensor} ({shape}): {link.flops:,}"
                    )
        return "\n".join(lines)


def plan(network: Network, regime: Regime = Regime()) -> Plan:
    """The cheapest of the candidate orders for every group, by FLOPs over all of its sites together."""
    return Plan(network, regime, tuple(_plan_group(group, regime) for group in network.groups))


def dense_plan(group: Group) -> GroupPlan:
    """DW itself: one link for each product, whatever it costs."""
    return GroupPlan(group, tuple(_chain(group, term, (tuple(range(len(term.operands))),), 1) for term in group.terms))


def _plan_group(group: Group, regime: Regime) -> GroupPlan:
    return GroupPlan(group, tuple(_cheapest(group, term, regime) for term in group.terms))


def _cheapest(group: Group, term: Term, regime: Regime) -> Chain:
    def cost(chain: Chain) -> tuple[int, int]:
        flops = sum(
            _passes(term, link, regime) * (link.flops * len(group.sites) + link.prologue_flops) for link in chain.links
        )
        built = sum(term.size(link.modes) for link in chain.links if len(link.operands) > 1)
        return flops, built  # between equals, the one that stores less

    orders = dict.fromkeys(_orders(term, regime))
    return min((_chain(group, term, order, regime.tokens) for order in orders), key=cost)


def _passes(term: Term, link: Link, regime: Regime) -> int:
    """How often a link's work is done: forward, for the activation's gradient, and for the factors' own."""
    if not regime.gradients:
        return 1
    return 2 + any(term.operands[i].block.trainable for i in link.operands)


def _orders(term: Term, regime: Regime) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Candidate chains: which operands form each link, in the order of the links."""
    everything = tuple(range(len(term.operands)))
    yield (everything,)
    yield from _split_at_minimum_cut(term)
    for tokens in dict.fromkeys((regime.tokens, 1, 1 << 30)):
        yield _lineage(_path(term, tokens), len(everything))


def _split_at_minimum_cut(term: Term) -> Iterator[tuple[tuple[int, ...], ...]]:
    """The pair (L, R) of the normal form: the factors on the input's side of the minimum cut, and the others."""
    cut = {*minimum_cut(term), *SITE_MODES, "task"}
    graph = nx.Graph()
    graph.add_nodes_from(range(len(term.operands)))
    for i, operand in enumerate(term.operands):
        graph.add_edges_from((i, mode) for mode in operand.modes if mode not in cut)
    graph.add_edges_from(("input", mode) for mode in term.d_in if mode not in cut)
    graph.add_node("input")
    reached = nx.node_connected_component(graph, "input")
    left = tuple(i for i in range(len(term.operands)) if i in reached)
    right = tuple(i for i in range(len(term.operands)) if i not in reached)
    if left and right:
        yield left, right


def _activation(term: Term) -> tuple[str, ...]:
    tasks = ("task",) if any("task" in operand.modes for operand in term.operands) else ()
    return (*tasks, TOKEN, *term.d_in)


def _path(term: Term, tokens: int) -> Path:
    """The path for the activation (operand 0) and the factors at one site."""
    x = _activation(term)
    output = (*(mode for mode in x if mode not in term.d_in), *term.d_out)
    sizes = {**term.sizes, TOKEN: tokens, "task": 1}
    return _contract([x, *(operand.modes for operand in term.operands)], output, sizes)[0]


def _contract(inputs: list[tuple[str, ...]], output: tuple[str, ...], sizes: Mapping[str, int]) -> tuple[Path, int]:
    """opt_einsum's path through tensors of these modes, pair by pair, and its FLOPs."""
    known = dict.fromkeys(mode for each in inputs for mode in each)
    letter = {mode: opt_einsum.get_symbol(number) for number, mode in enumerate(known)}
    left, right = (["".join(letter[mode] for mode in each) for each in group] for group in (inputs, [output]))
    shapes = [tuple(sizes[mode] for mode in each) for each in inputs]
    optimizer = "optimal" if len(shapes) <= _EXACT else "auto-hq"
    path, info = opt_einsum.contract_path(f"{','.join(left)}->{right[0]}", *shapes, shapes=True, optimize=optimizer)
    return tuple(tuple(step) for step in path), int(info.opt_cost)


def _lineage(path: Path, n_factors: int) -> tuple[tuple[int, ...], ...]:
    """The operands that the activation meets, in order, along a path whose operand 0 is the activation."""
    live: list[tuple[int, ...]] = [(-1,), *((i,) for i in range(n_factors))]
    met: list[tuple[int, ...]] = []
    for step in path:
        merged = [live[i] for i in step]
        live = [operands for i, operands in enumerate(live) if i not in step]
        if (-1,) in merged:
            met += [operands for operands in merged if operands != (-1,)]
            live.append((-1,))
        else:
            live.append(tuple(sorted(i for operands in merged for i in operands)))
    return tuple(met)


def _chain(group: Group, term: Term, order: tuple[tuple[int, ...], ...], tokens: int) -> Chain:
    before = _activation(term)
    links = []
    for position, operands in enumerate(order):
        later = {mode for rest in order[position + 1 :] for i in rest for mode in term.operands[i].modes}
        links.append(_link(group, term, operands, before, later, last=position + 1 == len(order), tokens=tokens))
        before = links[-1].after
    return Chain(term.sign, tuple(links))


def _link(
    group: Group,
    term: Term,
    operands: tuple[int, ...],
    before: tuple[str, ...],
    later: set[str],
    *,
    last: bool,
    tokens: int,
) -> Link:
    needed = later | {*term.d_out, *before[: before.index(TOKEN) + 1]}
    own = dict.fromkeys(mode for i in operands for mode in term.operands[i].modes)
    batch = tuple(mode for mode in before if mode in own and mode in needed)
    contracted = tuple(mode for mode in before if mode in own and mode not in needed)
    new = tuple(mode for mode in own if mode not in before and mode in needed)
    after = (*(mode for mode in before if mode not in contracted), *new)
    if last:
        after = (*before[: before.index(TOKEN) + 1], *term.d_out)
        new = tuple(mode for mode in term.d_out if mode in new)
    sizes = {**term.sizes, TOKEN: tokens, "task": 1}
    flops = prod(sizes[mode] for mode in {*before, *batch, *new}) * (2 if contracted else 1)
    if any(term.operands[i].is_base for i in operands):
        path, built = _at_site(term, operands, (*batch, *contracted, *new))
        return Link(operands, path, batch, contracted, new, (), before, after, flops + built, 0, at_site=True)
    carried = {mode for i in operands for mode in term.operands[i].site_modes}
    site_modes = site_axes(group, carried)
    path, prologue = _prologue(group, term, operands, (*site_modes, *batch, *contracted, *new))
    return Link(operands, path, batch, contracted, new, site_modes, before, after, flops, prologue)


def site_axes(group: Group, carried: set[str]) -> tuple[str, ...]:
    """The axes over which tensors of a group are stacked: its site modes, or ``site`` where its sites fill no grid."""
    if not carried:
        return ()
    if prod(site_sizes(group)[mode] for mode in SITE_MODES) == len(group.sites):
        return tuple(mode for mode in SITE_MODES if mode in carried)
    return ("site",)


def site_sizes(group: Group) -> dict[str, int]:
    """How many values each site mode takes in a group."""
    sizes = {mode: len({getattr(site, mode, None) for site in group.sites}) for mode in SITE_MODES}
    return {**sizes, "site": len(group.sites)}


def _prologue(group: Group, term: Term, operands: tuple[int, ...], modes: tuple[str, ...]) -> tuple[Path, int]:
    """The path that builds a link's tensor for all sites at once, and its FLOPs."""
    if len(operands) == 1:
        return (), 0
    inputs = [operand_modes(group, term.operands[i]) for i in operands]
    return _contract(inputs, modes, {**term.sizes, **site_sizes(group)})


def _at_site(term: Term, operands: tuple[int, ...], modes: tuple[str, ...]) -> tuple[Path, int]:
    """The path that builds a link's tensor at one site, and its FLOPs."""
    return _contract([term.operands[i].modes for i in operands], modes, term.sizes) if len(operands) > 1 else ((), 0)


def operand_modes(group: Group, operand: Operand) -> tuple[str, ...]:
    """The modes of an operand when its group's sites are stacked: site axes first."""
    return (*site_axes(group, {*operand.site_modes}), *operand.modes)
