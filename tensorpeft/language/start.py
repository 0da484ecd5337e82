"""How the products of an update begin: which are zero, which cancel, and which factors can ever leave zero."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping

from tensorpeft.language.names import is_bound
from tensorpeft.language.spec import Spec
from tensorpeft.language.syntax import Call, Initialiser, Name, Product
from tensorpeft.language.words import IDENTITY, ONES, ZEROS

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
    """What the first numbers of products are made of."""

    def __init__(self, spec: Spec) -> None:
        inits = {name: rule.init for name, rule in spec.factors}
        self.roots = {name: origin(name, inits) or name for name in inits}
        masked = {rule.factor for rule in spec.masks}
        self.plain = {name: init for name, init in inits.items() if init in (ONES, IDENTITY) and name not in masked}
        self.ranks = dict(spec.ranks)
        modes = {mode for product in spec.update.products for reference in product.factors for mode in reference.modes}
        self.bound = {mode for mode in modes if is_bound(spec, mode)}

    def of(self, product: Product) -> Hashable:
        """The factors with their modes, copies by what they are of, without those that change nothing."""
        left = [(self.roots.get(ref.factor, ref.factor), ref.modes) for ref in product.factors]
        while (fewer := self._without_one(left)) is not None:
            left = fewer
        return product.at, frozenset(Counter(left).items())

    def _without_one(self, factors: list[_Factor]) -> list[_Factor] | None:
        """The factors without one of ones, or without an identity and the bond that it renames."""
        carried = Counter(mode for _, modes in factors for mode in modes)
        for place, (name, modes) in enumerate(factors):
            if name not in self.plain:
                continue
            others, free = factors[:place] + factors[place + 1 :], [m for m in modes if m not in self.bound]
            if self.plain[name] == ONES and all(carried[mode] > 1 for mode in free):
                return others
            if self.plain[name] == IDENTITY and len(free) == 2:
                for kept, bond in (free, free[::-1]):
                    if self.ranks.get(bond) == Name(kept):  # of one size
                        return [(other, tuple(kept if m == bond else m for m in theirs)) for other, theirs in others]
        return None
