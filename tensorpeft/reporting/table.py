"""A table as a value, and its cells as text."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

Cell = int | float | str


@dataclass(frozen=True)
class Table:
    """Rows under headers. Numbers stay numbers here: separators and rounding come with rendering."""

    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def render(self, style: str) -> str:
        """The table in one of tabulate's formats: columns with numbers to the right, others to the left."""
        from tabulate import tabulate  # late: it reads the metadata of its package, and JSON needs none of it

        rows = [[_shown(cell) for cell in row] for row in self.rows]
        sides = [
            "left" if any(column) and all(isinstance(cell, str) for cell in column) else "right"
            for column in zip(*self.rows, strict=True)
        ]
        shown: str = tabulate(rows, self.headers, tablefmt=style, colalign=sides, disable_numparse=True)
        return shown


def _shown(cell: Cell) -> str:
    return cell if isinstance(cell, str) else f"{cell:,}" if isinstance(cell, int) else significant(cell)


def significant(value: float) -> str:
    """At most four significant digits, without an exponent.

    >>> significant(0.0000961083), significant(12.34567)
    ('0.00009611', '12.35')
    """
    return f"{Decimal(f'{value:.4g}'):f}"
