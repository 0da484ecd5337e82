"""Text -> lark tree, within bounds; what does not fit is told in the words of the language.

The grammars are the files ``grammars/*.lark``. A parser is built at its first use and kept.
"""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import lark

from tensorpeft.language.errors import clip, fail
from tensorpeft.language.nodes import Scalar
from tensorpeft.language.shipped import grammar_path

MAX_DIGITS = 20
MAX_NESTING = 16
MAX_UPDATE = 8192  # characters of an update as it is printed
MAX_OPERATORS = 64  # in arithmetic, where they nest

Tree = Any  # lark.Tree, whose children mypy cannot tell apart


class Language(NamedTuple):
    """One of the small languages: its grammar file, where it starts, and how long a text of it may be."""

    grammar: str
    start: str
    noun: str
    max_length: int
    nests: bool = True  # operators nest, so their number is bounded as well


UPDATE = Language("update", "update", "update", 2 * MAX_UPDATE, nests=False)
REFERENCE = Language("update", "reference", "factor with its modes", 256)
DEFINITION = Language("expressions", "definition", "mode", 512)
INIT = Language("expressions", "init", "initialiser", 2048)
CALL = Language("expressions", "call", "mask rule", 2048)
ARITHMETIC = Language("expressions", "sum", "number or expression", 512)
SELECTOR = Language("selector", "selector", "choice of sites", 2048, nests=False)
_LANGUAGES = (UPDATE, REFERENCE, DEFINITION, INIT, CALL, ARITHMETIC, SELECTOR)

_WORDS = {
    "$END": "the end",
    "FACTOR": "a factor name",
    "LAYER": "a layer number",
    "MATRIX": "the name of a matrix",
    "MODE": "a mode name",
    "NAME": "a name",
    "NUMBER": "a number",
}


def parse(language: Language, text: Scalar) -> Tree:
    """The tree of a text; raises SpecError at the first thing that does not fit."""
    _bound(language, text)
    parser = _parser(language.grammar)
    try:
        return parser.parse(text.text, start=language.start)
    except lark.UnexpectedInput as error:
        token = getattr(error, "token", None)  # none where a character begins no word at all
        at_end = token is not None and token.type == "$END"
        start = len(text.text.rstrip()) if at_end else int(error.pos_in_stream or 0)
        end = start + (0 if at_end else 1 if token is None else len(token))
    found = f"`{clip(text.text[start:end], 24)}`" if end > start else "the end"
    opened = sum(map(text.text.count, "([")) > sum(map(text.text.count, ")]"))
    cut = at_end and opened and text.span.source.text[text.span.end :].lstrip().startswith(",")
    hint = "; a text with a comma needs quotes here" if cut else ""
    raise fail(f"found {found}, expected {_expected(parser, language, text.text, start)}{hint}", text.part(start, end))


def _expected(parser: lark.Lark, language: Language, text: str, end: int) -> str:
    """The words that the grammar accepts at ``end``, where the text stops making sense."""
    # what lark's error calls expected depends on its lexer's state, and lists words that would fail one step later
    steps = parser.parse_interactive(text, start=language.start)
    with suppress(lark.UnexpectedInput):
        for token in steps.iter_parse():
            if (token.start_pos or 0) >= end:
                break
    patterns = {terminal.name: terminal.pattern.value for terminal in parser.terminals}
    words: set[str] = set()
    for name in steps.accepts():
        signs = ["+", "-"] if name == "SIGN" else [patterns.get(name, name)]
        words.update([_WORDS[name]] if name in _WORDS else [f"`{sign}`" for sign in signs])
    *most, last = sorted(words)
    return f"{', '.join(most)} or {last}" if most else last


def _bound(language: Language, text: Scalar) -> None:
    """Refuse what is too long or too deep to be meant, before any parser sees it."""
    if len(text.text) > language.max_length:
        message = f"{len(text.text)} characters are too many for one {language.noun}; at most {language.max_length}"
        raise fail(message, text.span)
    depth = 0
    for at, character in enumerate(text.text):
        depth += (character == "(") - (character == ")")
        if depth > MAX_NESTING:
            raise fail(f"brackets nested more than {MAX_NESTING} deep", text.part(at, at + 1))
    if language.nests and sum(map(text.text.count, "+-*/")) > MAX_OPERATORS:
        raise fail(f"more than {MAX_OPERATORS} operators in one {language.noun}", text.span)
    if number := re.search(rf"[0-9]{{{MAX_DIGITS + 1},}}", text.text):
        raise fail(f"a number of {len(number[0])} digits; at most {MAX_DIGITS} can be meant", text.part(*number.span()))


@cache
def _parser(grammar: str) -> lark.Lark:
    starts = [language.start for language in _LANGUAGES if language.grammar == grammar]
    path = str(grammar_path(f"{grammar}.lark"))
    return lark.Lark.open(path, parser="lalr", start=starts, propagate_positions=True, maybe_placeholders=False)
