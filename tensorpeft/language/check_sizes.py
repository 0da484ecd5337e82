"""Checks of sizes and of the scale: what their arithmetic speaks of, and what it comes to where that can be told."""

from __future__ import annotations

from collections.abc import Iterator

from tensorpeft.language import names
from tensorpeft.language.check_calls import alternatives, arithmetic, constant, size
from tensorpeft.language.errors import Problem
from tensorpeft.language.nodes import Table
from tensorpeft.language.spec import Spec
from tensorpeft.language.syntax import Expression
from tensorpeft.language.words import SIZE_NAMES

MAX_RANK = 1 << 20
MAX_SIZE = 1 << 31


def rank_expressions(spec: Spec, table: Table) -> Iterator[Problem]:
    """Ranks speak of sizes and of each other, never in a circle; a constant one is a whole number in range."""
    ranks = dict(spec.ranks)
    known = (*names.bonds(spec), *SIZE_NAMES)
    for rank in dict.fromkeys(ranks.values()):
        for value in alternatives(rank):
            yield from size(value, known, f"rank `{value}`", MAX_RANK)
    circle = next((bond for bond in ranks if bond in _reached(bond, ranks)), None)
    if circle is not None:
        yield Problem(f"the rank of `{circle}` is `{ranks[circle]}`, which depends on itself", ranks[circle].span)


def _reached(bond: str, ranks: dict[str, Expression]) -> set[str]:
    """The bonds that a rank depends on, directly or not."""
    reached: set[str] = set()
    ahead = [bond]
    while ahead:
        for name in ranks[ahead.pop()].names & ranks.keys():
            if name not in reached:
                reached.add(name)
                ahead.append(name)
    return reached


def part_sizes(spec: Spec, table: Table) -> Iterator[Problem]:
    """The sizes of the parts of a side speak of ranks and of the model's sizes."""
    for definition in spec.modes:
        for part in definition.parts:
            if part.size is not None:
                yield from size(part.size, (*names.bonds(spec), *SIZE_NAMES), f"the size of `{part}`", MAX_SIZE)


def scale(spec: Spec, table: Table) -> Iterator[Problem]:
    """The scale speaks of ``alpha``, ranks and sizes, and is not zero."""
    if "alpha" in spec.scale.names and spec.alpha is None:
        yield Problem(f"`scale` is `{spec.scale}`, and `alpha` is missing; expected a key `alpha`", spec.scale.span)
        return
    unsized = names.carried(spec) - names.known_modes(spec)  # of these, it is told already that they need a rank
    for value in alternatives(spec.scale):
        problems = list(arithmetic(value, ("alpha", *names.bonds(spec), *unsized, *SIZE_NAMES)))
        yield from problems
        if not problems and not value.names:
            number, error = constant(value)
            zero = "`scale` is 0, so the update is always zero; expected another number"
            if error or number == 0:
                yield error or Problem(zero, value.span)


def used_alpha(spec: Spec, table: Table) -> Iterator[Problem]:
    """An ``alpha`` has an effect."""
    if spec.alpha is not None and "alpha" not in spec.scale.names:
        message = f"`alpha` has no effect, since `scale` is `{spec.scale}`"
        yield Problem(f"{message}; expected a `scale` such as `alpha / r`, or no `alpha`", table.where("alpha"))
