"""YAML text -> node tree, by the rules of YAML 1.2's core schema and within fixed bounds.

PyYAML finds the structure (its events carry the marks); what the scalars mean is decided here, since its own rules read
``on`` as true, ``010`` as 8 and ``1e-3`` as a text. Refused, each with its place: duplicate keys, keys that are no
text, tags, anchors and aliases, merge keys, several documents, and whatever is larger or deeper than a spec can be.

A syntax error is told in plain words: a table has the sentence for each of PyYAML's complaints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import yaml

from tensorpeft.language.errors import Problem, SpecError, fail
from tensorpeft.language.nodes import List, MappingNode, Node, Plain, Scalar
from tensorpeft.language.source import Source, Span

MAX_BYTES = 64 * 1024
MAX_DEPTH = 16
MAX_NODES = 2048
MAX_DIGITS = 20

_CONSTANTS: dict[str, bool | None] = dict.fromkeys(("", "~", "null", "Null", "NULL"))
_CONSTANTS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_OTHER_BASE = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def parse_document(source: Source) -> MappingNode:
    """The one mapping that a spec file holds.

    Raises SpecError, located, for whatever is not such a file: all duplicate keys and odd scalars at once, or the first
    syntax error.
    """
    root = _Composer(source, source.text).root()
    if root is None:
        raise fail("the file is empty; a spec begins with `tensorpeft: 1`", Span(source, 0, 1))
    if not isinstance(root, MappingNode):
        found = "a list" if isinstance(root, List) else "a single value"
        raise fail(f"found {found}; a spec is a mapping that begins with `tensorpeft: 1`", root.span)
    return root


def parse_value(source: Source, start: int) -> Node:
    """The value that a text holds from ``start`` on: ``4`` in ``rank=4``."""
    root = _Composer(source, " " * start + source.text[start:]).root()
    if root is None:
        raise fail("expected a value after `=`", Span(source, 0, len(source.text)))
    return root


class _Composer:
    """One pass over the events of a text."""

    def __init__(self, source: Source, text: str) -> None:
        self.source = source
        self.text = text
        self.problems: list[Problem] = []
        self.n_nodes = 0

    def root(self) -> Node | None:
        """The only document's node; None if there is no document."""
        # events rather than PyYAML's nodes: what is too deep or too much is refused before it is built
        if len(self.text.encode("utf-8", "replace")) > MAX_BYTES:
            message = f"a spec has at most {MAX_BYTES // 1024} KiB of text; this one has more"
            raise fail(message, Span(self.source, 0, 1))
        try:
            root = self._root(yaml.parse(self.text, Loader=yaml.SafeLoader))
        except SpecError:
            raise
        except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: numbers in escapes and directives
            raise SpecError([*self.problems, syntax_problem(self.source, error)]) from None
        if self.problems:
            raise SpecError(self.problems)
        return root

    def _root(self, events: Iterator[yaml.Event]) -> Node | None:
        self.events = events
        next(self.events)  # start of the stream
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            return None
        if event.version or event.tags:
            raise fail("`%` begins a YAML directive, which a spec may not use", self._span(event))
        root = self._node(next(self.events), 0)
        next(self.events)  # end of the document
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise fail("a second document begins here; a spec file holds one", self._span(event))
        return root

    def _span(self, event: yaml.Event, end: yaml.Event | None = None) -> Span:
        return Span(self.source, event.start_mark.index, (end or event).end_mark.index)

    def _node(self, event: yaml.Event, depth: int) -> Node:
        self.n_nodes += 1
        if depth > MAX_DEPTH:
            raise fail(f"nested more than {MAX_DEPTH} levels deep; a spec needs four", self._span(event))
        if self.n_nodes > MAX_NODES:
            raise fail(f"a spec has at most {MAX_NODES} keys and values; this one has more", self._span(event))
        self._refuse(event)
        if isinstance(event, yaml.MappingStartEvent):
            return self._table(event, depth)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._list(event, depth)
        return self._scalar(event)

    def _refuse(self, event: yaml.NodeEvent) -> None:
        span = self._span(event)
        if isinstance(event, yaml.AliasEvent):
            message = f"`*{event.anchor}` is an alias, which a spec may not use"
            raise fail(f"{message}; write the value out (a pattern that begins with `*` needs quotes)", span)
        if event.anchor is not None:
            raise fail(f"`&{event.anchor}` is an anchor, which a spec may not use; write the value without it", span)
        if event.tag is not None:
            tag = self.source.text[span.start : span.end].split(maxsplit=1)[0] if span.end > span.start else "!"
            raise fail(f"`{tag[:40]}` is a tag, which a spec may not use; write the plain value", span)

    def _list(self, start: yaml.Event, depth: int) -> List:
        items = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self._node(event, depth + 1))
        return List(tuple(items), self._span(start, event))

    def _table(self, start: yaml.Event, depth: int) -> MappingNode:
        items: list[tuple[Scalar, Node]] = []
        first: dict[str, Scalar] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._key(event, depth + 1)
            value = self._node(next(self.events), depth + 1)
            if first.setdefault(key.text, key) is key:
                items.append((key, value))
            else:
                line = first[key.text].span.position[0]
                self.problems.append(Problem(f"`{key.text}` is given twice; the first is on line {line}", key.span))
        return MappingNode(tuple(items), self._span(start, event))

    def _key(self, event: yaml.Event, depth: int) -> Scalar:
        key = self._node(event, depth)
        if not isinstance(key, Scalar):
            raise fail("a key must be a name; found a " + ("list" if isinstance(key, List) else "mapping"), key.span)
        if key.text == "<<" and not event.style:
            raise fail("`<<` merges mappings, which a spec may not do; write the keys out", key.span)
        if not isinstance(key.value, str):
            shown = key.text or "nothing"
            self.problems.append(Problem(f"a key must be a name; found `{shown}` (quotes make it a text)", key.span))
        return key

    def _scalar(self, event: yaml.ScalarEvent) -> Scalar:
        span = self._span(event)
        start, end = span.start, span.end
        if event.style in ("'", '"'):
            start, end = start + 1, end - 1
        elif event.style in ("|", ">"):
            start = self.source.text.find("\n", start, end) + 1 or end
        value: Plain = event.value
        if not event.style:
            value = self._plain(event.value, span)
        elif (odd := next((c for c in event.value if not (c.isprintable() or c in "\n\t")), None)) is not None:
            self.problems.append(Problem(f"the text holds the unprintable character U+{ord(odd):04X}", span))
        return Scalar(value, event.value, span, Span(self.source, start, end))

    def _plain(self, text: str, span: Span) -> Plain:
        """The value of an unquoted scalar; a number that cannot be meant is a problem, and reads as 0."""
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if len(text) > MAX_DIGITS and (_INTEGER.fullmatch(text) or _OTHER_BASE.fullmatch(text)):
            return self._odd(f"a number of {len(text)} digits; at most {MAX_DIGITS} can be meant", span)
        if _LEADING_ZERO.fullmatch(text):
            message = f"`{text}` has a leading zero, which some read as octal; write `{int(text)}`, or quote a text"
            return self._odd(message, span)
        if _INTEGER.fullmatch(text):
            return int(text)
        if _OTHER_BASE.fullmatch(text):
            return int(text, 0)
        if _NOT_FINITE.fullmatch(text):
            return self._odd(f"`{text}` is not a finite number", span)
        if _FLOAT.fullmatch(text):
            number = float(text) if len(text) <= 400 else math.inf
            return number if math.isfinite(number) else self._odd(f"`{text[:40]}` is too large for a number", span)
        return text

    def _odd(self, message: str, span: Span) -> int:
        self.problems.append(Problem(message, span))
        return 0


class _Case(NamedTuple):
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
