"""Classes of sites of which a spec means the same. Of several entries that fit a site the last counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tensorpeft.language.errors import fail
from tensorpeft.language.keywords import LAYER
from tensorpeft.language.modes import used_modes
from tensorpeft.language.names import in_sizes
from tensorpeft.language.spec import STRUCTURAL_MODES, Spec
from tensorpeft.language.syntax import Choice, Expression, Product, Selector
from tensorpeft.model.shape import Site
from tensorpeft.model.target import fits


@dataclass(frozen=True, eq=False)
class SiteClass:
    """Sites of which a spec means the same: the same products, over modes of the same sizes."""

    example: Site
    products: tuple[Product, ...]
    used: frozenset[str]  # the modes whose sizes these need


def site_classes(spec: Spec, sites: Sequence[Site]) -> list[tuple[Site, SiteClass]]:
    """Each site with its class. Classes do not depend on the numbers that ranks come to: a budget tries many.

    Raises:
        SpecError: no entry of the update fits a site.
    """
    entries: dict[Selector, tuple[Product, ...]] = {}
    for product in spec.update.products:
        entries[product.at] = (*entries.get(product.at, ()), product)
    used = {at: frozenset(used_modes(products, spec.modes)) for at, products in entries.items()}
    choices = [value for value in (*dict(spec.ranks).values(), spec.scale) if isinstance(value, Choice)]
    by_layer = LAYER in in_sizes(spec)
    known: dict[tuple[object, ...], SiteClass] = {}
    found = []
    for site in sites:
        at = last_fitting(entries, site)
        if at is None:
            raise fail(f"no entry of `update` fits {site}; expected one that does, such as `*`", spec.update.span)
        with_heads = not used[at].isdisjoint(STRUCTURAL_MODES)
        heads = (site.matrix, site.heads, site.head_side) if with_heads else ()
        picks = (last_fitting([at for at, _ in choice.entries], site) for choice in choices)
        like = (site.d_out, site.d_in, at, *heads, *picks, site.layer if by_layer else None)
        if like not in known:
            known[like] = SiteClass(site, entries[at], used[at])
        found.append((site, known[like]))
    return found


def last_fitting(selectors: Iterable[Selector], site: Site) -> Selector | None:
    """Of the selectors that fit a site, the last."""
    return next((selector for selector in reversed([*selectors]) if fits(selector, site)), None)


def chosen(expression: Expression, what: str, site: Site) -> Expression:
    """An expression as it counts at a site: of a choice, the last entry that fits.

    Raises:
        SpecError: none fits.
    """
    if not isinstance(expression, Choice):
        return expression
    fitting = [value for selector, value in expression.entries if fits(selector, site)]
    if not fitting:
        raise fail(f"no entry of {what} fits {site}; expected one that does, such as `*`", expression.span)
    return fitting[-1]
