"""Which modes products speak of, by the definitions of their spec."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

from tensorpeft.language.spec import SIDES, SITE_MODES
from tensorpeft.language.syntax import Definition, Product, Reference

Parts = dict[str, tuple[str, ...]]  # of each defined mode, the first the slowest


def parts_of(definitions: Iterable[Definition]) -> Parts:
    """The parts of every defined mode; a side may be defined more than once, and has those of the last."""
    return {definition.name: tuple(part.name for part in definition.parts) for definition in definitions}


@lru_cache(maxsize=1024)
def written_modes(reference: Reference, definitions: tuple[Definition, ...]) -> tuple[str, ...]:
    """The modes of a factor as stored: as written, but a fused mode that holds site modes is its parts."""
    parts = parts_of(definitions)

    def expand(mode: str) -> list[str]:
        inside = [inner for part in parts.get(mode, ()) for inner in expand(part)]
        return inside if set(inside).intersection(SITE_MODES) else [mode]

    return tuple(stored for mode in reference.modes for stored in expand(mode))


def free_modes(reference: Reference, definitions: tuple[Definition, ...]) -> tuple[str, ...]:
    """The written modes that are not bound to sites."""
    return tuple(mode for mode in written_modes(reference, definitions) if mode not in SITE_MODES)


def split_modes(definitions: Sequence[Definition]) -> set[str]:
    """The defined modes that split a size which is there: the sides, and their parts that have parts themselves."""
    found, ahead = set[str](), [*SIDES]
    while ahead:
        mode = ahead.pop()
        inside = [part.name for definition in definitions if definition.name == mode for part in definition.parts]
        if inside and mode not in found:
            found.add(mode)
            ahead += inside
    return found


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
