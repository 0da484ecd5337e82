"""Several reports side by side: one row each."""

from __future__ import annotations

from dataclasses import dataclass

from tensorpeft.reporting.report import Report
from tensorpeft.reporting.table import Cell, Page, Table


@dataclass(frozen=True)
class Row:
    """A report, and what was set over its spec to get it."""

    settings: tuple[tuple[str, str], ...]  # key, value as written
    report: Report


@dataclass(frozen=True)
class Comparison(Page):
    """Reports on one model."""

    rows: tuple[Row, ...]

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
        return (Table(headers, tuple(self._cells(row, keys) for row in self.rows)),)

    def _cells(self, row: Row, keys: tuple[str, ...]) -> tuple[Cell, ...]:
        report, settings = row.report, dict(row.settings)
        values = (int(value) if value.isdecimal() else value for value in (settings.get(key, "") for key in keys))
        counts = (report.trainable, report.percent, report.stored, report.bytes["checkpoint"])
        return (report.name, *values, *counts, report.flops_per_token, report.lora_rank)

    def to_data(self) -> list[dict[str, object]]:
        """Each report, with its ``settings``."""
        return [{"settings": dict(row.settings), **row.report.to_data()} for row in self.rows]
