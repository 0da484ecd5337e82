"""Elementary functions against a library's, and arithmetic over arrays against Python's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tensorpeft.language.errors import SpecError
from tensorpeft.language.grammar import parse_arithmetic
from tensorpeft.language.nodes import Scalar
from tensorpeft.language.source import Source, Span
from tensorpeft.language.syntax import FUNCTIONS, Expression
from tensorpeft.numerics import elementary
from tensorpeft.numerics.arrays import evaluate

GENERATOR = np.random.default_rng(0)


def test_they_have_fifteen_digits() -> None:
    wide, narrow = GENERATOR.uniform(-3e5, 3e5, 100_000), GENERATOR.uniform(-700, 700, 100_000)
    np.testing.assert_allclose(elementary.sin(wide), np.sin(wide), atol=3e-16)
    np.testing.assert_allclose(elementary.cos(wide), np.cos(wide), atol=3e-16)
    np.testing.assert_allclose(elementary.exp(narrow), np.exp(narrow), rtol=4e-16)
    positive = GENERATOR.uniform(0, 100, 100_000)
    np.testing.assert_allclose(elementary.log(positive), np.log(positive), rtol=1e-15, atol=1e-16)
    for exponent in (-3, 0, 0.5, 2, 7, 1.7, -0.3):
        np.testing.assert_allclose(elementary.power(positive, np.array(exponent)), positive**exponent, rtol=1e-14)


def test_their_ends() -> None:
    assert elementary.exp(np.array([-np.inf, -800.0, 0.0, 800.0])).tolist() == [5e-324, 5e-324, 1.0, np.inf]
    assert elementary.cos(np.array([0.0])).tolist() == [1.0]
    assert elementary.sin(np.array([0.0])).tolist() == [0.0]
    with np.errstate(invalid="ignore"):
        assert elementary.power(np.array([0.0, 4.0]), np.array([1.5, 1.5])) == pytest.approx([0.0, 8.0])
        assert np.isnan(elementary.power(np.array([-1.0, 0.0]), np.array([1.5, -0.25]))).all()


def expression(text: str) -> Expression:
    span = Span(Source("test", text), 0, len(text))
    return parse_arithmetic(Scalar(text, text, span, span))


TEXTS = [
    "a + 2 * b - 3",
    "(a - 4) / (b + 1)",
    "min(a, b, 3) ** 2 + max(a, 2)",
    "mod(a - 5, 3) + mod(b, 2)",
    "gcd(a + 12, 18)",
    "floor(a / 2) + ceil(b / 3) + sqrt(b)",
    "equal(a, b) + 2 * less(a, b)",
    "exp(-a) * cos(pi * b / 3) + sin(a * b)",
    "2 ** a ** 0.5",
    "n * a",
]


@pytest.mark.parametrize("text", TEXTS)
def test_arrays_have_the_values_of_numbers(text: str) -> None:
    a, b = np.arange(7)[:, None], np.arange(5)[None, :]
    found = evaluate(expression(text), {"a": a, "b": b}, {"n": 5.0})
    known = {**FUNCTIONS, "pi": math.pi, "n": 5.0}
    expected = [[eval(text, {"__builtins__": {}}, {**known, "a": i, "b": j}) for j in range(5)] for i in range(7)]
    assert found.shape == (7, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-14, atol=1e-15)


def test_names_without_a_meaning() -> None:
    with pytest.raises(SpecError, match=r"unknown name `alpa`; did you mean `alpha`\?"):
        evaluate(expression("alpa + 1"), {}, {"alpha": 1.0})
    with pytest.raises(SpecError, match=r"`1 / a` has no finite value at some index"):
        evaluate(expression("1 / a"), {"a": np.arange(3)}, {})
