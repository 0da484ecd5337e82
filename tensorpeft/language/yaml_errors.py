"""PyYAML's complaints in plain words. A table: what it says, and the sentence a reader should see."""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml

from tensorpeft.language.errors import Problem
from tensorpeft.language.source import Source, Span


@dataclass(frozen=True)
class _Case:
    """``problem`` (and ``context``, where given) is part of PyYAML's text; ``start`` points at where the context began.

    ``{}`` in the sentence stands for the character at the place pointed at.
    """

    problem: str
    sentence: str
    start: bool = False
    context: str = ""


_CASES = (
    _Case("found character '\\t'", "a tab stands where spaces are expected; YAML indents with spaces"),
    _Case("that cannot start any token", "{} cannot begin a value; put the text in quotes"),
    _Case("could not find expected ':'", "expected `:` after this key", start=True),
    _Case("mapping values are not allowed", "a second `:` on one line; put the value in quotes or on its own line"),
    _Case("sequence entries are not allowed", "a list entry cannot begin here; put `-` on a line of its own"),
    _Case("mapping keys are not allowed", "a key cannot begin here"),
    _Case("expected alphabetic or numeric", "`*` begins an alias in YAML; put the pattern in quotes", True, "alias"),
    _Case("expected alphabetic or numeric", "`&` begins an anchor in YAML; put the text in quotes", True, "anchor"),
    _Case("unexpected end of stream", "this quote is never closed", True, "quoted scalar"),
    _Case("unexpected document separator", "this quote is never closed", True, "quoted scalar"),
    _Case("found '<stream end>'", "expected a value; the file ends"),
    _Case("got '<stream end>'", "this `[` is never closed", True, "flow sequence"),
    _Case("got '<stream end>'", "this `{` is never closed", True, "flow mapping"),
    _Case("got '['", "found {} inside a value; put a text with brackets in quotes"),
    _Case("got '{'", "found {} inside a value; put a text with braces in quotes"),
    _Case("expected ',' or ']'", "expected `,` or `]` in this list"),
    _Case("expected ',' or '}'", "expected `,` or `}` in this mapping"),
    _Case("expected <block end>", "the indentation fits no line above; entries of one mapping begin in one column"),
    _Case("expected the node content", "expected a value; found {}"),
    _Case("unknown escape character", "unknown escape after `\\`; single quotes take a text as it is"),
    _Case("expected escape sequence", "this escape is not complete; single quotes take a text as it is"),
    _Case("indentation indicator", "after `|` or `>` comes the end of the line"),
    _Case("expected a comment or a line break", "after `|` or `>` comes the end of the line"),
    _Case("expected '<document start>'", "expected the next key, in the column of the first; found {}"),
    _Case("directive", "`%` begins a YAML directive, which a spec may not use"),
    _Case("YAML document", "`%` begins a YAML directive, which a spec may not use"),
    _Case("tag handle", "`!` begins a tag, which a spec may not use", True),
    _Case("", "`!` begins a tag, which a spec may not use", True, "tag"),
    _Case("", "`%` begins a YAML directive, which a spec may not use", True, "directive"),
)
_UNKNOWN = _Case("", "this is not YAML")


def syntax_problem(source: Source, error: Exception) -> Problem:
    """The sentence for an error that PyYAML raised, at its place."""
    if isinstance(error, yaml.reader.ReaderError):
        code = error.character if isinstance(error.character, int) else ord(error.character)
        return Problem(f"the character U+{code:04X} may not stand in YAML", _at(source, error.position))
    if not isinstance(error, yaml.MarkedYAMLError):
        found = re.search(r"\\U[0-9a-fA-F]{8}|^%", source.text, re.MULTILINE)
        return Problem("this is out of range for a character or a version", _at(source, found.start() if found else 0))
    problem, context = error.problem or "", error.context or ""
    case = next((c for c in _CASES if c.problem in problem and c.context in context), _UNKNOWN)
    mark = (error.context_mark if case.start else None) or error.problem_mark or error.context_mark
    span = _at(source, mark.index if mark else 0)
    character = source.text[span.start : span.end]
    plain = character.isprintable() and character != "`"
    shown = f"`{character}`" if plain else f"the character U+{ord(character):04X}"
    return Problem(case.sentence.replace("{}", shown), span)


def _at(source: Source, index: int) -> Span:
    """The character at an index, or the last one before the end."""
    index = min(index, max(0, len(source.text.rstrip()) - 1))
    return Span(source, index, min(index + 1, len(source.text)))
