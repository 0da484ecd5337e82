"""The algebra of modes: what a mode comes down to by the definitions of a spec, and which modes products speak of."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from functools import lru_cache

from tensorpeft.language.spec import SIDES, SITE_MODES
from tensorpeft.language.syntax import Definition, Product, Reference

Parts = dict[str, tuple[str, ...]]  # of each defined mode, the first the slowest


def parts_of(definitions: Iterable[Definition]) -> Parts:
    """The parts of every defined mode; a side may be defined more than once, and has those of the last."""
    return {definition.name: tuple(part.name for part in definition.parts) for definition in definitions}


def expand(mode: str, parts: Mapping[str, tuple[str, ...]], whole: Container[str] = ()) -> tuple[str, ...]:
    """What a mode comes down to, the first the slowest: itself where it has no parts or is to stay whole, else what they do.

    >>> expand("slot", {"slot": ("layer", "pair"), "pair": ("p", "q")})
    ('layer', 'p', 'q')
    >>> expand("slot", {"slot": ("layer", "pair"), "pair": ("p", "q")}, whole={"pair"})
    ('layer', 'pair')
    """
    if mode in whole or mode not in parts:
        return (mode,)
    return tuple(atom for part in parts[mode] for atom in expand(part, parts, whole))


def inside(definitions: Iterable[Definition], modes: Iterable[str]) -> set[str]:
    """These modes, the parts of those that are defined, the parts of these, and so on; definitions may lead in circles yet."""
    parts: dict[str, list[str]] = {}
    for definition in definitions:
        parts.setdefault(definition.name, []).extend(part.name for part in definition.parts)
    modes = [*modes]
    return reached(modes, parts).union(modes)


def reached(starts: Iterable[str], ahead: Mapping[str, Collection[str]]) -> set[str]:
    """What is ahead of these names, of what is ahead of them, and so on; the names themselves where they lead in a circle."""
    found: set[str] = set()
    left = [*starts]
    while left:
        for name in ahead.get(left.pop(), ()):
            if name not in found:
                found.add(name)
                left.append(name)
    return found


@lru_cache(maxsize=1024)
def written_modes(reference: Reference, definitions: tuple[Definition, ...]) -> tuple[str, ...]:
    """The modes of a factor as stored: as written, but a fused mode that holds site modes is its parts."""
    parts = parts_of(definitions)
    whole = {mode for mode in parts if not {*expand(mode, parts)}.intersection(SITE_MODES)}
    return tuple(stored for mode in reference.modes for stored in expand(mode, parts, whole))


def free_modes(reference: Reference, definitions: tuple[Definition, ...]) -> tuple[str, ...]:
    """The written modes that are not bound to sites."""
    return tuple(mode for mode in written_modes(reference, definitions) if mode not in SITE_MODES)


def split_modes(definitions: Sequence[Definition]) -> set[str]:
    """The defined modes that split a size which is there: the sides, and their parts that have parts themselves."""
    return {definition.name for definition in definitions} & inside(definitions, SIDES)


def used_modes(products: Sequence[Product], definitions: tuple[Definition, ...]) -> set[str]:
    """Every mode whose size products need: what they carry, the parts of fused ones, and splits of which they use a part."""
    splits = split_modes(definitions)
    used = {m for product in products for f in product.factors for m in (*f.modes, *written_modes(f, definitions))}
    before = 0
    while len(used) > before:
        before = len(used)
        for definition in definitions:
            mode, inside = definition.name, [part.name for part in definition.parts]
            if used.intersection(inside) if mode in splits else mode in used:
                used.update((mode, *inside))
    return used
