"""Numbers and texts in tables."""

from __future__ import annotations

import pytest

from tensorpeft.reporting.page import Page
from tensorpeft.reporting.report import binary
from tensorpeft.reporting.table import Table, significant


def page(title: str, table: Table) -> Page:
    return type("Told", (Page,), {"title": title, "tables": (table,), "to_data": lambda self: None})()


TABLE = Table(("name", "count", "share"), (("a", 12345, 0.0000961083), ("b", 7, 12.34567)))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (100.0, "100"), (12.34567, "12.35"), (0.0000961083, "0.00009611"), (123456.0, "123500")],
)
def test_four_significant_digits(value, shown):
    assert significant(value) == shown


@pytest.mark.parametrize(
    ("n_bytes", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (16_777_216, "16.0 MiB"), (5 * 2**50, "5,120.0 TiB")],
)
def test_binary_units(n_bytes, shown):
    assert binary(n_bytes) == shown


def test_text():
    assert page("Head\nsecond line", TABLE).to_text() == (
        "Head\nsecond line\n\n"
        "name      count       share\n"
        "------  -------  ----------\n"
        "a        12,345  0.00009611\n"
        "b             7       12.35\n"
    )


def test_markdown():
    assert page("Head\nsecond line", TABLE).to_markdown() == (
        "## Head\n\n`second line`\n\n"
        "| name   |   count |      share |\n"
        "|--------|---------|------------|\n"
        "| a      |  12,345 | 0.00009611 |\n"
        "| b      |       7 |      12.35 |\n"
    )


def test_html_is_escaped():
    shown = page("<Head>\na & b", Table(("x",), (("<script>",),))).to_html()
    assert "<h1>&lt;Head&gt;</h1>" in shown
    assert "<p><code>a &amp; b</code></p>" in shown
    assert "&lt;script&gt;" in shown
    assert "<script>" not in shown
