"""Pages for people: a title, tables, perhaps code and a picture; as text, JSON, Markdown and HTML."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from html import escape

from tensorpeft.reporting.table import Table

_STYLE = """
body { font-family: sans-serif; margin: 2em }
table { border-collapse: collapse; margin-bottom: 2em }
th, td { padding: .2em .8em; border-bottom: 1px solid #ccc }
svg { max-width: 100%; height: auto }
"""


@dataclass(frozen=True)
class Listing:
    """Code under a caption."""

    caption: str
    code: str


class Page(ABC):
    """A value that is told in tables: a title of one line or more, and the same as data."""

    @property
    @abstractmethod
    def title(self) -> str: ...

    @property
    @abstractmethod
    def tables(self) -> tuple[Table, ...]: ...

    @property
    def listings(self) -> tuple[Listing, ...]:
        """Code that belongs to it."""
        return ()

    @abstractmethod
    def to_data(self) -> object:
        """Dicts, lists, texts and numbers alone; integers exact."""

    def to_json(self) -> str:
        return json.dumps(self.to_data(), indent=2) + "\n"

    def to_text(self) -> str:
        """All of it below the title, for a terminal."""
        code = (f"# {listing.caption}\n{listing.code}" for listing in self.listings)
        return "\n\n".join([self.title, *(table.render("simple") for table in self.tables), *code]) + "\n"

    def to_markdown(self) -> str:
        """All of it below the title, as GitHub's Markdown."""
        head, *rest = self.title.split("\n")
        lines = (f"`{line}`" for line in rest)
        code = (f"{listing.caption}:\n```python\n{listing.code}\n```" for listing in self.listings)
        return "\n\n".join([f"## {head}", *lines, *(table.render("github") for table in self.tables), *code]) + "\n"

    def to_html(self, picture: str = "") -> str:
        """A page of its own; with a picture, an SVG element, below the title."""
        head, *rest = (escape(line) for line in self.title.split("\n"))
        body = [
            f"<h1>{head}</h1>",
            *(f"<p><code>{line}</code></p>" for line in rest),
            *filter(None, [picture.strip()]),
            *(table.render("html") for table in self.tables),
            *(
                f"<h2>{escape(each.caption)}</h2>\n<pre><code>{escape(each.code)}</code></pre>"
                for each in self.listings
            ),
        ]
        meta = f'<head><meta charset="utf-8"><title>{head}</title><style>{_STYLE}</style></head>'
        start = ["<!doctype html>", '<html lang="en">', meta, "<body>"]
        return "\n".join([*start, *body, "</body>", "</html>"]) + "\n"

    def _repr_html_(self) -> str:
        """Shown by a notebook."""
        return self.to_html()

    def __str__(self) -> str:
        return self.to_text()
