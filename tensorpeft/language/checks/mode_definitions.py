"""Checks of a spec's modes: what they are defined as, that each has a meaning, and which of them are spoken of elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set

from tensorpeft.language import names
from tensorpeft.language.errors import Problem, did_you_mean, listing
from tensorpeft.language.keywords import BUILT_IN_MODES, TASK_MODE
from tensorpeft.language.modes import inside
from tensorpeft.language.nodes import MappingNode
from tensorpeft.language.spec import BASE_WEIGHT, BUDGET, SIDES, SITE_MODES, Spec
from tensorpeft.language.syntax import CONSTANTS, Definition, Part, Reference


def definitions(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """A side, or a part of it, is split into new modes; a new mode fuses modes that are known."""
    bonds, parts = set(names.bonds(spec)), names.side_parts(spec.modes)
    carried = (mode for reference in spec.update.references for mode in reference.modes)
    used = inside([d for d in spec.modes if d.name not in (*SIDES, *parts)], carried)
    seen, owners = set[str](), dict[str, str]()
    for definition in spec.modes:
        name, splits = definition.name, definition.name in (*SIDES, *parts)
        again = name in seen and name not in SIDES
        message = f"`{name}` is defined already" if again else _misnamed(definition, bonds)
        if message:
            yield Problem(message, definition.span)
            continue
        seen.add(name)
        for part in definition.parts:
            message = _not_split(part, owners, bonds) if splits else _not_fused(spec, definition, part, parts | bonds)
            if message:
                yield Problem(message, part.span)
            if splits:
                owners.setdefault(part.name, name)
        within = inside(spec.modes, (part.name for part in definition.parts)) if splits else {name}
        if not used & within:
            yield Problem(f"`{definition}` is defined, but no factor carries it", definition.span)


def _misnamed(definition: Definition, bonds: Set[str]) -> str | None:
    name = definition.name
    if name in bonds:
        return f"`{name}` is a bond with a size under `rank`; expected another name for a mode defined here"
    if name in BUILT_IN_MODES and name not in SIDES:
        return f"`{name}` is built in and has no parts; expected `d_out`, `d_in` or a new name"
    if len(definition.parts) < 2:
        return f"`{name}` has one part; expected a product of at least two, such as `layer * matrix`"
    return None


def _not_split(part: Part, owners: Mapping[str, str], bonds: Set[str]) -> str | None:
    """Why a mode cannot be a part of a side, or of a part of it."""
    name = part.name
    if name in owners:
        return f"`{name}` cannot be a part here: it belongs to `{owners[name]}` already"
    if name in bonds or name in (*SITE_MODES, TASK_MODE, *SIDES):
        kind = "bond" if name in bonds else "mode of its own"
        return f"`{name}` cannot be a part here: it is a {kind}; expected a new name"
    return None


def _not_fused(spec: Spec, definition: Definition, part: Part, fusible: Set[str]) -> str | None:
    """Why a mode cannot be fused with others."""
    name = part.name
    defined = {d.name for d in spec.modes} - {*SIDES}
    if name in defined and name not in fusible and definition.name in inside(spec.modes, (name,)):
        return f"`{definition.name}` would be a part of itself"
    known = {*BUILT_IN_MODES, *fusible, *defined}
    if name not in known:
        hint = did_you_mean(name, known) or f"; expected modes such as {listing(SITE_MODES[:2])}"
        return f"unknown mode `{name}`{hint}"
    if part.size is not None:
        return f"`{name}` has a size already; only the parts of `d_out` and `d_in` are given one"
    return None


def references(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """A factor carries a mode once; every mention of it has as many modes, and names those that are bound alike."""
    first: dict[str, Reference] = {}
    for reference in spec.update.references:
        twice = sorted({mode for mode in reference.modes if reference.modes.count(mode) > 1})
        known = first.setdefault(reference.factor, reference)
        if reference.factor == BASE_WEIGHT and not _is_weight(spec, reference):
            yield Problem(f"the base weight is `W[d_out, d_in]`; found `{reference}`", reference.span)
        elif twice:
            message = f"`{reference.factor}` carries {listing(twice)} twice; a factor carries a mode once"
            yield Problem(message, reference.span)
        elif expected := _unlike(spec, known, reference):
            message = f"`{reference.factor}` is `{known}` before, and `{reference}` here"
            yield Problem(f"{message}; expected {expected}", reference.span)


def _is_weight(spec: Spec, reference: Reference) -> bool:
    """Whether these can be the modes of the base weight: one as large as the output, and one as the input."""
    unbound = not any(names.is_bound(spec, mode) for mode in reference.modes)
    return len(reference.modes) == 2 and unbound and reference.modes[0] != "d_in" and reference.modes[1] != "d_out"


def _unlike(spec: Spec, known: Reference, reference: Reference) -> str | None:
    """What was expected of a mention that cannot be of the same factor as the first; None if it can."""
    if len(known.modes) != len(reference.modes):
        return "the same number of modes"
    for one, other in zip(known.modes, reference.modes, strict=True):
        if one != other and (names.is_bound(spec, one) or names.is_bound(spec, other)):
            return f"`{one if names.is_bound(spec, one) else other}` in the same place, since it is bound"
    return None


def known_modes(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """Every mode is built in, defined, or a bond with a size."""
    known, told = names.known_modes(spec), set()
    for reference in spec.update.references:
        for mode in reference.modes:
            if mode in told:
                continue
            told.add(mode)
            if mode in CONSTANTS:
                yield Problem(f"`{mode}` is a number; expected another name for a mode", reference.span)
            elif mode not in known:
                hint = did_you_mean(mode, known) or f"; if `{mode}` is a bond, give its size under `rank`"
                yield Problem(f"unknown mode `{mode}` of `{reference.factor}`{hint}", reference.span)


def used_bonds(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """A size is given to bonds only, and only to those that a factor carries or other arithmetic speaks of."""
    carried, parts = names.carried(spec), names.side_parts(spec.modes)
    spoken = names.in_sizes(spec) | names.in_initialisers(spec)
    for bond, _ in spec.ranks:
        span = table.place("rank", bond)
        if bond in BUILT_IN_MODES:
            yield Problem(f"`{bond}` is a mode that takes its size from the model; expected a bond", span)
        elif bond in parts:
            yield Problem(f"`{bond}` is a part defined under `modes`; expected a bond", span)
        elif bond not in carried | spoken:
            bonds = sorted(carried & {*names.bonds(spec)})
            hint = did_you_mean(bond, (*bonds, BUDGET)) or (f"; the bonds are {listing(bonds)}" if bonds else "")
            yield Problem(f"`{bond}` is given a size, but no factor carries it{hint}", span)


def ragged(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """A policy is for a mode that a factor carries, and that can differ from matrix to matrix."""
    modes = names.carried(spec)
    free = sorted(mode for mode in modes if not names.is_bound(spec, mode))
    for mode, _ in spec.ragged:
        if mode not in (*free, "*"):
            hint = did_you_mean(mode, free) or f"; expected one of {listing(free)}, or `*`"
            found = "is bound to sites or rows" if mode in modes else "is carried by no factor"
            yield Problem(f"`{mode}` {found}, so it is not ragged{hint}", table.place("ragged", mode))
