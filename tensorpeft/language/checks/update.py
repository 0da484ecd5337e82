"""Checks of the products of an update: what is summed, what is open, and how the factors hang together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Set

from tensorpeft.language import names
from tensorpeft.language.errors import Problem, clip, did_you_mean, listing
from tensorpeft.language.keywords import TASK_MODE
from tensorpeft.language.modes import inside
from tensorpeft.language.nodes import MappingNode
from tensorpeft.language.spec import SIDES, STRUCTURAL_MODES, Spec
from tensorpeft.language.syntax import Definition, Product, Reference


def contracted_bonds(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """A bond stands in at least two factors of a product."""
    bonds = {*names.bonds(spec)}
    for product in spec.update.products:
        carried = Counter(atom for reference in product.factors for atom in names.atoms(spec, reference.modes))
        for reference in product.factors:
            for mode in sorted(names.atoms(spec, reference.modes) & bonds):
                if carried[mode] == 1:
                    message = f"bond `{mode}` is in `{reference.factor}` alone, so there is nothing to contract it with"
                    known = names.known_modes(spec) - {mode} if mode in spec.free else ()
                    hint = did_you_mean(mode, known) or "; expected it in a second factor of the product"
                    yield Problem(f"{message}{hint}", reference.span)


def open_sides(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """Every product carries the whole output and the whole input.

    ``head`` with ``head_dim`` is one side of a matrix and ``width`` the other; which is which, the model says.
    """
    for product in spec.update.products:
        carried = {mode for reference in product.factors for mode in reference.modes}
        if ways := _several_splits(spec, carried):
            message = f"`{clip(str(product), 200)}` splits `{ways[0].name}` in several ways, {listing(map(str, ways))}"
            yield Problem(f"{message}; expected one of them in a product", product.span)
        elif missing := _missing(spec, names.atoms(spec, carried)):
            message = f"no factor of `{clip(str(product), 200)}` carries {listing(missing)}"
            yield Problem(f"{message}; expected every product to carry the whole output and input", product.span)


def _several_splits(spec: Spec, carried: set[str]) -> list[Definition]:
    """Of a side that these modes have parts of by several of its definitions, these."""
    others = [definition for definition in spec.modes if definition.name not in SIDES]
    within = inside(others, carried)
    for side in SIDES:
        ways = [d for d in names.splits(spec, side) if within & inside(others, (part.name for part in d.parts))]
        if len(ways) > 1:
            return ways
    return []


def _missing(spec: Spec, atoms: Set[str]) -> list[str]:
    """The modes missing for a whole output and input; of a side split in several ways, those of the nearest way."""
    by_heads = atoms & {*STRUCTURAL_MODES} - names.side_parts(spec.modes)
    lacking = [left for side in SIDES if (left := _lack(spec, side, atoms))]
    complete = [modes for modes in ({"head", "head_dim"}, {"width"}) if modes <= by_heads]
    if len(lacking) <= len(complete):
        return []
    if len(lacking) == 2 and by_heads:
        return [mode for mode in STRUCTURAL_MODES if mode not in atoms]
    return [part for left in lacking for part in sorted(left)]


def _lack(spec: Spec, side: str, atoms: Set[str]) -> Set[str]:
    """The modes missing for one whole side."""
    ways = [names.atoms(spec, (part.name for part in split.parts)) for split in names.splits(spec, side)]
    return min((way - atoms for way in ways or [frozenset({side})]), key=len)


def connected(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """No group of factors is bound to nothing but itself."""
    bonds = {*names.bonds(spec)}
    for product in spec.update.products:
        for group, atoms in _groups(spec, product):
            if len(group) > 1 and atoms <= bonds:  # of one by itself, its lone bonds are told
                factors = listing(dict.fromkeys(reference.factor for reference in group))
                message = f"nothing joins {factors} to the rest of the product"
                yield Problem(f"{message}; expected a bond that another factor carries", group[0].span)


def tasks(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """A number of tasks, and a factor that differs between them, come together."""
    carrying = [ref for ref in spec.update.references if TASK_MODE in names.atoms(spec, ref.modes)]
    if spec.tasks is None and carrying:
        message = f"`{carrying[0].factor}` carries the mode `task`, whose size is missing; expected a key `tasks`"
        yield Problem(message, carrying[0].span)
    elif spec.tasks is not None and not carrying:
        yield Problem("`tasks` is given, but no factor carries the mode `task`", table.where("tasks"))


def _groups(spec: Spec, product: Product) -> list[tuple[list[Reference], frozenset[str]]]:
    """The factors of a product that hang together, with the modes that they carry."""
    groups: list[tuple[list[Reference], frozenset[str]]] = []
    for reference in product.factors:
        mine = names.atoms(spec, reference.modes)
        joined = [group for group in groups if group[1] & mine]
        references = [each for theirs, _ in reversed(joined) for each in theirs] + [reference]
        merged = references, mine.union(*(atoms for _, atoms in joined))
        groups = [*(group for group in groups if group not in joined), merged]
    return groups
