"""Network -> Plan: in which order to contract.

The update of an activation x is a **chain**: x meets one tensor after the other (``planning.chain``). For every product of every
group the cheapest of some candidate orders is taken (``planning.orders``, ``planning.cost``), for all of the group's sites
together: sites that read one tensor share what they have in common (``planning.shared_inputs``), and what the prologue has
built for one group is free for the next.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from tensorpeft.network.network import Group, Network, Term
from tensorpeft.planning.base_product import through_base
from tensorpeft.planning.chain import SITE, Bundles, Chain, Link, by_itself, chain
from tensorpeft.planning.cost import Built, Cost, chain_cost, copies, prologue_key
from tensorpeft.planning.norms import NormPlan, norm_plans
from tensorpeft.planning.orders import TOKEN, activation, contract_path, orders
from tensorpeft.planning.regime import Regime
from tensorpeft.planning.shared_inputs import InputSet, bundles_of, input_sets
from tensorpeft.planning.verify import verify_chain, verify_prologue, verify_sets, verify_sites
from tensorpeft.planning.weight_sites import apart_chains, some_sites


@dataclass(frozen=True)
class GroupPlan:
    """The chains of one group of sites, one per product of the update."""

    group: Group
    chains: tuple[Chain, ...]
    bundles: Bundles
    prologue_flops: int  # on factors alone, for all sites of the group; what another group's prologue has made is free

    @property
    def site_flops(self) -> int:
        """FLOPs at all sites: of the activation's steps, and of building tensors there."""
        sizes = Counter(map(len, self.bundles))
        links = [link for chain in self.chains for link in chain.links]
        return sum(n * link.site_flops * (1 if link.shared else size) for size, n in sizes.items() for link in links)


