"""Which sites read one tensor: they are planned together, and what they have in common is computed once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from tensorpeft.model.shape import Site
from tensorpeft.network.network import Group


@dataclass(frozen=True)
class Bundle:
    """The sites of one group that belong to one input set, by their numbers in the group."""

    group: int
    sites: tuple[int, ...]


@dataclass(frozen=True)
class InputSet:
    """Sites that read one tensor, of one group or of several."""

    bundles: tuple[Bundle, ...]


def input_sets(groups: Iterable[Group]) -> tuple[InputSet, ...]:
    """The input sets of linear modules, in the order of their first sites.

    A site whose update contains the base weight is a set of its own: nearly all of its work is on a tensor that it alone has.
    """
    found: dict[tuple[object, ...], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, group in enumerate(groups):
        if group.kind != "linear":
            continue
        alone = group.at == "output" or any(operand.is_base for term in group.terms for operand in term.operands)
        for i, site in enumerate(group.sites):
            key = (number, i) if alone else (group.at, *input_of(site))
            found[key][number].append(i)
    bundles = ((Bundle(number, tuple(sites)) for number, sites in by_group.items()) for by_group in found.values())
    return tuple(InputSet(tuple(each)) for each in bundles)


def input_of(site: Site) -> tuple[object, ...]:
    """A key that sites have in common if, and only if, they read one tensor."""
    if site.reads is None:
        return (site.path,)
    return (site.stack, site.layer, site.expert, site.reads, site.d_in)


def bundles_of(sets: tuple[InputSet, ...], number: int) -> tuple[tuple[int, ...], ...]:
    """How the sites of a group fall into input sets."""
    return tuple(bundle.sites for each in sets for bundle in each.bundles if bundle.group == number)
