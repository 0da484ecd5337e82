"""Look-ups of the names in a spec: its bonds, its modes and their parts, the factors that carry them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from tensorpeft.language.errors import did_you_mean, listing
from tensorpeft.language.keywords import BUILT_IN_MODES, SIZE_NAMES, TASK_MODE
from tensorpeft.language.modes import inside
from tensorpeft.language.spec import BASE_WEIGHT, SIDES, SITE_MODES, Spec
from tensorpeft.language.syntax import Definition, Spectral


def bonds(spec: Spec) -> tuple[str, ...]:
    """Those with a size, and those that a budget sizes."""
    return (*dict(spec.ranks), *spec.free)


def sizes(spec: Spec) -> tuple[str, ...]:
    """The names that arithmetic may use: bonds, parts of the sides, and sizes of the model."""
    parts = (part.name for definition in spec.modes for part in definition.parts)
    return (*bonds(spec), *dict.fromkeys(part for part in parts if part in side_parts(spec.modes)), *SIZE_NAMES)


def first_modes(spec: Spec) -> dict[str, tuple[str, ...]]:
    """Every factor's modes, as its first mention names them."""
    found: dict[str, tuple[str, ...]] = {}
    for reference in spec.update.references:
        found.setdefault(reference.factor, reference.modes)
    return found


def no_factor(name: str, factors: Collection[str]) -> str | None:
    """Why nothing can be said of a factor of this name; None if it is one of the update's."""
    if name == BASE_WEIGHT:
        return f"`{BASE_WEIGHT}` is the base weight, of which nothing is said here"
    if name in factors:
        return None
    hint = did_you_mean(name, factors) or f"; the update has {listing(factors) or 'none'}"
    return f"unknown factor `{name}`{hint}"


def splits(spec: Spec, side: str) -> list[Definition]:
    """The ways in which a side is split; a product uses one of them."""
    return [definition for definition in spec.modes if definition.name == side]


def side_parts(definitions: Sequence[Definition]) -> set[str]:
    """The parts of the sides that are split, and the parts of these."""
    return inside(definitions, SIDES) - {*SIDES}


def known_modes(spec: Spec) -> set[str]:
    """Every mode that has a meaning."""
    return {*BUILT_IN_MODES, *bonds(spec), *(definition.name for definition in spec.modes), *side_parts(spec.modes)}


def atoms(spec: Spec, modes: Iterable[str]) -> frozenset[str]:
    """The atoms of these modes: a defined mode is replaced by its parts, and these by theirs."""
    return frozenset(inside(spec.modes, modes) - {definition.name for definition in spec.modes})


def made_of(spec: Spec, mode: str) -> set[str]:
    """Every mode that a mode can be written by: itself, its parts, and what these are fused to."""
    mine = inside(spec.modes, (mode,))
    return mine | {definition.name for definition in spec.modes if atoms(spec, (definition.name,)) <= mine}


def carried(spec: Spec) -> set[str]:
    """Every mode that a factor carries, and what those that are defined come down to."""
    modes = {mode for reference in spec.update.references for mode in reference.modes}
    return modes | atoms(spec, modes)


def in_sizes(spec: Spec) -> set[str]:
    """The names in the arithmetic of sizes and of the scale."""
    sizes = (part.size for definition in spec.modes for part in definition.parts if part.size is not None)
    return {name for expression in (*dict(spec.ranks).values(), *sizes, spec.scale) for name in expression.names}


def in_initialisers(spec: Spec) -> set[str]:
    """The names in the arithmetic of initialisers."""
    inits = (rule.init.power if isinstance(rule.init, Spectral) else rule.init for _, rule in spec.factors)
    return {name for init in inits for name in init.names}


def is_bound(spec: Spec, mode: str) -> bool:
    """Whether a mode is bound to sites or to rows of a batch, or has a part that is."""
    return bool(atoms(spec, (mode,)) & {*SITE_MODES, TASK_MODE})
