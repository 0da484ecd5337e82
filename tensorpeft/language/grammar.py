"""The small languages inside a spec, each read into the nodes of ``syntax``; every node's span lies in the text's file."""

from __future__ import annotations

import math
from collections import Counter

import lark

from tensorpeft.language import parsing
from tensorpeft.language.errors import clip, fail, listing, unknown
from tensorpeft.language.keywords import DECOMPOSITIONS
from tensorpeft.language.nodes import Scalar
from tensorpeft.language.parsing import Tree, parse
from tensorpeft.language.source import Span
from tensorpeft.language.spec import BASE_WEIGHT
from tensorpeft.language.syntax import (
    Call,
    Definition,
    Expression,
    Initialiser,
    Name,
    Number,
    Operation,
    Part,
    Product,
    Reference,
    Selector,
    Spectral,
    Update,
)

MAX_NAME = 64  # characters, of a factor or a mode
MAX_LAYER = 65535
MAX_LAYERS = 1024  # that one selector names

_OPERATORS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/", "raise": "**"}


def parse_update(text: Scalar) -> Update:
    """Sums and differences of products of factors; raises SpecError at the first thing that does not fit.

    >>> from tensorpeft.language.nodes import literal
    >>> [(product.sign, str(product)) for product in parse_update(literal("B[d_out, r] * A[r, d_in] - v[d_in]")).products]
    [(1, 'B[d_out, r] * A[r, d_in]'), (-1, 'v[d_in]')]
    """
    tree = parse(parsing.UPDATE, text)
    sign, products = 1, []
    for child in tree.children:
        if isinstance(child, lark.Token):
            sign = -1 if child == "-" else 1
        else:
            references = tuple(_reference(node, text) for node in child.children)
            products.append(Product(references, sign, span=_span(child, text)))
    return checked_update(Update(tuple(products), text.span))


def checked_update(update: Update, noun: str = "update") -> Update:
    """An update, if its text is not too long to be read again."""
    length = max((len(str(entry)) for entry in update.entries.values()), default=0)
    if length > parsing.MAX_UPDATE:
        message = f"{length} characters are too many for one {noun}; at most {parsing.MAX_UPDATE}"
        raise fail(message, update.span)
    return update


def parse_reference(text: Scalar) -> Reference:
    """A factor with the modes behind it: ``B[d_out]``."""
    return _reference(parse(parsing.REFERENCE, text), text)


def parse_definition(text: Scalar) -> Definition:
    """A mode as a product of parts; a mode's name alone is a definition without parts.

    >>> from tensorpeft.language.nodes import literal
    >>> [str(part) for part in parse_definition(literal("d_out = i1(2 * 4) * i2")).parts]
    ['i1(2 * 4)', 'i2']
    """
    name, *parts = parse(parsing.DEFINITION, text).children
    return Definition(str(name), tuple(_part(node, text) for node in parts), text.span)


def parse_init(text: Scalar) -> Initialiser:
    """An initialiser."""
    tree = parse(parsing.INIT, text)
    return _spectral(tree, text) if tree.data == "spectral" else _call(tree, text)


def parse_call(text: Scalar) -> Call:
    """A mask rule."""
    return _call(parse(parsing.CALL, text), text)


def parse_arithmetic(text: Scalar) -> Expression:
    """A number, or an expression over sizes; YAML numbers are numbers already.

    >>> from tensorpeft.language.nodes import literal
    >>> parse_arithmetic(literal("-2 ** 2 + d_in / r")).evaluate({"d_in": 64, "r": 8})
    4.0
    """
    if isinstance(text.value, int | float):
        return Number(text.value, text.span)
    return _expression(parse(parsing.ARITHMETIC, text), text)


def parse_selector(text: Scalar) -> Selector:
    """The matrices and layers that an entry is for; ``*`` is every matrix.

    >>> from tensorpeft.language.nodes import literal
    >>> found = parse_selector(literal("query, value layers 0-3, 7"))
    >>> found.matrices, found.layers
    (('query', 'value'), (0, 1, 2, 3, 7))
    """
    found: dict[str, Tree] = {tree.data: tree for tree in parse(parsing.SELECTOR, text).children}
    names = [str(name) for name in found["names"].children] if "names" in found else []
    runs = [_layers(node, text) for node in found["layers"].children] if "layers" in found else []
    if sum(map(len, runs)) > MAX_LAYERS:
        raise fail(f"more than {MAX_LAYERS} layers are named at once", text.span)
    layers = [layer for run in runs for layer in run]
    for entry, count in Counter([*names, *layers]).items():
        if count > 1:
            raise fail(f"{'layer ' * isinstance(entry, int)}`{entry}` is named twice", text.span)
    return Selector(() if "*" in names else tuple(names), tuple(sorted(layers)) if layers else None, text.span)


