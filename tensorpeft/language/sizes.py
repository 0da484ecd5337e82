"""Node tree -> the sizes of a spec's bonds: numbers, expressions, choices by site, or a budget; and its scale."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal

from tensorpeft.language.choices import expression
from tensorpeft.language.desugar import Form
from tensorpeft.language.diagnostics import Findings
from tensorpeft.language.errors import fail
from tensorpeft.language.keywords import BUDGET, BUILT_IN_MODES
from tensorpeft.language.names import side_parts
from tensorpeft.language.nodes import Scalar, Table
from tensorpeft.language.source import Span
from tensorpeft.language.syntax import Expression, Name, Number, Operation

MAX_BUDGET = 10**15
_COUNT = re.compile(r"([0-9]{1,16}(?:\.[0-9]{1,16})?)([kmg]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


@dataclass(frozen=True)
class Sizes:
    """The size of each bond; or the budget of trained numbers, and the bonds that it sizes."""

    ranks: tuple[tuple[str, Expression], ...]
    budget: int | None = None
    free: tuple[str, ...] = ()
    span: Span | None = None  # of the budget


def read_sizes(table: Table, written: Table, form: Form, findings: Findings) -> Sizes:
    """What ``rank:`` says in a table; ``written`` is the table with what cannot be read.

    A bond whose size cannot be told gets some size, so that it is known at least.
    """
    spoiled = "rank" in findings.spoiled
    ranks = dict(_ranks(table, form, findings))
    known = {*_defined(form), *ranks}
    if spoiled:
        given = written.table("rank")
        meant = None if BUDGET in given or not given.items else {*given, *form.bonds}
        unread = [name for name in _names(form) if name not in known and (meant is None or name in meant)]
        return Sizes((*ranks.items(), *((bond, Number(1)) for bond in unread)))
    said = table.table("rank").scalar(BUDGET)
    if said is None:
        return Sizes(tuple(ranks.items()))
    budget = 1
    with findings.under("rank"):
        budget = parse_budget(said)
    free = tuple(name for name in _names(form) if name not in known)
    if not free:
        findings.add("rank", "`budget` has nothing to size; expected a bond without a size of its own", said.span)
    return Sizes(tuple(ranks.items()), budget, free, said.span)


def _ranks(table: Table, form: Form, findings: Findings) -> Iterator[tuple[str, Expression]]:
    """The size of each bond; one that is given by itself sizes them all."""
    if single := table.scalar("rank"):
        size = expression(single, "rank", findings)
        yield from ((bond, size) for bond in form.bonds)
    for bond, node in table.table("rank").items:
        if bond.text != BUDGET:
            yield bond.text, expression(node, "rank", findings)


def _names(form: Form) -> Iterable[str]:
    """Every mode that a factor carries or that is fused with others, in order."""
    carried = [mode for product in form.update.products for factor in product.factors for mode in factor.modes]
    return dict.fromkeys((*carried, *(part.name for mode in form.definitions for part in mode.parts)))


def _defined(form: Form) -> set[str]:
    """The modes that are no bonds."""
    return {*BUILT_IN_MODES, *(mode.name for mode in form.definitions), *side_parts(form.definitions)}


def parse_budget(text: Scalar) -> int:
    """How many numbers may be trained, in a spec and on the command line alike.

    >>> from tensorpeft.language.nodes import literal
    >>> [parse_budget(literal(text)) for text in ("20000", "20k", "20K", "2.5M", "1g")]
    [20000, 20000, 20000, 2500000, 1000000000]

    Raises:
        SpecError: it is no whole number, or out of range.
    """
    found = _COUNT.fullmatch(str(text.value))
    count = Decimal(found[1]) * _UNITS[found[2].lower()] if found else Decimal(0)
    if count != int(count) or not 1 <= count <= MAX_BUDGET:
        message = f"`{text.text}` is no number of trained numbers; expected a whole number from 1 to {MAX_BUDGET}"
        raise fail(message, text.span)
    return int(count)


def read_scale(table: Table, form: Form | None, findings: Findings) -> Expression:
    """The scale, ``alpha / r`` by default where there are both."""
    if "scale" in table:
        return expression(table.get("scale"), "scale", findings)
    bonds = {mode for reference in form.factors.values() for mode in reference.modes} if form else set()
    span = table.where("alpha")
    default = Operation("/", Name("alpha", span), Name("r", span), span)
    return default if "alpha" in table and "r" in bonds else Number(1, span)
