"""How the norms of the rows, or columns, of W + dW are taken, by which magnitudes are divided.

DoRA (Liu et al., 2024, arXiv:2402.09353), section 4.3. In dW every magnitude counts as one. What is then left of a product is
most often narrow somewhere: it is K S^T, with a side K (kept, cut) that has the modes along which there are norms, and a
side S (summed, cut) that has the others. With a factor `a` for what products with W make of W itself, row i of
``a W + K S^T`` has the squared norm

    a_i^2 |W_i|^2 + 2 a_i (K * W S)_i + (K * K S^T S)_i        (* is the product entry by entry, summed over the cut)

in which nothing is as large as dW. |W_i|^2 changes only when W does, W S is the one product that each site has for itself, and
the rest is done for all sites of a group at once. Where the cut is wide, dW is made instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from tensorpeft.network.network import Group, Operand, Term
from tensorpeft.planning.base_product import without_base
from tensorpeft.planning.chain import Chain, by_itself, chain
from tensorpeft.planning.orders import orders
from tensorpeft.planning.regime import Regime
from tensorpeft.planning.weight_sites import dense_chain, some_sites

NUMBER_BYTES = 4  # norms are computed in float32 at least
Half = tuple[Term, Chain]  # a product, and how its tensors are made
_ENTRYWISE = 4  # passes over a matrix, and kernels, that add dW to W and take the norms of the sum


@dataclass(frozen=True)
class NormPlan:
    """The norms at a group of sites along one side, by one way of two.

    Each of ``halves`` is a product in two links, of which the first has the modes of the input. Each of ``scales`` is one link:
    by what a product multiplies the rows of W, or its columns. ``group`` has their terms, halves first. Where no such way is
    the cheapest, it ``is_dense``, and dW is made at each site.
    """

    group: Group
    side: str  # "d_out": the norms of rows; "d_in": of columns
    halves: tuple[Chain, ...]
    scales: tuple[Chain, ...]
    magnitudes: tuple[Operand, ...]
    plain: float  # of products that are W and magnitudes alone: by what they multiply W
    is_dense: bool
    flops: int  # of taking the norms once, at all sites

    @property
    def products(self) -> Iterator[tuple[Term, Chain]]:
        """The terms of a narrow plan with their chains, those of ``halves`` first."""
        chains = (*self.halves, *self.scales)
        return zip(self.group.terms if chains else (), chains, strict=True)

    @property
    def kept(self) -> int:
        """How many norms there are at a site."""
        return self.group.sites[0].d_out if self.side == "d_out" else self.group.sites[0].d_in

    @property
    def cut(self) -> int:
        """How many columns the two sides K and S have, of all products together."""
        return sum(term.size(each.links[0].new) for term, each in zip(self.group.terms, self.halves, strict=False))

    def __str__(self) -> str:
        found = f"{len(self.group.sites)} sites like {self.group.sites[0]}"
        rows = "rows" if self.side == "d_out" else "columns"
        way = "with dW made" if self.is_dense else f"by a cut of {self.cut}"
        return f"  norms of {rows} of W + dW at {found}, {way}: {self.flops:,}"


def norm_plans(groups: tuple[Group, ...], regime: Regime) -> tuple[NormPlan, ...]:
    """The norms that a network's magnitudes are divided by."""
    return tuple(_norm_plan(group, side, regime) for group in groups for side in _sides(group))


def _sides(group: Group) -> tuple[str, ...]:
    """The sides along which a group has norms."""
    return tuple(dict.fromkeys(_side(t, o) for t in group.terms for o in t.operands if o.block.rule.norm))


def _side(term: Term, magnitude: Operand) -> str:
    return "d_in" if {*magnitude.modes} == {*term.d_in} else "d_out"


