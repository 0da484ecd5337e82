"""What has been found wrong with a spec so far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tensorpeft.language.errors import Problem, SpecError
from tensorpeft.language.source import Span


@dataclass
class Findings:
    """The problems of one file, and the top-level keys they spoil.

    What depends on a spoiled key is not judged, so one mistake gives one message.
    """

    problems: list[Problem] = field(default_factory=list)
    spoiled: set[str] = field(default_factory=set)

    def add(self, key: str, message: str, span: Span | None) -> None:
        """One problem, under a top-level key."""
        self.extend(key, [Problem(message, span)])

    def extend(self, key: str, problems: Iterable[Problem]) -> None:
        """Problems under a top-level key."""
        self.problems.extend(problems)
        self.spoiled.add(key)

    @contextmanager
    def under(self, key: str) -> Iterator[None]:
        """Keep what the block raises, as a finding under a top-level key."""
        try:
            yield
        except SpecError as error:
            self.extend(key, error.problems)

    def settle(self) -> None:
        """Raise whatever was found, in the order of the text."""
        if self.problems:
            raise SpecError(sorted(self.problems, key=_place))


def _place(problem: Problem) -> tuple[str, int]:
    return (problem.span.source.name, problem.span.start) if problem.span else ("", 0)
