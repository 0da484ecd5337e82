"""``start: subtract`` -> the update less what it is at the start, so that it starts at zero.

Every product that is not zero at the start is written once more with the opposite sign, and each factor that it trains is
replaced there by a frozen copy of its first numbers: ``B * A`` becomes ``B * A - B0 * A0``.
"""

from __future__ import annotations

from dataclasses import replace

from tensorpeft.language.checks.start import nonzero_products, origin
from tensorpeft.language.errors import clip, fail
from tensorpeft.language.grammar import MAX_NAME, checked_update
from tensorpeft.language.spec import FactorRule, Spec
from tensorpeft.language.syntax import Call, Name, Product, Spectral, Update


def subtract(spec: Spec) -> Spec:
    """The spec with its first update subtracted, if it says so."""
    if spec.start != "subtract":
        return spec
    rules = dict(spec.factors)
    copies: dict[str, str] = {}
    for name, rule in spec.factors:
        if not rule.frozen:
            copies[name] = _new_name(name, rules)
            rules[copies[name]] = _copy(name, spec)
    moving = nonzero_products(spec)
    products: dict[object, list[Product]] = {product.at: [] for product in spec.update.products}
    for product in spec.update.products:
        products[product.at].append(product)
    for product in moving:
        references = (replace(ref, factor=copies.get(ref.factor, ref.factor)) for ref in product.factors)
        products[product.at].append(replace(product, factors=tuple(references), sign=-product.sign))
    written = Update(tuple(product for group in products.values() for product in group), spec.update.span)
    update = checked_update(written, "update with what `start: subtract` adds")
    carried = dict.fromkeys(reference.factor for product in update.products for reference in product.factors)
    factors = tuple((name, rules[name]) for name in carried if name in rules)
    return replace(spec, update=update, factors=factors, start="zero")


def _new_name(name: str, taken: dict[str, FactorRule]) -> str:
    copy = f"{name}0"
    while copy in taken:
        copy += "0"
    if len(copy) > MAX_NAME:
        message = f"`{clip(copy)}`, the frozen copy of `{clip(name)}`, has a name of more than {MAX_NAME} characters"
        raise fail(f"{message}; expected a shorter name for the factor", taken[name].span)
    return copy


def _copy(name: str, spec: Spec) -> FactorRule:
    inits = {factor: rule.init for factor, rule in spec.factors}
    first = origin(name, inits)
    stored = first is not None and isinstance(inits[first], Spectral)
    return FactorRule(Call("start", (Name(name),)), frozen=True, stored=stored, span=spec.factor(name).span)
