"""Node tree -> what a spec says of each factor of its update: how it starts, whether it is trained, what of it exists."""

from __future__ import annotations

from collections.abc import Iterator

from tensorpeft.language.checks.start import origin
from tensorpeft.language.choices import entries
from tensorpeft.language.desugar import Form, known_factor
from tensorpeft.language.diagnostics import Findings
from tensorpeft.language.errors import fail
from tensorpeft.language.grammar import parse_call, parse_init, parse_reference
from tensorpeft.language.keywords import LINEAR, ONES
from tensorpeft.language.nodes import Table
from tensorpeft.language.spec import FactorRule, MaskRule
from tensorpeft.language.syntax import Initialiser, Reference, Spectral


def read_factors(table: Table, form: Form, findings: Findings) -> dict[str, FactorRule]:
    """The rule of each factor of the update, in its order.

    A frozen factor whose numbers come from the base weight is stored: they cannot be drawn again from the seed.
    """
    for key, _ in table.table("factors").items:
        known_factor(key, form, "factors", findings)
    frozen = {key.text for key in table.scalars("frozen") if known_factor(key, form, "frozen", findings)}
    inits = dict(_inits(table, form, findings))
    rules = {}
    for name, reference in form.factors.items():
        said = table.table("factors").table(name)
        is_frozen = _is_true(said, "frozen") or name in frozen
        from_weight = isinstance(inits.get(origin(name, inits) or name), Spectral)
        stored = _is_true(said, "stored") or (is_frozen and from_weight)
        lr = said.scalar("lr")
        span = table.table("factors").where(name) if name in table.table("factors") else reference.span
        rate, norm = float(str(lr.value)) if lr else 1.0, _is_true(said, "norm")
        rules[name] = FactorRule(inits[name], is_frozen, stored, rate, norm, span)
    return rules


def _is_true(said: Table, key: str) -> bool:
    node = said.scalar(key)
    return node is not None and bool(node.value)


def _inits(table: Table, form: Form, findings: Findings) -> Iterator[tuple[str, Initialiser]]:
    for name in form.factors:
        init: Initialiser = form.inits.get(name, LINEAR)
        if _is_true(table.table("factors").table(name), "norm"):  # as it stands in a product, over the norms
            init = ONES
        elif text := table.table("factors").table(name).scalar("init"):
            with findings.under("factors"):
                init = parse_init(text)
        yield name, init


def read_masks(table: Table, form: Form | None, findings: Findings) -> Iterator[MaskRule]:
    """The rules in order; the modes of each in the order in which its factor carries them."""
    masks = table.table("mask")
    for key, node in masks.items:
        with findings.under("mask"):
            masked = parse_reference(key)
            if not masked.modes:
                raise fail(
                    f"expected a factor with the modes that are masked, such as `{masked.factor}[d_out]`", key.span
                )
            modes = _in_order(masked, form)
            for selector, rule in entries(node, "mask", findings):
                with findings.under("mask"):
                    yield MaskRule(masked.factor, modes, parse_call(rule), selector, key.span)


def _in_order(masked: Reference, form: Form | None) -> tuple[str, ...]:
    carried = form.factors[masked.factor].modes if form and masked.factor in form.factors else ()
    known = {*masked.modes} <= {*carried}
    return tuple(sorted(masked.modes, key=carried.index)) if known else masked.modes
