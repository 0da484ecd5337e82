"""The small languages inside a spec, each read by lark into the nodes of ``syntax``.

The grammars are the files ``grammars/*.lark``. A parser is built at its first use and kept. Every node's span lies in
the file that the text came from.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import lark

from tensorpeft.language.catalogue import grammar_path
from tensorpeft.language.errors import clip, fail
from tensorpeft.language.nodes import Scalar
from tensorpeft.language.source import Span
from tensorpeft.language.syntax import (
    Call,
    Definition,
    Expression,
    Name,
    Number,
    Operation,
    Part,
    Product,
    Reference,
    Update,
)

MAX_DIGITS = 20
MAX_NESTING = 16
MAX_OPERATORS = 64  # in arithmetic, where they nest


@dataclass(frozen=True)
class _Language:
    """One of the small languages: its grammar file, where it starts, and how long a text of it may be."""

    grammar: str
    start: str
    noun: str
    max_length: int
    nests: bool = True  # operators nest, so their number is bounded as well


_UPDATE = _Language("update", "update", "update", 8192, nests=False)
_REFERENCE = _Language("update", "reference", "factor with its mode", 256)
_DEFINITION = _Language("modes", "definition", "mode", 512)
_CALL = _Language("call", "call", "initialiser or mask rule", 2048)
_ARITHMETIC = _Language("arithmetic", "sum", "number or expression", 512)
_Tree = Any  # lark.Tree, whose children mypy cannot tell apart
_LANGUAGES = (_UPDATE, _REFERENCE, _DEFINITION, _CALL, _ARITHMETIC)

_WORDS = {"$END": "the end", "FACTOR": "a factor name", "MODE": "a mode name", "NAME": "a name", "NUMBER": "a number"}
_OPERATORS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/", "raise": "**"}


def parse_update(text: Scalar) -> Update:
    """``b[matrix, layer, d_out] * B[d_out, r] - ...``; raises SpecError at the first thing that does not fit."""
    tree = _parse(_UPDATE, text)
    sign, products = 1, []
    for child in tree.children:
        if isinstance(child, lark.Token):
            sign = -1 if child == "-" else 1
        else:
            references = tuple(_reference(node, text) for node in child.children)
            products.append(Product(references, sign, span=_span(child, text)))
    return Update(tuple(products), text.span)


def parse_reference(text: Scalar) -> Reference:
    """A factor with the modes behind it: ``B[d_out]``."""
    return _reference(_parse(_REFERENCE, text), text)


def parse_definition(text: Scalar) -> Definition:
    """``slot = layer * matrix``; a mode's name alone is a definition without parts."""
    name, *parts = _parse(_DEFINITION, text).children
    return Definition(str(name), tuple(_part(node, text) for node in parts), text.span)


def parse_call(text: Scalar) -> Call:
    """An initialiser or a mask rule."""
    return _call(_parse(_CALL, text), text)


def parse_arithmetic(text: Scalar) -> Expression:
    """A number, or an expression over sizes; YAML numbers are numbers already."""
    if isinstance(text.value, int | float):
        return Number(text.value, text.span)
    return _expression(_parse(_ARITHMETIC, text), text)


@cache
def _parser(grammar: str) -> lark.Lark:
    starts = [language.start for language in _LANGUAGES if language.grammar == grammar]
    path = str(grammar_path(f"{grammar}.lark"))
    return lark.Lark.open(path, parser="lalr", start=starts, propagate_positions=True, maybe_placeholders=False)


def _parse(language: _Language, text: Scalar) -> _Tree:
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
    raise fail(f"found {found}, expected {_expected(parser, language, text.text, start)}", text.part(start, end))


def _expected(parser: lark.Lark, language: _Language, text: str, end: int) -> str:
    """What could stand at ``end``, where the text stops making sense, in words."""
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


def _bound(language: _Language, text: Scalar) -> None:
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


def _span(tree: _Tree, text: Scalar) -> Span:
    return text.part(tree.meta.start_pos, tree.meta.end_pos)


def _token_span(token: lark.Token, text: Scalar) -> Span:
    return text.part(token.start_pos or 0, token.end_pos or 0)


def _reference(tree: _Tree, text: Scalar) -> Reference:
    factor, *modes = tree.children
    return Reference(str(factor), tuple(map(str, modes)), _span(tree, text))


def _part(tree: _Tree, text: Scalar) -> Part:
    name, *size = tree.children
    return Part(str(name), _expression(size[0], text) if size else None, _span(tree, text))


def _call(tree: _Tree, text: Scalar) -> Call:
    name, *arguments = tree.children
    args: list[Expression] = []
    options: dict[str, Expression] = {}
    for node in arguments:
        if _rule(node) != "option":
            if options:
                raise fail("a value without a name stands before the named ones", _span(node, text))
            args.append(_expression(node, text))
            continue
        key, value = node.children
        if key in options:
            raise fail(f"`{key}` is given twice", _token_span(key, text))
        options[str(key)] = _expression(value, text)
    return Call(str(name), tuple(args), tuple(options.items()), _span(tree, text))


def _rule(tree: _Tree) -> str:
    """A rule's name; imported rules carry the name of their file in front."""
    return str(tree.data).rsplit("__", 1)[-1]


def _expression(tree: _Tree, text: Scalar) -> Expression:
    rule, children, span = _rule(tree), tree.children, _span(tree, text)
    if rule == "number":
        return _number(children[0], span)
    if rule == "name":
        return Name(str(children[0]), span)
    if rule == "function":
        return Call(str(children[0]), tuple(_expression(child, text) for child in children[1:]), (), span)
    operands = [_expression(child, text) for child in children]
    if rule != "negate":
        return Operation(_OPERATORS[rule], operands[0], operands[1], span)
    if isinstance(operands[0], Number):
        return Number(-operands[0].value, span)
    return Operation("-", Number(0, span), operands[0], span)


def _number(token: lark.Token, span: Span) -> Number:
    value = int(token) if token.isdigit() else float(token)
    if not math.isfinite(value):
        raise fail(f"`{clip(token)}` is too large for a number", span)
    return Number(value, span)
