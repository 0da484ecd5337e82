"""Specs x settings x budgets -> Comparison: a row for what fits, and the reason for what does not."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product

from tensorpeft.language.check_values import MAX_RANK
from tensorpeft.language.errors import SpecError, fail
from tensorpeft.language.load import load_spec
from tensorpeft.language.override import parse_override
from tensorpeft.language.spec import Spec
from tensorpeft.language.syntax import Number
from tensorpeft.network.lower import lower
from tensorpeft.network.shapes import ModelShape
from tensorpeft.planning.plan import plan
from tensorpeft.planning.regime import Regime
from tensorpeft.reporting.comparison import Comparison, Refused, Row, Settings
from tensorpeft.reporting.counting import report_of, trained
from tensorpeft.reporting.report import Report

Case = tuple[str, tuple[str, ...], int | None]  # a spec, what is set over its text, a budget


def cases(specs: Sequence[str], settings: Iterable[Sequence[str]], budgets: Sequence[int]) -> list[Case]:
    """Every spec with all settings of one combination, under every budget; None where there is no budget."""
    return [(spec, tuple(chosen), budget) for spec, chosen, budget in product(specs, settings, budgets or (None,))]


def sweep(given: Iterable[Case], shape: ModelShape) -> Comparison:
    """A row for each case.

    Raises:
        SpecError: a spec or a setting is wrong whatever the model. What does not fit the model or the budget is told in
            the comparison.
    """
    found = [_tried(case, shape) for case in given]
    rows = tuple(row for row in found if isinstance(row, Row))
    return Comparison(rows, tuple(row for row in found if isinstance(row, Refused)))


def row(name: str, chosen: Sequence[str], shape: ModelShape) -> Row:
    """The report on a spec with settings.

    Raises:
        SpecError: the spec is wrong, or does not fit the model.
    """
    return Row(_settings(chosen), _report(load_spec(name, *map(parse_override, chosen)), shape))


def _tried(case: Case, shape: ModelShape) -> Row | Refused:
    name, chosen, budget = case
    spec, settings = load_spec(name, *map(parse_override, chosen)), _settings(chosen)
    if budget is not None:
        settings = (("budget", str(budget)), *settings)
    try:
        if budget is not None:
            spec, rank = within(spec, shape, budget)
            settings = (*settings, ("rank", str(rank)))
        return Row(settings, _report(spec, shape))
    except SpecError as refusal:
        return Refused(settings, spec.name, str(refusal))


def _settings(chosen: Sequence[str]) -> Settings:
    return tuple((key, value) for key, _, value in (setting.partition("=") for setting in chosen))


def _report(spec: Spec, shape: ModelShape) -> Report:
    return report_of(plan(lower(spec, shape), Regime()))


def within(spec: Spec, shape: ModelShape, budget: int) -> tuple[Spec, int]:
    """The spec at the largest rank that trains at most so many numbers, and that rank."""

    def count(rank: int) -> int:
        return trained(lower(_at(spec, rank), shape))

    least = count(1)
    if least == count(2):
        raise fail(f"it trains {least:,} numbers at every rank")
    if least > budget:
        raise fail(f"it trains {least:,} numbers at rank 1, more than {budget:,}")
    ranks = range(1, min(budget, MAX_RANK) + 1)  # each step of the rank adds at least one number
    rank = bisect_right(ranks, budget, key=count)
    return _at(spec, rank), rank


def _at(spec: Spec, rank: int) -> Spec:
    """A spec at a rank: that of the bond ``r``, or of every bond where none is called so."""
    free = {"r"} if "r" in dict(spec.ranks) else {bond for bond, _ in spec.ranks}
    return replace(spec, ranks=tuple((bond, Number(rank) if bond in free else size) for bond, size in spec.ranks))
