"""Products that go through the base weight: the base has computed W x, and nobody needs to do it again.

A product in which only W meets the input starts at W x, as the base's output is but for its bias; one of which only W makes the
output adds to the input of the base. What is left of both is a product without W. It is so where an adapter is alone
on its model: another one changes what the base gives and takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import numpy as np

from tensorpeft.network.network import Group, Operand, Term


def through_base(group: Group) -> Iterator[Group]:
    """A group as groups of which each has its products at one place (``Group.at``); itself where it has no linear modules."""
    if group.kind != "linear":
        yield group
        return
    behind = [without_base(term, 1) for term in group.terms]
    ahead = [without_base(term, 0) for term in group.terms if group.sites[0].rows is None]
    if ahead and all(ahead):
        sites = tuple(replace(site, d_out=site.d_in) for site in group.sites)
        yield replace(group, sites=sites, terms=tuple(term for term in ahead if term), at="input")
        return
    if any(behind):
        sites = tuple(replace(site, d_in=site.d_out, reads=None) for site in group.sites)
        yield replace(group, sites=sites, terms=tuple(term for term in behind if term), at="output")
    others = tuple(term for term, found in zip(group.terms, behind, strict=True) if found is None)
    if others:
        yield replace(group, terms=others)


def without_base(term: Term, end: int) -> Term | None:
    """The product without W, if W alone has the modes of one end of dW: of its output (0), or of its input (1).

    W has then to be there once, beside others.
    """
    bases = [operand for operand in term.operands if operand.is_base]
    others = tuple(operand for operand in term.operands if not operand.is_base)
    if len(bases) != 1 or not others:
        return None
    base, first = bases[0], base_rows(bases[0])
    sides, wanted = (base.modes[:first], base.modes[first:]), (term.d_out, term.d_in)[end]
    met = {mode for operand in others for mode in operand.modes}
    if sides[end] != wanted or base.take[end] is not None or met & {*wanted}:
        return None
    taken = base.take[1 - end]
    left = None if taken is None else np.asarray(taken)
    if end == 1:
        return replace(term, operands=others, d_in=sides[0], columns=left)
    return replace(term, operands=others, d_out=sides[1], rows=left)


def base_rows(base: Operand) -> int:
    """How many of the modes of W are those of its rows."""
    rows = base.block.free_axes[0].size if base.take[0] is None else len(base.take[0])
    return next(n for n in range(len(base.modes) + 1) if prod(base.sizes[:n]) == rows)
