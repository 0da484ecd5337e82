"""The modes of one site: what each comes down to there, and how large it is."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import TypeVar

from tensorpeft.language.errors import fail, listing
from tensorpeft.language.keywords import LAYER
from tensorpeft.language.modes import Parts, expand, parts_of, split_modes
from tensorpeft.language.source import Span
from tensorpeft.language.spec import BASE_WEIGHT, SIDES, SITE_MODES, STRUCTURAL_MODES, Spec
from tensorpeft.language.syntax import Definition, Expression, Part, Spectral
from tensorpeft.model.shape import ModelShape, Site
from tensorpeft.network.initialisers import origins
from tensorpeft.network.site_classes import SiteClass, chosen

_Value = TypeVar("_Value")
Splits = dict[str, list[tuple[str, ...]]]  # of each side the ways to split it
LARGEST = 2**31  # of one mode: beyond it nothing fits a tensor index


@dataclass(frozen=True, eq=False)
class ModeLayout:
    """Sizes and parts of the modes that products use at a site; ``names`` are those that initialisers and masks speak of.

    A side may be split in several ways: a product uses the one that it carries a part of.
    """

    site: Site
    sizes: dict[str, int]
    parts: Parts  # but for those of the sides
    splits: Splits
    scale: float
    names: dict[str, float]

    @property
    def meaning(self) -> object:
        """Equal for two layouts of one spec that combine its factors in the same way."""
        ways = tuple((side, *splits) for side, splits in self.splits.items())
        return frozenset(self.sizes.items()), ways, self.scale, frozenset(self.names.items())

    def atoms(self, carried: Collection[str], span: Span | None = None) -> dict[str, tuple[str, ...]]:
        """The atoms of some modes and of both sides: a mode itself, or its parts where another one lies partly within it.

        Raises:
            SpecError: they lie in two splits of one side; ``span`` is where they stand.
        """
        parts = {**self.parts, **self._chosen(carried, span)}
        modes = (*carried, *SIDES)
        whole = dict.fromkeys(modes)
        while mixed := [mode for mode in whole if mode in parts and _overlaps(mode, whole, parts)]:
            largest = max(mixed, key=lambda mode: len(expand(mode, parts)))  # its parts may be enough
            del whole[largest]
            whole |= dict.fromkeys(parts[largest])
        return {mode: expand(mode, parts, whole) for mode in modes}

    def _chosen(self, carried: Iterable[str], span: Span | None) -> Parts:
        """Of each side that these modes carry a part of, the split that it is in."""
        leaves = {leaf for mode in carried for leaf in expand(mode, self.parts)}
        found: Parts = {}
        for side, splits in self.splits.items():
            inside = ({leaf for part in split for leaf in expand(part, self.parts)} for split in splits)
            meant = [split for split, own in zip(splits, inside, strict=True) if not leaves.isdisjoint(own)]
            if len(meant) > 1:
                ways = listing(" * ".join(split) for split in meant)
                raise fail(f"this product splits {side} of {self.site} in several ways, {ways}; expected one", span)
            if meant:
                found[side] = meant[0]
        return found


def _overlaps(mode: str, others: Iterable[str], parts: Parts) -> bool:
    mine = {*expand(mode, parts)}
    return any(other != mode and not mine.isdisjoint(expand(other, parts)) for other in others)


def layout(spec: Spec, model: ModelShape, site_class: SiteClass) -> ModeLayout:
    """Resolve the modes that the products of a kind of sites use.

    Raises:
        SpecError: a size that is not a positive whole number, a split that does not divide, a matrix without heads.
    """
    sizes = _SizeResolver(spec, model, site_class)
    written = (*dict(spec.ranks), *(part.name for definition in spec.modes for part in definition.parts))
    for mode in dict.fromkeys((*written, *sorted(site_class.used))):  # in the text's order, for the first error's sake
        if mode in site_class.used and mode not in SITE_MODES:
            sizes.size(mode)
    scale = chosen(spec.scale, "`scale`", site_class.example)
    given = {} if spec.alpha is None else {"alpha": spec.alpha}
    scaled = float(scale.evaluate({**sizes.names(scale.names), **given}))
    spoken = _spoken_of(spec, site_class) - {LAYER}  # which is a key's
    names = {name: value for name, value in sizes.names(spoken).items() if name in spoken}
    return ModeLayout(site_class.example, sizes.known, sizes.parts, sizes.splits, scaled, names)


def _spoken_of(spec: Spec, site_class: SiteClass) -> set[str]:
    """The names in the initialisers and mask rules of the factors of a class of sites."""
    factors = {f.factor for product in site_class.products for f in product.factors} - {BASE_WEIGHT}
    inits = [spec.factor(origins(spec, factor)[-1]).init for factor in factors]
    spoken = [init.power if isinstance(init, Spectral) else init for init in inits]
    return {name for each in (*spoken, *(rule.rule for rule in spec.masks)) for name in each.names}


def _sizes_of(model: ModelShape, site: Site) -> dict[str, int]:
    """The sizes of a model; where a stack has its own, ``decoder_layers``, these are those of its sites."""
    stack = f"{site.matrix.partition('.')[0]}_" if "." in site.matrix else "_"
    own = {name.removeprefix(stack): size for name, size in model.sizes if name.startswith(stack)}
    return {**dict(model.sizes), **own}


class _SizeResolver:
    """The sizes at one kind of sites, each found when it is asked for."""

    def __init__(self, spec: Spec, model: ModelShape, site_class: SiteClass) -> None:
        self.spec, self.site_class, self.site = spec, site_class, site_class.example
        self.parts = parts_of(definition for definition in spec.modes if definition.name not in SIDES)
        self.splits: Splits = {
            side: [tuple(part.name for part in d.parts) for d in spec.modes if d.name == side] for side in SIDES
        }
        self.ranks, self.model = dict(spec.ranks), _sizes_of(model, self.site)
        self.known = {"d_out": self.site.d_out, "d_in": self.site.d_in}
        if spec.tasks:
            self.known["task"] = spec.tasks
        splits = split_modes(spec.modes)
        self.definitions = {definition.name: definition for definition in spec.modes}
        self.split_of = {part.name: d for d in spec.modes if d.name in splits for part in d.parts}
        self.written = {part.name: part.size for d in spec.modes for part in d.parts if part.size is not None}
        if not site_class.used.isdisjoint(STRUCTURAL_MODES):
            self._add_structure()

    def names(self, names: Iterable[str]) -> dict[str, float]:
        """The values of the names that mean something here; those of the model and the layer in any case."""
        own = {*self.known, *self.ranks, *self.split_of}
        sized = {name: self.size(name) for name in names if name in own}
        return {**self.model, LAYER: self.site.layer, **sized}

    def size(self, mode: str) -> int:
        """The size of a mode or bond."""
        if mode not in self.known:
            if mode in self.ranks:
                what = f"the rank of `{mode}`"
                self.known[mode] = self._whole(chosen(self.ranks[mode], what, self.site), f"rank `{mode}`")
            elif mode in self.split_of:
                self._split(self.split_of[mode])
            elif mode in self.written:
                self.known[mode] = self._whole(self.written[mode], f"mode `{mode}`")
            else:
                self.known[mode] = prod(self.size(part) for part in self.parts[mode] if part not in SITE_MODES)
        return self.known[mode]

    def _whole(self, expression: Expression, what: str) -> int:
        value = expression.evaluate(self.names(expression.names))
        if value != int(value):
            message = f"{what} is {value:g} at {self.site}, expected a whole number; use ceil() or floor()"
            raise fail(message, expression.span)
        if not 1 <= value < LARGEST:
            message = f"{what} is {value:g} at {self.site}, expected a number from 1 to {LARGEST - 1}"
            raise fail(message, expression.span)
        return int(value)

    def _split(self, definition: Definition) -> None:
        """Size the parts of a mode: those that are given, and the rest as near to each other as the number allows."""
        total = remaining = self.size(definition.name)
        free = []
        for part in definition.parts:
            given = self._given(part)
            if given is None:
                free.append(part.name)
                continue
            if remaining % given:
                raise self._uneven(definition, total, part.span)
            self.known[part.name] = given
            remaining //= given
        if not free and remaining != 1:
            raise self._uneven(definition, total, definition.span)
        self.known.update(zip(free, balanced(remaining, len(free)), strict=True))

    def _given(self, part: Part) -> int | None:
        """The size of a part where it does not depend on the whole."""
        if part.size is not None or part.name in self.known or part.name in self.ranks:
            return self.size(part.name) if part.size is None else self._whole(part.size, f"mode `{part.name}`")
        if part.name not in self.parts:
            return None
        inside = [self._given(inner) for inner in self.definitions[part.name].parts]
        return None if None in inside else prod(filter(None, inside))

    def _uneven(self, definition: Definition, total: int, span: Span | None) -> Exception:
        message = f"the parts of `{definition}` do not multiply to {definition.name} = {total} of {self.site}"
        return fail(message, span)

    def _add_structure(self) -> None:
        """Give `head`, `head_dim` and `width` their sizes, and split each side by them unless the spec does so itself."""
        site, used = self.site, self.site_class.used
        heads = said_of(site, self.spec.heads.count, site.heads)
        written = {part: side for side, splits in self.splits.items() for split in splits for part in split}
        side = written.get("head", said_of(site, self.spec.heads.side, site.head_side)) or "d_out"
        if heads is None:
            told = f"matrix `{site.matrix}` ({site.module}) has no heads, which the modes of this spec need"
            ways = "leave it out of `target`, or give `heads: {count: ...}`"
            raise fail(f"{told}; {ways}", self._structural_span())
        if self.known[side] % heads:
            message = f"{heads} heads do not divide {side} = {self.known[side]} of {site}"
            raise fail(message, self.spec.target.span(site.matrix))
        other = SIDES[1 - SIDES.index(side)]
        self.known.update(head=heads, head_dim=self.known[side] // heads, width=self.known[other])
        if "head" not in written and "head_dim" not in written:
            self.splits[side].append(("head", "head_dim"))
        if "width" in used and "width" not in written:
            self.splits[other].append(("width",))

    def _structural_span(self) -> Span | None:
        references = (f for product in self.site_class.products for f in product.factors)
        spans = (f.span for f in references if not set(STRUCTURAL_MODES).isdisjoint(f.modes))
        return next(spans, None) or self.spec.update.span


def said_of(site: Site, values: Iterable[tuple[str, _Value]], otherwise: _Value | None) -> _Value | None:
    """The value that a spec gives for a site's matrix, else for ``*``, else what the model says."""
    by_matrix = dict(values)
    named = next((value for matrix, value in by_matrix.items() if site.is_named(matrix)), by_matrix.get("*"))
    return otherwise if named is None else named


@cache
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
