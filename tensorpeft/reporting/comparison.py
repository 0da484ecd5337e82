"""Several reports side by side: one row each."""

from __future__ import annotations

import json
from dataclasses import dataclass

from tensorpeft.reporting.report import Report
from tensorpeft.reporting.table import Cell, Table, html, markdown, text


@dataclass(frozen=True)
class Row:
    """A report, and what was set over its spec to get it."""

    settings: tuple[tuple[str, str], ...]  # key, value as written
    report: Report


@dataclass(frozen=True)
class Comparison:
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

    def to_json(self) -> str:
        """A list: each report, with its ``settings``."""
        return (
            json.dumps([{"settings": dict(row.settings), **row.report.to_dict()} for row in self.rows], indent=2) + "\n"
        )

    def to_text(self) -> str:
        return text(self.title, self.tables)

    def to_markdown(self) -> str:
        return markdown(self.title, self.tables)

    def to_html(self) -> str:
        return html(self.title, self.tables)
