"""Sites that are no linear modules: what their plans look like, and groups of some of them by themselves.

A convolution and an embedding are linear in their input, of which the features are not at hand: the first tensor that it meets is
one over all of them, with which the module's own operation is done, and one more may follow. The weight that a forward
reads by itself is replaced while that runs: there the update is dW, and no activation meets anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from tensorpeft.language.spec import BASE_WEIGHT, SITE_MODES
from tensorpeft.network.network import Axis, Group, Operand, Term
from tensorpeft.planning.chain import Chain, by_itself, chain
from tensorpeft.planning.orders import Order, orders
from tensorpeft.planning.regime import Regime


def some_sites(group: Group, numbers: Iterable[int] | None = None) -> Group:
    """Some sites of a group, or all, where the base weight is a factor like any other: one that each site has for itself."""
    chosen = tuple(range(len(group.sites)) if numbers is None else numbers)
    sites = tuple(group.sites[number] for number in chosen)
    keys = tuple(site.key for site in sites)

    def operand(old: Operand) -> Operand:
        if not old.is_base:
            return replace(old, keys=tuple(old.keys[number] for number in chosen))
        axes = (Axis("site", len(keys), keys), *old.block.free_axes)
        block = replace(old.block, name=BASE_WEIGHT, axes=axes, keys=keys)
        return replace(old, block=block, keys=keys, site_modes=SITE_MODES[: len(keys[0])])

    terms = (replace(term, operands=tuple(map(operand, term.operands))) for term in group.terms)
    return replace(group, sites=sites, terms=tuple(terms))


def dense_chain(group: Group, term: Term) -> Chain:
    """DW itself, whatever it costs: a chain of one link, built beforehand."""
    return chain_beforehand(group, term, (tuple(range(len(term.operands))),), 0)


def apart_chains(group: Group, regime: Regime) -> tuple[Chain, ...]:
    """The chains of a group of sites that are no linear modules; all tensors are built beforehand."""
    whole = some_sites(group)
    return tuple(_cheapest(whole, term, regime) for term in whole.terms)


def _cheapest(group: Group, term: Term, regime: Regime) -> Chain:
    if group.kind == "parameter":
        return dense_chain(group, term)
    found = [chain_beforehand(group, term, order, regime.tokens) for order in orders(term, regime.tokens, frozenset())]
    fitting = [each for each in found if len(each.links) == 1 or _is_pair(each, term)]
    passes = 3 if regime.gradients else 1

    def flops(each: Chain) -> int:
        return sum((link.flops * len(group.sites) + link.building) * passes for link in each.links)

    return min(fitting, key=flops)


def _is_pair(found: Chain, term: Term) -> bool:
    """Whether the first of two tensors takes all features of the input, and leaves none of them."""
    first = found.links[0]
    return len(found.links) == 2 and not first.batch and {*first.contracted} == {*term.d_in}


def chain_beforehand(group: Group, term: Term, order: Order, tokens: int) -> Chain:
    """A chain of tensors that are built beforehand. Rows of an embedding are looked up, not multiplied."""
    found = chain(group, term, order, tokens, by_itself(group), beforehand=True)
    if group.kind != "embedding":
        return found
    first, *others = found.links
    return replace(found, links=(replace(first, flops=0), *others))