def _norm_plan(group: Group, side: str, regime: Regime) -> NormPlan:
    """The cheaper of the two ways; the narrow one is there if every product has its part in it."""
    whole = some_sites(group)
    divided = tuple(o for term in group.terms for o in term.operands if o.block.rule.norm and _side(term, o) == side)
    dense = [dense_chain(whole, term) for term in whole.terms]
    site, steps = group.sites[0], sum(len(link.steps) for each in dense for link in each.links)
    flops = _building(dense) + len(group.sites) * _ENTRYWISE * site.d_out * site.d_in
    by_matrix = NormPlan(group, side, (), (), divided, 0.0, True, flops)
    halves: list[Half] = []
    scales: list[Half] = []
    plain = 0.0
    for term in map(_without_magnitudes, whole.terms):
        bases = [operand.is_base for operand in term.operands]
        if bases == [True] and _is_whole(term):
            plain += term.sign * group.scale
            continue
        made = (_scale if any(bases) else _halves)(whole, term, side)
        if made is None:
            return by_matrix
        (scales if any(bases) else halves).append(made)
    first, rest = (tuple(each for _, each in found) for found in (halves, scales))
    terms = tuple(term for term, _ in (*halves, *scales))
    flops = _narrow_flops(group, side, halves) + _building(rest)
    narrow = NormPlan(replace(group, terms=terms), side, first, rest, divided, plain, False, flops)
    costs = (_cost(narrow, 1, 1, regime), _cost(by_matrix, _ENTRYWISE + 1, _ENTRYWISE + steps, regime))
    return narrow if costs[0] <= costs[1] else by_matrix


def _cost(planned: NormPlan, passes: int, kernels: int, regime: Regime) -> float:
    """A number to compare by, as ``planning.cost`` has it: at each site so many passes over a matrix, and kernels."""
    site = planned.group.sites[0]
    moved = passes * site.d_out * site.d_in * NUMBER_BYTES + kernels * regime.launch
    return planned.flops + len(planned.group.sites) * moved * regime.balance


def _building(chains: Iterable[Chain]) -> int:
    return sum(link.building for each in chains for link in each.links)


def _narrow_flops(group: Group, side: str, halves: list[Half]) -> int:
    """The halves beforehand; then W S, the Gram matrix S^T S, K times that, and the two products entry by entry."""
    site, cut = group.sites[0], sum(term.size(each.links[0].new) for term, each in halves)
    kept, summed = (site.d_out, site.d_in) if side == "d_out" else (site.d_in, site.d_out)
    at_site = 2 * cut * (kept * summed + cut * summed + kept * cut + 2 * kept)
    return _building(each for _, each in halves) + len(group.sites) * at_site


def _without_magnitudes(term: Term) -> Term:
    """A product without its magnitudes, which count as one; but with those that alone have the modes of a side."""
    others = tuple(operand for operand in term.operands if not operand.block.rule.norm)
    met = {mode for operand in others for mode in operand.modes}
    return replace(term, operands=others) if {*term.sides} <= met else term


def _is_whole(term: Term) -> bool:
    """Whether a product reads all of W, and lands on all of it."""
    cuts = [some for operand in term.operands if operand.is_base for some in operand.take]
    return term.rows is None and term.columns is None and not any(some is not None for some in cuts)


def _scale(group: Group, term: Term, side: str) -> Half | None:
    """A product with W as that of W and a number for each row, or column; None where it is more than this."""
    found = without_base(term, 1 if side == "d_out" else 0) if _is_whole(term) else None
    if found is None or found.d_in != found.d_out:
        return None
    made = dense_chain(group, found)
    return None if made.links[0].contracted or made.links[0].new else (found, made)


def _halves(group: Group, term: Term, side: str) -> Half | None:
    """A product as two links that have nothing in common but the cut, the cheapest of those that there are."""
    pairs = (order for order in orders(term, 1, frozenset()) if len(order) == 2)
    made = [chain(group, term, order, 1, by_itself(group), beforehand=True) for order in pairs]
    found = [(term, each) for each in made if _is_cut(term, each)]
    return min(found, key=lambda each: _narrow_flops(group, side, [each]), default=None)


def _is_cut(term: Term, found: Chain) -> bool:
    """Whether the first link has all of the input's modes, the second all of the output's, and both the cut."""
    first, second = found.links
    apart = not first.batch and not second.batch and {*second.contracted} == {*first.new}
    return apart and {*first.contracted} == {*term.d_in} and {*second.new} == {*term.d_out}
