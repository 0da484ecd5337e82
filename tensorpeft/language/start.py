"""How the products of an update begin: which are zero, which cancel, and which factors can ever leave zero."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping

from tensorpeft.language.spec import Spec
from tensorpeft.language.syntax import Call, Initialiser, Name, Product
from tensorpeft.language.words import ZEROS


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
    inits = {name: rule.init for name, rule in spec.factors}
    zero = zero_factors(spec)

    def numbers(product: Product) -> Hashable:
        factors = Counter((origin(ref.factor, inits) or ref.factor, ref.modes) for ref in product.factors)
        return product.at, frozenset(factors.items())

    sums: Counter[Hashable] = Counter()
    for product in spec.update.products:
        sums[numbers(product)] += product.sign
    others = (p for p in spec.update.products if not any(reference.factor in zero for reference in p.factors))
    return [product for product in others if sums[numbers(product)]]
