"""Several reports side by side: one row each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tensorpeft.reporting.page import Page
from tensorpeft.reporting.report import Report
from tensorpeft.reporting.table import Cell, Table

Settings = tuple[tuple[str, str], ...]  # key, value as written


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
        headers = (
            "spec",
            *keys,
            "trained",
            "% of base",
            "stored",
            "checkpoint bytes",
            "FLOPs per token",
            "LoRA-equivalent rank",
        )
        reports = Table(headers, tuple(self._cells(row, keys) for row in self.rows))
        return (reports, self._left_out(keys)) if self.refused else (reports,)

    def _left_out(self, keys: tuple[str, ...]) -> Table:
        told = [key for key in keys if any(key in dict(refused.settings) for refused in self.refused)]
        rows = (
            (refused.name, *_values(refused.settings, told), refused.reason.partition("\n")[0])
            for refused in self.refused
        )
        return Table(("left out", *told, "because"), tuple(rows))

    def _cells(self, row: Row, keys: tuple[str, ...]) -> tuple[Cell, ...]:
        report = row.report
        counts = (report.trainable, report.percent, report.stored, report.bytes["checkpoint"])
        return (report.name, *_values(row.settings, keys), *counts, report.flops_per_token, report.lora_rank)

    def to_data(self) -> list[dict[str, object]]:
        """Each report, with its ``settings``; what was left out has its reason under ``refused`` instead of numbers."""
        return [*(row.to_data() for row in self.rows), *(refused.to_data() for refused in self.refused)]


def _values(settings: Settings, keys: Iterable[str]) -> Iterator[Cell]:
    """The setting of each key; numbers as numbers."""
    for value in (dict(settings).get(key, "") for key in keys):
        yield int(value) if value.isdecimal() else value
