"""Errors as part of the interface.

    TensorpeftError(ValueError)
    ├── SpecError          the spec is wrong, by itself or for this model: located in its text
    ├── ModelError         a model card, config or module cannot be read
    ├── CheckpointError    a saved adapter is damaged, or belongs to another base
    └── AdapterError       a call that the adapter's present state does not allow

Each says in one sentence what was found and what was expected, with the nearest name where there is one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from tensorpeft.language.source import Span

MAX_SHOWN = 40  # problems that the text of an error spells out


class TensorpeftError(ValueError):
    """Whatever this library refuses."""


class ModelError(TensorpeftError):
    """A model card, a config.json or a torch model that cannot be adapted."""


class CheckpointError(TensorpeftError):
    """A saved adapter that cannot be loaded."""


class AdapterError(TensorpeftError):
    """A call that does not fit the state an adapter is in."""


class InternalError(RuntimeError):
    """A value of the compiler that contradicts itself: a fault of this library, not of what it was given."""


@dataclass(frozen=True)
class Problem:
    """One sentence about one place of a spec."""

    message: str
    span: Span | None = None

    def __str__(self) -> str:
        if self.span is None:
            return self.message
        line, column = self.span.position
        text = "".join(map(_shown, self.span.source.line(line)))
        width = max(1, min(self.span.end - self.span.start, len(text) - column + 1))
        start = max(0, min(column - 40, len(text) - 100))  # a window on very long lines
        shown, caret = text[start : start + 100], column - 1 - start
        return f"{self.span}: {self.message}\n    {shown}\n    {' ' * caret}{'^' * min(width, 100 - caret)}"


def _shown(character: str) -> str:
    """A character that takes one column and cannot steer a terminal."""
    return character if character.isprintable() else " " if character == "\t" else "\N{REPLACEMENT CHARACTER}"


class SpecError(TensorpeftError):
    """Everything that is wrong with a spec, each problem at its place."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        shown = [str(problem) for problem in self.problems[:MAX_SHOWN]]
        more = len(self.problems) - len(shown)
        super().__init__("\n".join([*shown, f"... and {more} problems more"] if more else shown))


def fail(message: str, span: Span | None = None) -> SpecError:
    """A spec error of one problem, to be raised by the caller."""
    return SpecError([Problem(message, span)])


def unknown(noun: str, found: str, known: Iterable[str], limit: int = 12) -> str:
    """A message about a name of which nothing is known."""
    known = tuple(known)
    return f"unknown {noun} `{found}`{did_you_mean(found, known) or f'; expected one of {listing(known, limit)}'}"


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """A question to end a message with, or nothing where no known name is near.

    >>> did_you_mean("lyaer", ["layer", "head"])
    '; did you mean `layer`?'
    """
    near = nearest(found, known)
    return f"; did you mean `{near}`?" if near else ""


def nearest(found: str, known: Iterable[str]) -> str | None:
    """The known name most like the one found, if any is."""
    names = {str(name).lower(): str(name) for name in known}
    wanted = found[:64].lower()
    near = get_close_matches(wanted, names, n=3, cutoff=0.6)
    near.sort(key=lambda name: sorted(name) != sorted(wanted))  # letters swapped come before letters changed
    return names[near[0]] if near else None


def clip(text: str, limit: int = 60) -> str:
    """A text on one line, the end of a long one left out."""
    text = "".join(map(_shown, " ".join(text.split())))
    return text if len(text) <= limit else f"{text[:limit]}..."


def listing(names: Iterable[str], limit: int = 12) -> str:
    """Names in backquotes, separated by commas, the tail of a long list counted."""
    names = list(names)
    shown = ", ".join(f"`{name}`" for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
