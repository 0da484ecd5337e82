"""The start of an update: products that are zero or cancel, and factors that can never leave zero."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping

from tensorpeft.language.keywords import IDENTITY, ONES, TASK_MODE, ZEROS
from tensorpeft.language.spec import SITE_MODES, Spec
from tensorpeft.language.syntax import Call, Initialiser, Name, Product

_Factor = tuple[str, tuple[str, ...]]  # with its modes


def origin(name: str, inits: Mapping[str, Initialiser]) -> str | None:
    """The factor whose first numbers a factor starts from: itself, or the one that ``start(...)`` leads to.

    None where it leads in a circle, or to what is no factor.
    """
    seen: set[str] = set()
    while name in inits and name not in seen:
        seen.add(name)
        init = inits[name]
        if not isinstance(init, Call) or init.name != "start":
            return name
        name = init.args[0].name if len(init.args) == 1 and isinstance(init.args[0], Name) else ""
    return None


def zero_factors(spec: Spec) -> set[str]:
    """The factors that are zero at the start."""
    inits = {name: rule.init for name, rule in spec.factors}
    return {name for name in inits if (first := origin(name, inits)) and inits[first] == ZEROS}


def dead_factors(spec: Spec) -> set[str]:
    """The zero factors that never get a gradient.

    A trained one comes alive if in some product all others are other than zero, or have come alive before it.
    """
    dead = zero_factors(spec)
    trained = {name for name in dead if not spec.factor(name).frozen}
    found = True
    while found:
        found = False
        for product in spec.update.products:
            still = [reference.factor for reference in product.factors if reference.factor in dead]
            if len(still) == 1 and still[0] in trained:
                dead.discard(still[0])
                found = True
    return dead


def nonzero_products(spec: Spec) -> list[Product]:
    """The products that are not zero at the start.

    A product is zero with one of its factors, or together with others of the same numbers and opposite signs.
    """
    zero, starts = zero_factors(spec), _Starts(spec)
    numbers = [(product, starts.of(product)) for product in spec.update.products]
    sums: Counter[Hashable] = Counter()
    for product, made_of in numbers:
        sums[made_of] += product.sign
    moving = (product for product, made_of in numbers if sums[made_of])
    return [product for product in moving if not any(reference.factor in zero for reference in product.factors)]


class _Starts:
    """A normal form of the first numbers of products: products with equal forms have equal numbers at the start."""

    def __init__(self, spec: Spec) -> None:
        inits = {name: rule.init for name, rule in spec.factors}
        self.roots = {name: origin(name, inits) or name for name in inits}
        masked = {rule.factor for rule in spec.masks}
        self.plain = {name: init for name, init in inits.items() if init in (ONES, IDENTITY) and name not in masked}
        parts = [part for definition in spec.modes for part in definition.parts]
        self.ranks = dict(spec.ranks)
        self.sizes = self.ranks | {part.name: part.size for part in parts if part.size is not None}
        ways = Counter(definition.name for definition in spec.modes)
        self.parts = {d.name: tuple(part.name for part in d.parts) for d in spec.modes if ways[d.name] == 1}

    def of(self, product: Product) -> Hashable:
        """The factors with what their modes come down to, copies by what they are of, without those that change nothing."""
        left = [(self.roots.get(ref.factor, ref.factor), ref.modes) for ref in product.factors]
        while (fewer := self._without_one(left)) is not None:
            left = fewer
        return product.at, frozenset(Counter((name, self._atoms(modes)) for name, modes in left).items())

    def _atoms(self, modes: Iterable[str], above: frozenset[str] = frozenset()) -> tuple[str, ...]:
        """These modes, in place of those with parts their parts; ``above`` are those that they are parts of."""
        parts = {mode: self.parts[mode] for mode in modes if mode in self.parts and mode not in above}
        inside = (self._atoms(parts[mode], above | {mode}) if mode in parts else (mode,) for mode in modes)
        return tuple(atom for several in inside for atom in several)

    def _without_one(self, factors: list[_Factor]) -> list[_Factor] | None:
        """The factors without one of ones, or without an identity and the bond that it renames."""
        carried = Counter(self._atoms([mode for _, modes in factors for mode in modes]))
        for place, (name, modes) in enumerate(factors):
            if name not in self.plain:
                continue
            others, free = factors[:place] + factors[place + 1 :], self._free(modes)
            n_ones = len(free) if self.plain[name] == ONES else len(free) - 2
            if n_ones < 0 or any(carried[atom] == 1 and atom != TASK_MODE for atom in self._atoms(free[:n_ones])):
                continue
            if n_ones == len(free):
                return others
            for kept, bond in (free[-2:], free[:-3:-1]):
                of_one_size = bond in self.ranks and self.ranks[bond] in (Name(kept), self.sizes.get(kept))
                if of_one_size and all(self._has_whole(bond, other) for other in others):
                    return [(other, self._renamed(bond, kept, theirs)) for other, theirs in others]
        return None

    def _free(self, modes: Iterable[str]) -> list[str]:
        """The modes that are not bound to sites, as they are stored."""
        apart = ((mode, self._atoms([mode])) for mode in modes)
        stored = [(mode,) if {*SITE_MODES}.isdisjoint(atoms) else atoms for mode, atoms in apart]
        return [each for several in stored for each in several if each not in SITE_MODES]

    def _has_whole(self, bond: str, factor: _Factor) -> bool:
        """Whether a factor does not hold the bond within another mode, or it does not matter."""
        name, modes = factor
        return name not in self.plain or bond in modes or bond not in self._atoms(modes)

    def _renamed(self, bond: str, kept: str, modes: Iterable[str]) -> tuple[str, ...]:
        return tuple(
            kept if each == bond else each
            for mode in modes
            for each in (self._atoms([mode]) if bond in self._atoms([mode]) else (mode,))
        )
