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
    """A group of linear modules as groups of which each has its products at one place (``Group.at``)."""
    behind = [_behind(term) for term in group.terms]
    ahead = [_ahead(term) for term in group.terms if group.sites[0].rows is None]
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


def _behind(term: Term) -> Term | None:
    """The product with W x for its input, if nothing else meets x."""
    found = _split(term)
    if found is None:
        return None
    (rows, columns), base, others = found
    if columns != term.d_in or base.take[1] is not None or _met(others) & {*columns}:
        return None
    return replace(term, operands=others, d_in=rows, columns=_positions(base, 0))


def _ahead(term: Term) -> Term | None:
    """The product that adds to the input of W, if nothing else makes the output."""
    found = _split(term)
    if found is None:
        return None
    (rows, columns), base, others = found
    if rows != term.d_out or base.take[0] is not None or _met(others) & {*rows}:
        return None
    return replace(term, operands=others, d_out=columns, rows=_positions(base, 1))


def _split(term: Term) -> tuple[tuple[tuple[str, ...], tuple[str, ...]], Operand, tuple[Operand, ...]] | None:
    """The modes of W's rows and of its columns, W, and the other factors; None unless W is there once, beside others."""
    bases = [operand for operand in term.operands if operand.is_base]
    others = tuple(operand for operand in term.operands if not operand.is_base)
    if len(bases) != 1 or not others:
        return None
    first = base_rows(bases[0])
    return (bases[0].modes[:first], bases[0].modes[first:]), bases[0], others


def base_rows(base: Operand) -> int:
    """How many of the modes of W are those of its rows."""
    rows = base.block.axes[0].size if base.take[0] is None else len(base.take[0])
    return next(n for n in range(len(base.modes) + 1) if prod(base.sizes[:n]) == rows)


def _met(operands: tuple[Operand, ...]) -> set[str]:
    return {mode for operand in operands for mode in operand.modes}


def _positions(base: Operand, axis: int) -> np.ndarray | None:
    taken = base.take[axis]
    return None if taken is None else np.asarray(taken)
