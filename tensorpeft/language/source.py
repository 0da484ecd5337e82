"""Texts and stretches of them: an error is shown at the span that it is about."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Source:
    """A named text: a spec file, a string given by the caller, an override."""

    name: str
    text: str

    def line(self, number: int) -> str:
        """The text of a line, counted from 1."""
        lines = self.text.split("\n")  # as positions count them: splitlines() knows more line breaks
        return lines[number - 1] if 0 < number <= len(lines) else ""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one source, as character offsets ``[start, end)``."""

    source: Source
    start: int
    end: int

    @property
    def position(self) -> tuple[int, int]:
        """Line and column of the start, both counted from 1."""
        before = self.source.text[: self.start]
        return before.count("\n") + 1, self.start - (before.rfind("\n") + 1) + 1

    def __str__(self) -> str:
        line, column = self.position
        return f"{self.source.name}:{line}:{column}"

    def part(self, start: int, end: int) -> Span:
        """The stretch ``[start, end)`` counted from the start of this one."""
        return Span(self.source, self.start + start, min(self.start + end, self.end))
