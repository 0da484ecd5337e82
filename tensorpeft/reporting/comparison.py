"""Specs x settings x budgets -> Comparison: a row for what fits, and the reason for what does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from tensorpeft.language.errors import SpecError
from tensorpeft.language.loader import load_spec
from tensorpeft.language.overrides import parse_override
from tensorpeft.model.shape import ModelShape
from tensorpeft.network.lower import lower
from tensorpeft.planning.plan import plan
from tensorpeft.planning.regime import Regime
from tensorpeft.reporting.counting import report_of
from tensorpeft.reporting.page import Page
from tensorpeft.reporting.report import Report
from tensorpeft.reporting.table import Cell, Table

Settings = tuple[tuple[str, str], ...]  # key, value as written
SweepCase = tuple[str, tuple[str, ...], int | None]  # a spec, what is set over its text, a budget


@dataclass(frozen=True)
class Row:
    """A report, and what was set over its spec to get it."""

    settings: Settings
    report: Report

    def to_data(self) -> dict[str, object]:
        return {"settings": dict(self.settings), **self.report.to_data()}


@dataclass(frozen=True)
class Refused:
    """A spec that has no report, and why."""

    settings: Settings
    name: str
    reason: str

    def to_data(self) -> dict[str, object]:
        return {"settings": dict(self.settings), "name": self.name, "refused": self.reason}


@dataclass(frozen=True)
class Comparison(Page):
    """Reports on one model, of which there is at least one, and what could not be reported on."""

    rows: tuple[Row, ...]
    refused: tuple[Refused, ...] = ()

    @property
    def title(self) -> str:
        report = self.rows[0].report
        counted = f" ({report.model_class})" if report.model_class else ""
        return f"{report.model}{counted}: {report.base:,} parameters"

    @property
    def tables(self) -> tuple[Table, ...]:
        keys = tuple(dict.fromkeys(key for row in self.rows for key, _ in row.settings))
        counts = ("trained", "% of base", "stored", "checkpoint bytes", "FLOPs per token", "LoRA-equivalent rank")
        reports = Table(("spec", *keys, *counts), tuple(_cells(row, keys) for row in self.rows))
        return (reports, self._left_out(keys)) if self.refused else (reports,)

    def _left_out(self, keys: tuple[str, ...]) -> Table:
        told = [key for key in keys if any(key in dict(refused.settings) for refused in self.refused)]
        rows = ((each.name, *_values(each.settings, told), each.reason.partition("\n")[0]) for each in self.refused)
        return Table(("left out", *told, "because"), tuple(rows))

    def to_data(self) -> list[dict[str, object]]:
        """Each report, with its ``settings``; what was left out has its reason under ``refused`` instead of numbers."""
        return [*(row.to_data() for row in self.rows), *(refused.to_data() for refused in self.refused)]


def _cells(row: Row, keys: tuple[str, ...]) -> tuple[Cell, ...]:
    report = row.report
    counts = (report.trainable, report.percent, report.stored, report.bytes["checkpoint"])
    return (report.name, *_values(row.settings, keys), *counts, report.flops_per_token, report.lora_rank)


def _values(settings: Settings, keys: Iterable[str]) -> Iterator[Cell]:
    """The setting of each key; numbers as numbers."""
    for value in (dict(settings).get(key, "") for key in keys):
        yield int(value) if value.isdecimal() else value


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
