"""The problems found in a spec, collected while it is read, so that one run tells them all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tensorpeft.language.errors import Problem, SpecError
from tensorpeft.language.nodes import KeyPath
from tensorpeft.language.source import Span


@dataclass
class Findings:
    """The problems of one file, the top-level keys they spoil, and the places of the file that cannot be read.

    What depends on a spoiled key is not judged, so one mistake gives one message.
    """

    problems: list[Problem] = field(default_factory=list)
    spoiled: set[str] = field(default_factory=set)
    unreadable: set[KeyPath] = field(default_factory=set)

    def add(self, key: str, message: str, span: Span | None) -> None:
        """One problem, under a top-level key."""
        self.extend(key, [Problem(message, span)])

    def extend(self, key: str, problems: Iterable[Problem]) -> None:
        """Problems under a top-level key, if there are any."""
        if found := list(problems):
            self.problems += found
            self.spoiled.add(key)

    @contextmanager
    def under(self, key: str) -> Iterator[None]:
        """Keep what the block raises, as a finding under a top-level key."""
        try:
            yield
        except SpecError as error:
            self.extend(key, error.problems)

    def within(self, span: Span | None) -> bool:
        """Whether something is wrong inside a stretch of text."""
        places = (problem.span for problem in self.problems if span and problem.span)
        return any(p.source is span.source and span.start <= p.start < span.end for p in places if span)

    def settle(self) -> None:
        """Raise whatever was found, in the order of the text."""
        if self.problems:
            raise SpecError(
                sorted(self.problems, key=lambda p: (p.span.source.name, p.span.start) if p.span else ("", 0))
            )
