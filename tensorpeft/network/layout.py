"""The modes of one site: what each comes down to there, and how large it is."""

from __future__ import annotations

from collections.abc import Iterable, Set
from dataclasses import dataclass
from math import prod
from typing import TypeVar

from tensorpeft.language.errors import fail
from tensorpeft.language.source import Span
from tensorpeft.language.spec import SIDES, SITE_MODES, STRUCTURAL_MODES, Spec
from tensorpeft.language.syntax import Definition, Expression
from tensorpeft.network.shapes import ModelShape, Site

_Value = TypeVar("_Value")
LARGEST = 2**31  # of one mode: beyond it nothing fits a tensor index


@dataclass(frozen=True)
class Layout:
    """Sizes and atoms of every mode at a site."""

    sizes: dict[str, int]
    parts: dict[str, tuple[str, ...]]
    scale: float

    def atoms(self, mode: str, carried: Set[str]) -> tuple[str, ...]:
        """What a mode comes down to among carried ones: itself, or its atoms in order if one of its parts is carried."""
        if not self._inside(mode) & carried:
            return (mode,)
        return tuple(atom for part in self.parts[mode] for atom in self.atoms(part, carried))

    def _inside(self, mode: str) -> set[str]:
        parts = self.parts.get(mode, ())
        return {*parts}.union(*map(self._inside, parts))


def used_modes(spec: Spec) -> set[str]:
    """Every mode that a factor or a definition names."""
    written = {mode for product in spec.update.products for factor in product.factors for mode in factor.modes}
    return written | {part.name for definition in spec.modes for part in definition.parts}


def layout(spec: Spec, model: ModelShape, site: Site) -> Layout:
    """Resolve the modes of a spec at a site.

    Raises:
        SpecError: a size that is not a positive whole number, a split that does not divide, a matrix without heads.
    """
    used = used_modes(spec)
    sizes = {"d_out": site.d_out, "d_in": site.d_in}
    if spec.tasks:
        sizes["task"] = spec.tasks
    parts = {definition.name: tuple(part.name for part in definition.parts) for definition in spec.modes}
    if used.intersection(STRUCTURAL_MODES):
        _add_structure(spec, site, used, sizes, parts)
    names: dict[str, float] = {**dict(model.sizes), **sizes}
    for name, expression in _in_order(spec):
        names[name] = sizes[name] = _whole(expression, names, f"rank `{name}`", site)
    for definition in spec.modes:
        if definition.name in sizes:
            _split(definition, sizes[definition.name], sizes, names, site)
    for definition in spec.modes:
        sizes.setdefault(definition.name, prod(sizes[p] for p in parts[definition.name] if p not in SITE_MODES))
    if spec.alpha is not None:
        names["alpha"] = spec.alpha
    return Layout(sizes, parts, float(spec.scale.evaluate(names)))


def _add_structure(
    spec: Spec, site: Site, used: set[str], sizes: dict[str, int], parts: dict[str, tuple[str, ...]]
) -> None:
    """Give `head`, `head_dim` and `width` their sizes, and split each side by them unless the spec does so itself."""
    heads = _said_of(site, spec.heads.count, site.heads)
    written = {
        part.name: definition.name for definition in spec.modes if definition.name in SIDES for part in definition.parts
    }
    side = written.get("head", _said_of(site, spec.heads.side, site.head_side)) or "d_out"
    if heads is None:
        span = next(
            (f.span for p in spec.update.products for f in p.factors if {"head", "head_dim", "width"} & {*f.modes}),
            None,
        )
        raise fail(
            f"matrix `{site.matrix}` ({site.module}) has no heads, which the modes of this spec need; "
            "leave it out of `target`, or give `heads: {count: ...}`",
            span or spec.update.span,
        )
    if sizes[side] % heads:
        raise fail(f"{heads} heads do not divide {side} = {sizes[side]} of {site}", spec.target.span(site.matrix))
    other = SIDES[1 - SIDES.index(side)]
    sizes.update(head=heads, head_dim=sizes[side] // heads, width=sizes[other])
    if "head" not in written and "head_dim" not in written:
        parts.setdefault(side, ("head", "head_dim"))
    if "width" in used and "width" not in written:
        parts.setdefault(other, ("width",))


def _said_of(site: Site, values: Iterable[tuple[str, _Value]], otherwise: _Value | None) -> _Value | None:
    """The value that a spec gives for a site's matrix, else for ``*``, else what the model says."""
    by_matrix = dict(values)
    named = next((value for matrix, value in by_matrix.items() if site.is_named(matrix)), by_matrix.get("*"))
    return otherwise if named is None else named


def _in_order(spec: Spec) -> list[tuple[str, Expression]]:
    """The ranks, each after those that its expression names."""
    waiting, ordered = dict(spec.ranks), []
    while waiting:
        ready = [name for name, expression in waiting.items() if not expression.names & waiting.keys()]
        if not ready:
            name, expression = next(iter(waiting.items()))
            raise fail(f"rank `{name}` depends on itself through `{expression}`", expression.span)
        ordered += [(name, waiting.pop(name)) for name in ready]
    return ordered


def _whole(expression: Expression, names: dict[str, float], what: str, site: Site) -> int:
    value = expression.evaluate(names)
    if value != int(value):
        raise fail(f"{what} is {value:g} at {site}, expected a whole number; use ceil() or floor()", expression.span)
    if not 1 <= value < LARGEST:
        raise fail(f"{what} is {value:g} at {site}, expected a number from 1 to {LARGEST - 1}", expression.span)
    return int(value)


def _split(definition: Definition, total: int, sizes: dict[str, int], names: dict[str, float], site: Site) -> None:
    """Size the parts of a mode: as written, as known already, and the rest as near to each other as the number allows."""
    free = []
    remaining = total
    for part in definition.parts:
        if part.size is not None:
            sizes[part.name] = _whole(part.size, names, f"mode `{part.name}`", site)
        if part.name not in sizes:
            free.append(part.name)
            continue
        if remaining % sizes[part.name]:
            raise _uneven(definition, total, site, part.span)
        remaining //= sizes[part.name]
    if not free and remaining != 1:
        raise _uneven(definition, total, site, definition.span)
    sizes.update(zip(free, balanced(remaining, len(free)), strict=True))


def _uneven(definition: Definition, total: int, site: Site, span: Span | None) -> Exception:
    return fail(f"the parts of `{definition}` do not multiply to {definition.name} = {total} of {site}", span)


def balanced(number: int, parts: int) -> tuple[int, ...]:
    """Whole factors of a number, ascending, each the divisor nearest to the geometric mean of what is left.

    >>> balanced(4096, 3), balanced(768, 2), balanced(7, 2)
    ((16, 16, 16), (24, 32), (1, 7))
    """
    found = []
    for left in range(parts, 1, -1):
        mean = number ** (1 / left)
        divisors = {d for low in range(1, int(number**0.5) + 1) if number % low == 0 for d in (low, number // low)}
        found.append(min(divisors, key=lambda d: (abs(d / mean if d > mean else mean / d), d)))
        number //= found[-1]
    return tuple(sorted([*found, number])) if parts else ()