@dataclass(frozen=True)
class Plan:
    """How every group of a network is contracted in a regime, and which sites go together."""

    network: Network
    regime: Regime
    groups: tuple[GroupPlan, ...]  # of the network's; one that goes through W x is two (``planning.base_product``)
    sets: tuple[InputSet, ...]  # of linear modules alone; they speak of ``groups`` by number

    @cached_property
    def norms(self) -> tuple[NormPlan, ...]:
        """How the norms are taken that magnitudes are divided by, once for each forward pass; ``flops`` are without them."""
        return norm_plans(self.network.groups, self.regime)

    @property
    def order(self) -> tuple[object, ...]:
        """A key of the emitted code: plans of one network that agree in it share their code, whatever their figures."""
        chains = [(planned.group.at, each) for planned in self.groups for each in planned.chains]
        return tuple((at, *((link.operands, link.pairs, link.at_site) for link in each.links)) for at, each in chains)

    @property
    def held(self) -> int:
        """Numbers that are made of trained factors beforehand, and held from the forward pass to the backward pass."""
        pairs = [pair for planned in self.groups for pair in zip(planned.group.terms, planned.chains, strict=True)]
        made = {
            prologue_key(term, link): copies(term, link) * term.size(link.modes)
            for term, each in pairs
            for link in each.links
            if link.trainable and len(link.operands) > 1 and not link.at_site
        }
        return sum(made.values())

    @property
    def goes_through(self) -> bool:
        """Whether some of it has what the base computes."""
        return any(planned.group.at != "site" for planned in self.groups)

    @property
    def flops(self) -> int:
        """FLOPs of one forward pass of the whole adapter, prologue included."""
        return self.prologue_flops + sum(g.site_flops for g in self.groups)

    @property
    def prologue_flops(self) -> int:
        """FLOPs on factors alone, once per forward pass."""
        return sum(g.prologue_flops for g in self.groups)

    @property
    def flops_per_token(self) -> int:
        """FLOPs per token of the site programs alone, rounded up."""
        return -(-sum(g.site_flops for g in self.groups) // self.regime.tokens)

    def verify(self) -> None:
        """Check that the plan does what its network says.

        Raises:
            InternalError: a chain or a step contracts something else, an input set has other sites, or FLOPs do not add up.
        """
        built: Built = set()
        for planned in self.groups:
            group = planned.group
            verify_sites(group, planned.bundles)
            whole = group if group.kind == "linear" else some_sites(group)
            for term, each in zip(whole.terms, planned.chains, strict=True):
                verify_chain(whole, term, each, self.regime.tokens)
            verify_prologue(whole, planned.chains, planned.prologue_flops, built)
        verify_sets(self.sets, [(planned.group, planned.bundles) for planned in self.groups])

    def __str__(self) -> str:
        regime = self.regime
        passes = "forward and backward" if regime.gradients else "forward alone"
        cost = f"{self.flops:,} FLOPs, {self.flops_per_token:,} per token"
        lines = [f"plan for {regime.tokens} tokens, {passes}: {cost}"]
        alike: dict[str, list[str]] = {}
        for plan in self.groups:
            text = "\n".join(_told(plan))
            alike.setdefault(re.sub(r"[\d,]+|\(.*\)", "", text), []).append(text)
        for first, *others in alike.values():
            lines.append(first)
            lines += [f"  and {len(others)} groups of other sizes"] if others else []
        lines += map(str, self.norms)
        return "\n".join(lines)


def _told(plan: GroupPlan) -> Iterator[str]:
    yield f"  {_sites(plan)}: {plan.prologue_flops:,} beforehand"
    for each, term in zip(plan.chains, plan.group.terms, strict=True):
        for link in each.links:
            yield f"    {_line(link, term)}"
            yield from (f"      {line}" for line in _step_lines(link, term))


def _sites(plan: GroupPlan) -> str:
    sizes = Counter(map(len, plan.bundles))
    together = " and ".join(f"{n} times {size} with one input" for size, n in sorted(sizes.items()) if size > 1)
    at = {"site": "", "output": ", behind W", "input": ", ahead of W"}[plan.group.at]
    found = f"{len(plan.group.sites)} sites like {plan.group.sites[0]}{at}"
    return f"{found}, {together}" if together else found


def _line(link: Link, term: Term) -> str:
    tensor = " ".join(term.operands[i].factor for i in link.operands)
    shape = ", ".join(f"{mode}={term.sizes[mode]}" for mode in link.modes)
    steps = " -> ".join(" ".join(mode.strip("<>") for mode in modes) for modes in (link.before, link.after))
    said = [f"{link.flops:,}"]
    if link.own and SITE in link.after:
        said.append("each site its own")
    if link.at_site:
        said.append(f"built there for {link.building:,}")
    return f"{steps}  by {tensor} ({shape}): {', '.join(said)}"


def _step_lines(link: Link, term: Term) -> Iterator[str]:
    """How a link's tensor is made: ``A[d_in, r] * B[r, s] -> A.B[d_in, s]``, with the FLOPs."""
    made: list[tuple[int, ...]] = [(i,) for i in link.operands]
    for step in link.steps:
        made.append(tuple(sorted(i for number in step.inputs for i in made[number])))
        tensors = ((made[step.inputs[0]], step.left), (made[step.inputs[1]], step.right), (made[-1], step.result))
        left, right, result = (
            f"{'.'.join(term.operands[i].factor for i in operands)}[{', '.join(mode.strip('<>') for mode in modes)}]"
            for operands, modes in tensors
        )
        yield f"{left} * {right} -> {result}: {step.flops:,}"


def plan(network: Network, regime: Regime = Regime(), *, alone: bool = True) -> Plan:
    """The cheapest of the candidate orders for every product, over all sites of its group together.

    Without gradients no plan needs more FLOPs than opt_einsum's best path at each site by itself, or than dW itself.
    An adapter that is ``alone`` on its model has what the base computes (``planning.base_product``).
    """
    whole = network.groups
    if alone and not network.spec.dropout:
        whole = tuple(part for group in whole for part in through_base(group))
    dropped = frozenset(name for name, _ in network.spec.dropout if name != "x")
    sets = input_sets(whole)
    built: Built = set()
    groups = []
    for number, group in enumerate(whole):
        if group.kind == "linear":
            groups.append(_plan_group(group, bundles_of(sets, number), dropped, regime, built))
        else:
            chains = apart_chains(group, regime)
            beforehand = sum(link.building for each in chains for link in each.links)
            groups.append(GroupPlan(group, chains, by_itself(group), beforehand))
    return Plan(network, regime, tuple(groups), sets)


def _plan_group(group: Group, bundles: Bundles, dropped: frozenset[str], regime: Regime, built: Built) -> GroupPlan:
    chains, beforehand = [], 0
    for term in group.terms:
        bonds = dropped & {mode for operand in term.operands for mode in operand.modes}
        found = [chain(group, term, order, regime.tokens, bundles) for order in orders(term, regime.tokens, bonds)]
        costs = [chain_cost(group, term, each, bundles, regime, built) for each in found]
        within = _bound(group, term, costs, regime)
        chains.append(min(zip(found, costs, strict=True), key=lambda pair: (pair[1].flops > within, pair[1].weight))[0])
        for link in chains[-1].links:
            key = prologue_key(term, link)
            beforehand += link.prologue_flops * (key not in built)
            built.add(key)
    return GroupPlan(group, tuple(chains), bundles, beforehand)


def _bound(group: Group, term: Term, costs: list[Cost], regime: Regime) -> float:
    """The FLOPs that no plan without gradients may exceed: those of every site by itself, in the best order, or as dW."""
    if regime.gradients:
        return float("inf")
    sizes = {**term.sizes, TOKEN: regime.tokens, "task": 1}
    x, factors = activation(term), [operand.modes for operand in term.operands]
    lead = x[: x.index(TOKEN)]
    by_chain = contract_path([x, *factors], (*lead, TOKEN, *term.d_out), sizes, few=7)[1]
    if {*term.d_in} & {*term.d_out}:  # behind or ahead of W; there is no dW
        return max(by_chain * len(group.sites), min(cost.flops for cost in costs))
    dense = contract_path(factors, (*lead, *term.d_in, *term.d_out), sizes)[1] if len(factors) > 1 else 0
    by_matrix = dense + 2 * regime.tokens * term.size((*term.d_in, *term.d_out))
    return max(min(by_chain, by_matrix) * len(group.sites), min(cost.flops for cost in costs))