def _span(tree: Tree, text: Scalar) -> Span:
    return text.part(tree.meta.start_pos, tree.meta.end_pos)


def _token_span(token: lark.Token, text: Scalar) -> Span:
    return text.part(token.start_pos or 0, token.end_pos or 0)


def _reference(tree: Tree, text: Scalar) -> Reference:
    factor, *modes = tree.children
    for name in tree.children:
        if len(name) > MAX_NAME:
            raise fail(f"a name of {len(name)} characters; at most {MAX_NAME}", _token_span(name, text))
    return Reference(str(factor), tuple(map(str, modes)), _span(tree, text))


def _part(tree: Tree, text: Scalar) -> Part:
    name, *size = tree.children
    return Part(str(name), _expression(size[0], text) if size else None, _span(tree, text))


def _call(tree: Tree, text: Scalar) -> Call:
    name, *arguments = tree.children
    args: list[Expression] = []
    options: dict[str, Expression] = {}
    for node in arguments:
        if node.data != "option":
            if options:
                raise fail("a value without a name stands before the named ones", _span(node, text))
            args.append(_expression(node, text))
            continue
        key, value = node.children
        if key in options:
            raise fail(f"`{key}` is given twice", _token_span(key, text))
        options[str(key)] = _expression(value, text)
    return Call(str(name), tuple(args), tuple(options.items()), _span(tree, text))


def _spectral(tree: Tree, text: Scalar) -> Spectral:
    call, part, kept, *power = tree.children
    said = _call(call, text)
    parts = DECOMPOSITIONS.get(said.name)
    if parts is None:
        raise fail(unknown("decomposition", said.name, DECOMPOSITIONS), said.span)
    if said.args != (Name(BASE_WEIGHT),) or said.options:
        raise fail(f"`{said}` is no decomposition of the base weight; expected `{said.name}({BASE_WEIGHT})`", said.span)
    if part not in parts:
        raise fail(f"`{said}` has no part `{part}`; it has {listing(parts)}", _token_span(part, text))
    exponent = _power(said.name, power[0], text) if power else Number(0)
    return Spectral(said.name, str(part), str(kept.children[0]), kept.data == "last", exponent, text.span)


def _power(decomposition: str, tree: Tree, text: Scalar) -> Number:
    """The power of the singular values that a part is multiplied by."""
    name, *exponent = tree.children
    if name != "S" or "S" not in DECOMPOSITIONS[decomposition]:
        message = f"`{decomposition}({BASE_WEIGHT})` is multiplied by `{name}`"
        has = "S" in DECOMPOSITIONS[decomposition]
        ways = "expected `S`, the singular values" if has else "it has no singular values"
        raise fail(f"{message}; {ways}", _token_span(name, text))
    if not exponent:
        return Number(1)
    power = _expression(exponent[0], text)
    if power.names:
        raise fail(f"`{power}` is not a number; names mean nothing here", power.span)
    return Number(power.evaluate({}), power.span)


def _layers(tree: Tree, text: Scalar) -> range:
    """The layers of ``4`` or ``0-3``."""
    first, last = (int(token) for token in (tree.children[0], tree.children[-1]))
    if first > last:
        raise fail(f"`{first}-{last}` runs backwards; expected `{last}-{first}`", _span(tree, text))
    if last > MAX_LAYER:
        raise fail(f"layer `{last}` is beyond every model; at most {MAX_LAYER}", _span(tree, text))
    return range(first, last + 1)


def _expression(tree: Tree, text: Scalar) -> Expression:
    rule, children, span = tree.data, tree.children, _span(tree, text)
    if rule == "number":
        value = int(children[0]) if children[0].isdigit() else float(children[0])
        if math.isfinite(value):
            return Number(value, span)
        raise fail(f"`{clip(children[0])}` is too large for a number", span)
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
