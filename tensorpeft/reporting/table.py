"""A table as a value, a page of tables, and their text, JSON, Markdown and HTML."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from html import escape

from tabulate import tabulate

Cell = int | float | str

_STYLE = """
body { font-family: sans-serif; margin: 2em }
table { border-collapse: collapse; margin-bottom: 2em }
th, td { padding: .2em .8em; border-bottom: 1px solid #ccc }
"""


@dataclass(frozen=True)
class Table:
    """Rows under headers. Numbers stay numbers here: separators and rounding come with rendering."""

    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def render(self, style: str) -> str:
        """The table in one of tabulate's formats: columns with numbers to the right, others to the left."""
        rows = [[_shown(cell) for cell in row] for row in self.rows]
        sides = [
            "left" if any(column) and all(isinstance(cell, str) for cell in column) else "right"
            for column in zip(*self.rows, strict=True)
        ]
        shown: str = tabulate(rows, self.headers, tablefmt=style, colalign=sides, disable_numparse=True)
        return shown


class Page(ABC):
    """What is told in tables: a title of one line or more, and the same as data."""

    @property
    @abstractmethod
    def title(self) -> str: ...

    @property
    @abstractmethod
    def tables(self) -> tuple[Table, ...]: ...

    @abstractmethod
    def to_data(self) -> object:
        """Dicts, lists, texts and numbers alone; integers exact."""

    def to_json(self) -> str:
        return json.dumps(self.to_data(), indent=2) + "\n"

    def to_text(self) -> str:
        return text(self.title, self.tables)

    def to_markdown(self) -> str:
        return markdown(self.title, self.tables)

    def to_html(self) -> str:
        return html(self.title, self.tables)

    def __str__(self) -> str:
        return self.to_text()


def text(title: str, tables: Sequence[Table]) -> str:
    """Tables below a title, for a terminal."""
    return "\n\n".join([title, *(table.render("simple") for table in tables)]) + "\n"


def markdown(title: str, tables: Sequence[Table]) -> str:
    """Tables below a title, as GitHub's Markdown."""
    head, *rest = title.split("\n")
    return (
        "\n\n".join([f"## {head}", *(f"`{line}`" for line in rest), *(table.render("github") for table in tables)])
        + "\n"
    )


def html(title: str, tables: Sequence[Table]) -> str:
    """Tables below a title, as a page of their own."""
    head, *rest = (escape(line) for line in title.split("\n"))
    body = [
        f"<h1>{head}</h1>",
        *(f"<p><code>{line}</code></p>" for line in rest),
        *(table.render("html") for table in tables),
    ]
    page = f'<!doctype html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{head}</title><style>{_STYLE}</style></head>'
    return "\n".join([page, "<body>", *body, "</body>", "</html>"]) + "\n"


def _shown(cell: Cell) -> str:
    return cell if isinstance(cell, str) else f"{cell:,}" if isinstance(cell, int) else significant(cell)


def significant(value: float) -> str:
    """At most four significant digits, without an exponent.

    >>> significant(0.0000961083), significant(12.34567)
    ('0.00009611', '12.35')
    """
    return f"{Decimal(f'{value:.4g}'):f}"
