"""Checks of the update: its modes, its bonds, and how its factors hang together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass

from tensorpeft.language.errors import Problem, clip, did_you_mean, listing
from tensorpeft.language.nodes import Table
from tensorpeft.language.spec import BASE_WEIGHT, SIDES, SITE_MODES, STRUCTURAL_MODES, Spec
from tensorpeft.language.syntax import Definition, Part, Product, Reference
from tensorpeft.language.words import BUILT_IN_MODES, TASK_MODE


def definitions(spec: Spec, table: Table) -> Iterator[Problem]:
    """A side is split into new modes; a new mode fuses modes that are known."""
    bonds, carried = set(_bonds(spec)), _carried(spec)
    names = {definition.name for definition in spec.modes}
    parts = {part.name for definition in spec.modes if definition.name in SIDES for part in definition.parts}
    owners: dict[str, str] = {}
    for definition in spec.modes:
        message = _misnamed(definition, owners, bonds)
        if message:
            yield Problem(message, definition.span)
            continue
        owners[definition.name] = definition.name
        split = definition.name in SIDES
        for part in definition.parts:
            message = _misplaced(part, split, owners, names, bonds if split else bonds | parts)
            if message:
                yield Problem(message, part.span)
            if split:
                owners[part.name] = definition.name
        if not carried & ({part.name for part in definition.parts} if split else {definition.name}):
            yield Problem(f"`{definition}` is defined, but no factor carries it", definition.span)


def _misnamed(definition: Definition, owners: Mapping[str, str], bonds: Set[str]) -> str | None:
    name = definition.name
    if name in owners:
        return f"`{name}` is {'defined' if owners[name] == name else f'a part of `{owners[name]}`'} already"
    if name in bonds:
        return f"`{name}` is a bond with a size under `rank`; expected another name for a mode defined here"
    if name in BUILT_IN_MODES and name not in SIDES:
        return f"`{name}` is built in and has no parts; expected `d_out`, `d_in` or a new name"
    if len(definition.parts) < 2:
        return f"`{name}` has one part; expected a product of at least two, such as `layer * matrix`"
    return None


def _misplaced(part: Part, split: bool, owners: Mapping[str, str], names: Set[str], bonds: Set[str]) -> str | None:
    """What is wrong with a part, of a side that is split or of modes that are fused."""
    name = part.name
    if name in names or (split and name in owners):
        return f"`{name}` cannot be a part here: it belongs to `{owners.get(name, name)}` already"
    if split and (name in bonds or name in (*SITE_MODES, TASK_MODE, *SIDES)):
        kind = "bond" if name in bonds else "mode of its own"
        return f"`{name}` cannot be a part here: it is a {kind}; expected a new name"
    if not split and name not in BUILT_IN_MODES and name not in bonds:
        hint = did_you_mean(name, (*BUILT_IN_MODES, *bonds)) or f"; expected modes such as {listing(SITE_MODES[:2])}"
        return f"unknown mode `{name}`{hint}"
    if not split and part.size is not None:
        return f"`{name}` has a size already; only the parts of `d_out` and `d_in` are given one"
    return None


def references(spec: Spec, table: Table) -> Iterator[Problem]:
    """A factor carries each of its modes once, and the same modes wherever it stands."""
    first: dict[str, Reference] = {}
    for reference in _references(spec):
        twice = sorted({mode for mode in reference.modes if reference.modes.count(mode) > 1})
        known = first.setdefault(reference.factor, reference)
        if reference.factor == BASE_WEIGHT and not _is_weight(reference):
            yield Problem(f"the base weight is `W[d_out, d_in]`; found `{reference}`", reference.span)
        elif twice:
            message = f"`{reference.factor}` carries {listing(twice)} twice; a factor carries a mode once"
            yield Problem(message, reference.span)
        elif len(known.modes) != len(reference.modes):
            message = f"`{reference.factor}` is `{known}` before, and `{reference}` here"
            yield Problem(f"{message}; expected the same number of modes", reference.span)


def _is_weight(reference: Reference) -> bool:
    """Whether these can be the modes of the base weight: an output-sized one and an input-sized one."""
    bound = {*SITE_MODES, TASK_MODE}
    return len(reference.modes) == 2 and not bound & {*reference.modes} and reference.modes != SIDES[::-1]


def known_modes(spec: Spec, table: Table) -> Iterator[Problem]:
    """Every mode is built in, defined, or a bond with a size."""
    known, told = _known(spec), set()
    for reference in _references(spec):
        for mode in reference.modes:
            if mode not in known and mode not in told:
                told.add(mode)
                hint = did_you_mean(mode, known) or f"; if `{mode}` is a bond, give its size under `rank`"
                yield Problem(f"unknown mode `{mode}` of `{reference.factor}`{hint}", reference.span)


def contracted_bonds(spec: Spec, table: Table) -> Iterator[Problem]:
    """A bond stands in at least two factors of a product."""
    bonds = dict.fromkeys(_bonds(spec))
    for product in spec.update.products:
        carried = Counter(atom for reference in product.factors for atom in _atoms(spec, reference))
        for reference in product.factors:
            for mode in sorted(_atoms(spec, reference) & bonds.keys()):
                if carried[mode] == 1:
                    message = f"bond `{mode}` is in `{reference.factor}` alone, so there is nothing to contract it with"
                    yield Problem(f"{message}; expected it in a second factor of the product", reference.span)


def used_bonds(spec: Spec, table: Table) -> Iterator[Problem]:
    """A size is given to bonds only, and only to bonds that a factor carries."""
    sizes = table.get("rank")
    carried = {atom for reference in _references(spec) for atom in _atoms(spec, reference)} | _carried(spec)
    named = {name for _, size in spec.ranks for name in size.names} | set(dict(spec.ranks))
    defined = {part.name for definition in spec.modes if definition.name in SIDES for part in definition.parts}
    for bond, size in spec.ranks:
        span = sizes.where(bond) if isinstance(sizes, Table) else size.span
        if bond in BUILT_IN_MODES:
            yield Problem(f"`{bond}` is a mode that takes its size from the model; expected a bond", span)
        elif bond in defined:
            yield Problem(f"`{bond}` is a part defined under `modes`; expected a bond", span)
        elif bond not in carried:
            bonds = sorted(carried & named)
            hint = did_you_mean(bond, bonds) or (f"; the bonds are {listing(bonds)}" if bonds else "")
            yield Problem(f"`{bond}` is given a size, but no factor carries it{hint}", span)


def open_sides(spec: Spec, table: Table) -> Iterator[Problem]:
    """Every product carries the whole output and the whole input.

    ``head`` with ``head_dim`` is one side of a matrix and ``width`` the other; which is which, the model says.
    """
    known = _known(spec)
    for product in spec.update.products:
        if {mode for reference in product.factors for mode in reference.modes} <= known:
            missing = _missing(spec, {atom for reference in product.factors for atom in _atoms(spec, reference)})
            if missing:
                message = f"no factor of `{clip(str(product), 200)}` carries {listing(missing)}"
                yield Problem(f"{message}; expected every product to carry the whole output and input", product.span)


def _missing(spec: Spec, atoms: set[str]) -> list[str]:
    """What these modes lack of the two sides."""
    split = {part.name for definition in spec.modes if definition.name in SIDES for part in definition.parts}
    by_heads = atoms & {*STRUCTURAL_MODES} - split
    lacking = [side for side in SIDES if not _atoms(spec, Reference("", (side,))) <= atoms]
    complete = [modes for modes in ({"head", "head_dim"}, {"width"}) if modes <= by_heads]
    if len(lacking) <= len(complete):
        return []
    if len(lacking) == 2 and by_heads:
        return [mode for mode in STRUCTURAL_MODES if mode not in atoms]
    return [part for side in lacking for part in sorted(_atoms(spec, Reference("", (side,))) - atoms)]


def connected(spec: Spec, table: Table) -> Iterator[Problem]:
    """No group of factors is bound to nothing but itself."""
    bonds = set(_bonds(spec))
    for product in spec.update.products:
        for group in _groups(spec, product):
            if len(group.references) > 1 and group.atoms <= bonds:  # of one by itself, its lone bonds are told
                names = listing(dict.fromkeys(reference.factor for reference in group.references))
                message = f"nothing joins {names} to the rest of the product"
                yield Problem(f"{message}; expected a bond that another factor carries", group.references[0].span)


def tasks(spec: Spec, table: Table) -> Iterator[Problem]:
    """A number of tasks, and a factor that differs between them, come together."""
    carrying = [reference for reference in _references(spec) if TASK_MODE in _atoms(spec, reference)]
    if spec.tasks is None and carrying:
        message = f"`{carrying[0].factor}` carries the mode `task`, whose size is missing; expected a key `tasks`"
        yield Problem(message, carrying[0].span)
    elif spec.tasks is not None and not carrying:
        yield Problem("`tasks` is given, but no factor carries the mode `task`", table.where("tasks"))


@dataclass(frozen=True)
class _Group:
    """Factors of a product that hang together, and the modes they carry."""

    references: tuple[Reference, ...]
    atoms: frozenset[str]


def _groups(spec: Spec, product: Product) -> list[_Group]:
    groups: list[_Group] = []
    for reference in product.factors:
        merged = _Group((reference,), _atoms(spec, reference))
        apart = []
        for group in groups:
            if group.atoms & merged.atoms:
                merged = _Group((*group.references, *merged.references), group.atoms | merged.atoms)
            else:
                apart.append(group)
        groups = [*apart, merged]
    return groups


def _bonds(spec: Spec) -> tuple[str, ...]:
    return (*dict(spec.ranks), *spec.free)


def _references(spec: Spec) -> Iterator[Reference]:
    return (reference for product in spec.update.products for reference in product.factors)


def _carried(spec: Spec) -> set[str]:
    return {mode for reference in _references(spec) for mode in reference.modes}


def _known(spec: Spec) -> set[str]:
    parts = {part.name for definition in spec.modes if definition.name in SIDES for part in definition.parts}
    return {*BUILT_IN_MODES, *_bonds(spec), *(definition.name for definition in spec.modes), *parts}


def _atoms(spec: Spec, reference: Reference) -> frozenset[str]:
    """The modes of a factor, a defined mode replaced by its parts."""
    parts = {definition.name: [part.name for part in definition.parts] for definition in spec.modes}
    return frozenset(atom for mode in reference.modes for atom in parts.get(mode, [mode]))
