"""The small languages: what is printed parses back, and what is not in the language is told in its own words."""

from __future__ import annotations

import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tensorpeft.language import grammar
from tensorpeft.language.errors import SpecError
from tensorpeft.language.nodes import literal
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
    Spectral,
    Update,
)

names = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,6}", fullmatch=True)
numbers = st.one_of(st.integers(-(10**15), 10**15), st.floats(allow_nan=False, allow_infinity=False)).map(Number)


def _larger(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    operations = st.builds(Operation, st.sampled_from(["+", "-", "*", "/", "**"]), inner, inner)
    return operations | st.builds(Call, st.sampled_from(["sqrt", "ceil"]), st.tuples(inner))


expressions = st.recursive(numbers | names.map(Name), _larger, max_leaves=8)


@given(expressions)
@example(Operation("**", Number(-0.0), Number(0)))  # the sign of a zero is a sign
def test_arithmetic_parses_back(expression: Expression) -> None:
    assert grammar.parse_arithmetic(literal(str(expression))) == expression


references = st.builds(Reference, names, st.lists(names, max_size=4).map(tuple))
products = st.builds(Product, st.lists(references, min_size=1, max_size=4).map(tuple), st.sampled_from([1, -1]))


@given(st.lists(products, min_size=1, max_size=3))
def test_updates_parse_back(terms: list[Product]) -> None:
    update = Update(tuple(terms))
    assert grammar.parse_update(literal(str(update))) == update


@given(names, st.lists(st.builds(Part, names, st.none() | expressions), min_size=1, max_size=3))
def test_definitions_parse_back(name: str, parts: list[Part]) -> None:
    definition = Definition(name, tuple(parts))
    assert grammar.parse_definition(literal(str(definition))) == definition


@given(names, st.lists(expressions, max_size=2), st.dictionaries(names, expressions, max_size=2))
def test_calls_parse_back(name: str, args: list[Expression], options: dict[str, Expression]) -> None:
    call = Call(name, tuple(args), tuple(options.items()))
    assert grammar.parse_call(literal(str(call))) == call


spectral = st.sampled_from([("svd", "U"), ("svd", "V"), ("svd", "S"), ("qr", "Q"), ("qr", "R")])


@given(spectral, names, st.booleans(), numbers)
def test_decompositions_parse_back(kind: tuple[str, str], bond: str, last: bool, power: Number) -> None:
    init = Spectral(*kind, bond, last, power if kind[0] == "svd" else Number(0))
    assert grammar.parse_init(literal(str(init))) == init


VALUES = {
    "2 + 3 * 4": 14,
    "(2 + 3) * 4": 20,
    "2 ** 3 ** 2": 512,
    "-2 ** 2": -4,
    "(-2) ** 2": 4,
    "2 ** -1": 0.5,
    "8 - 4 - 2": 2,
    "64 / 4 / 2": 8,
    "7 / 2": 3.5,
    "ceil(min(d_in, 768) / 7)": math.ceil(512 / 7),
    "max(1, 2, 3)": 3,
    "sqrt(d_in) * 1e-1": math.sqrt(512) * 0.1,
    "-d_in": -512,
    "gcd(d_in, 768)": 256,
    "mod(-7, 3) + mod(d_in, 7)": 2 + 512 % 7,
    "equal(d_in, 2 ** 9) - equal(1, 2)": 1,
    "less(1, 2) + less(2, 2)": 1,
    "2 * cos(pi / 3)": 1,
    "sin(pi / 6) * exp(0)": 0.5,
}


@pytest.mark.parametrize(("text", "value"), VALUES.items())
def test_arithmetic_is_pythons(text: str, value: float) -> None:
    assert grammar.parse_arithmetic(literal(text)).evaluate({"d_in": 512}) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    "text",
    [
        "1 / 0",
        "sqrt(-1)",
        "(-1) ** 0.5",
        "10 ** 400",
        "1e308 * 10",
        "ceil(1e308 * 1e308)",
        "gcd(1.5, 2)",
        "mod(3, 0)",
        "exp(1000)",
    ],
)
def test_arithmetic_without_a_finite_value_is_a_located_error(text: str) -> None:
    expression = grammar.parse_arithmetic(literal(text))
    with pytest.raises(SpecError) as caught:
        expression.evaluate({})
    assert all(problem.span for problem in caught.value.problems)


def test_every_node_knows_its_place() -> None:
    text = "b[layer, d_out] * B[d_out, r] - A[r, d_in]"
    update = grammar.parse_update(literal(text))
    written = [
        text[reference.span.start : reference.span.end]
        for product in update.products
        for reference in product.factors
        if reference.span
    ]
    assert written == ["b[layer, d_out]", "B[d_out, r]", "A[r, d_in]"]
    assert [product.sign for product in update.products] == [1, -1]


def test_what_is_wrong_with_an_argument_is_told_at_its_own_place() -> None:
    with pytest.raises(SpecError) as refusal:
        grammar.parse_arithmetic(literal("gcd(width, 4)")).evaluate({"text_width": 8})
    (problem,) = refusal.value.problems
    assert problem.message == "unknown name `width` in arithmetic; did you mean `text_width`?"
    assert problem.span is not None
    assert (problem.span.start, problem.span.end) == (4, 9)
