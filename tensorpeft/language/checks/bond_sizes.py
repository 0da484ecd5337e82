"""Checks of sizes and of the scale: what their arithmetic speaks of, and what it comes to where that can be told."""

from __future__ import annotations

from collections.abc import Iterator

from tensorpeft.language import names
from tensorpeft.language.checks.calls import alternatives, arithmetic, constant, size
from tensorpeft.language.errors import Problem
from tensorpeft.language.modes import reached
from tensorpeft.language.nodes import MappingNode
from tensorpeft.language.spec import Spec

MAX_RANK = 1 << 20
MAX_SIZE = 1 << 31


def rank_expressions(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """Ranks speak of sizes and of each other, never in a circle; a constant one is a whole number in range."""
    ranks, needs = dict(spec.ranks), _needs(spec)
    for rank in dict.fromkeys(ranks.values()):
        for value in alternatives(rank):
            yield from size(value, names.sizes(spec), f"rank `{value}`", MAX_RANK)
    circle = next((bond for bond in ranks if bond in reached([bond], needs)), None)
    if circle is not None:
        yield Problem(f"the rank of `{circle}` is `{ranks[circle]}`, which depends on itself", ranks[circle].span)


def part_sizes(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """The sizes of the parts of a side speak of ranks, of the model's sizes, and of parts of other modes."""
    needs = _needs(spec)
    for definition in spec.modes:
        fellows = {part.name for part in definition.parts}
        for part in definition.parts:
            if part.size is not None:
                yield from size(part.size, names.sizes(spec), f"the size of `{part}`", MAX_SIZE)
                if fellows & reached([part.name], needs):
                    message = f"the size of `{part}` depends on parts of `{definition.name}` itself"
                    yield Problem(f"{message}; expected others", part.size.span)


def _needs(spec: Spec) -> dict[str, set[str]]:
    """For each bond and part, the names that its size depends on; a part depends on the sizes of its fellows too."""
    needs = {bond: {*rank.names} for bond, rank in spec.ranks}
    for definition in spec.modes:
        said = {name for part in definition.parts if part.size is not None for name in part.size.names}
        said |= {definition.name} & names.side_parts(spec.modes)
        needs |= {part.name: needs.get(part.name, set()) | said for part in definition.parts}
    return needs


def scale(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """The scale speaks of ``alpha``, ranks and sizes, and is not zero."""
    if "alpha" in spec.scale.names and spec.alpha is None:
        yield Problem(f"`scale` is `{spec.scale}`, and `alpha` is missing; expected a key `alpha`", spec.scale.span)
        return
    unsized = names.carried(spec) - names.known_modes(spec)  # of these, it is told already that they need a rank
    for value in alternatives(spec.scale):
        problems = list(arithmetic(value, ("alpha", *names.sizes(spec), *unsized)))
        yield from problems
        if not problems and not value.names:
            number, error = constant(value)
            zero = "`scale` is 0, so the update is always zero; expected another number"
            if error or number == 0:
                yield error or Problem(zero, value.span)


def used_alpha(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """An ``alpha`` has an effect."""
    if spec.alpha is not None and "alpha" not in spec.scale.names:
        message = f"`alpha` has no effect, since `scale` is `{spec.scale}`"
        yield Problem(f"{message}; expected a `scale` such as `alpha / r`, or no `alpha`", table.where("alpha"))
