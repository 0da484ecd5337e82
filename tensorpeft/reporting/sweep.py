"""Specs x settings x budgets -> Comparison: a row for what fits, and the reason for what does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product

from tensorpeft.language.errors import SpecError
from tensorpeft.language.loader import load_spec
from tensorpeft.language.overrides import parse_override
from tensorpeft.model.shape import ModelShape
from tensorpeft.network.lower import lower
from tensorpeft.planning.plan import plan
from tensorpeft.planning.regime import Regime
from tensorpeft.reporting.comparison import Comparison, Refused, Row, Settings
from tensorpeft.reporting.counting import report_of

SweepCase = tuple[str, tuple[str, ...], int | None]  # a spec, what is set over its text, a budget


def cases(specs: Sequence[str], settings: Iterable[Sequence[str]], budgets: Sequence[int]) -> list[SweepCase]:
    """Every spec with all settings of one combination, under every budget; None where there is no budget."""
    return [(spec, tuple(chosen), budget) for spec, chosen, budget in product(specs, settings, budgets or (None,))]


def sweep(given: Iterable[SweepCase], shape: ModelShape) -> Comparison:
    """A row for each case.

    Raises:
        SpecError: a spec or a setting is wrong whatever the model. What does not fit the model or the budget is told in
            the comparison.
    """
    found = [_tried(case, shape) for case in given]
    rows = tuple(row for row in found if isinstance(row, Row))
    return Comparison(rows, tuple(row for row in found if isinstance(row, Refused)))


def _tried(case: SweepCase, shape: ModelShape) -> Row | Refused:
    name, chosen, budget = case
    try:
        return row(name, chosen, shape) if budget is None else _within(budget, name, chosen, shape)
    except SpecError as refusal:
        spec = load_spec(name, *map(parse_override, chosen))  # else the spec itself is wrong
        limit = () if budget is None else (("budget", str(budget)),)
        return Refused((*limit, *_settings(chosen)), spec.name, str(refusal))


def row(name: str, chosen: Sequence[str], shape: ModelShape) -> Row:
    """The report on a spec with settings.

    Raises:
        SpecError: the spec is wrong, or does not fit the model.
    """
    spec = load_spec(name, *map(parse_override, chosen))
    return Row(_settings(chosen), report_of(plan(lower(spec, shape), Regime())))


def _within(budget: int, name: str, chosen: Sequence[str], shape: ModelShape) -> Row:
    """The report at the largest rank within a budget."""
    spec = load_spec(name, *map(parse_override, (*chosen, f"rank={{budget: {budget}}}")))
    network = lower(spec, shape)
    rank = dict(network.spec.ranks)[spec.free[0]]  # all free bonds have one size
    settings = (("budget", str(budget)), *_settings(chosen), ("rank", str(rank)))
    return Row(settings, report_of(plan(network, Regime())))


def _settings(chosen: Sequence[str]) -> Settings:
    return tuple((key, value) for key, _, value in (setting.partition("=") for setting in chosen))
