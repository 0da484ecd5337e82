"""Checks of a spec against a target: names of matrices, selectors, and what only some sites can do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tensorpeft.language.errors import Problem, SpecError, did_you_mean, fail, listing
from tensorpeft.language.modes import written_modes
from tensorpeft.language.spec import BASE_WEIGHT, Spec
from tensorpeft.language.syntax import Choice, Selector, ranges
from tensorpeft.model.shape import Site, by_stack
from tensorpeft.model.target import fits, is_meant
from tensorpeft.network.site_classes import SiteClass, site_classes


def checked_stacks(spec: Spec, sites: Sequence[Site]) -> dict[str, list[tuple[Site, SiteClass]]]:
    """The sites of each stack with their classes, where the spec fits them.

    Raises:
        SpecError: with each name of a matrix and each selector that speaks of nothing in the target; or for what some sites
            cannot do.
    """
    problems = [*_selectors(spec, sites), *_values(spec, sites)]
    if problems:
        raise SpecError(problems)
    _check_activations(spec, sites)
    stacks = {name: site_classes(spec, members) for name, members in by_stack(sites).items()}
    for placed in stacks.values():
        _check_experts(spec, placed)
    return stacks


def _check_activations(spec: Spec, sites: Sequence[Site]) -> None:
    """Refuse `tasks`, `dropout` and `norm` at sites that are no linear modules: they need the module's input."""
    apart = next((site for site in sites if site.kind != "linear"), None)
    over_norms = any(rule.norm for _, rule in spec.factors)
    needs = "tasks" if spec.tasks else "dropout" if spec.dropout else "norm" if over_norms else None
    if apart and needs:
        message = f"`{needs}` needs the input of a linear module, which {apart} does not have"
        raise fail(f"{message}; leave it out of the target", spec.update.span)


def _selectors(spec: Spec, sites: Sequence[Site]) -> Iterator[Problem]:
    choices = [value for value in (*dict(spec.ranks).values(), spec.scale) if isinstance(value, Choice)]
    written = [
        *(product.at for product in spec.update.products),
        *(selector for choice in choices for selector, _ in choice.entries),
        *(rule.at for rule in spec.masks),
    ]
    for selector in {(selector, selector.span): selector for selector in written}.values():
        unknown = [name for name in selector.matrices if not any(is_meant(name, site) for site in sites)]
        for name in unknown:
            yield Problem(f"`{name}` is no matrix of the target{_hint(name, sites)}", selector.span)
        if not unknown and not any(fits(selector, site) for site in sites):
            yield Problem(f"`{selector}` fits no site of the target{_layers(selector, sites)}", selector.span)


def _layers(selector: Selector, sites: Sequence[Site]) -> str:
    named = Selector(selector.matrices)
    layers = {site.layer for site in sites if site.stack is not None and fits(named, site)}
    return f", which has it in layers {ranges(layers)}" if layers else ", which has it in no layer"


def _values(spec: Spec, sites: Sequence[Site]) -> Iterator[Problem]:
    """Of ``heads`` and of masks, which give values to matrices."""
    heads = [(key, name) for key in ("side", "count") for name, _ in getattr(spec.heads, key) if name != "*"]
    given = [(f"`heads: {{{key}: ...}}` speaks of", name, spec.heads.span(key, name)) for key, name in heads]
    for rule in spec.masks:
        given += [(f"`{rule.rule}` gives a value for", name, value.span) for name, value in rule.rule.options]
    for told, name, span in given:
        if not any(site.is_named(name) for site in sites):
            yield Problem(f"{told} `{name}`, which is no matrix of the target{_hint(name, sites)}", span)


def _hint(name: str, sites: Sequence[Site]) -> str:
    matrices = dict.fromkeys(site.matrix for site in sites)
    names = {*matrices, *(site.module.rsplit(".", 1)[-1] for site in sites)}
    return did_you_mean(name, names) or f"; the target has {listing(matrices)}"


def _check_experts(spec: Spec, placed: Sequence[tuple[Site, SiteClass]]) -> None:
    """Refuse the mode `expert` at sites that belong to no expert, and a norm over several experts at once.

    Raises:
        SpecError: one is not, or several have one.
    """
    for site_class in dict.fromkeys(site_class for _, site_class in placed):
        for reference in (f for product in site_class.products for f in product.factors):
            if "expert" not in written_modes(reference, spec.modes):
                site = next((site for site, k in placed if k is site_class and site.expert is not None), None)
                if site is not None and reference.factor != BASE_WEIGHT and spec.factor(reference.factor).norm:
                    message = f"`{reference}` is over the norms of W + dW, and {site} is one of several experts"
                    raise SpecError([Problem(f"{message}; expected the mode `expert`", reference.span)])
            else:
                site = next((site for site, k in placed if k is site_class and site.expert is None), None)
                if site is not None:
                    message = f"`{reference}` carries the mode `expert`, and {site} belongs to none"
                    ways = "expected a target of experts alone, or an entry of `update` for the other matrices"
                    raise SpecError([Problem(f"{message}; {ways}", reference.span)])
