"""How updates start: against a descent along random gradients, and as `start: subtract` writes them out."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorpeft.language.checks.start import dead_factors, nonzero_products
from tensorpeft.language.grammar import parse_init
from tensorpeft.language.loader import load_spec
from tensorpeft.language.nodes import literal
from tensorpeft.language.spec import FactorRule, Spec, Target
from tensorpeft.language.syntax import Call, Name, Product, Reference, Update

HEAD = "tensorpeft: 1\ntarget: {matrices: [query]}\n"
FACTORS = "abcde"


def spec_of(products: list[str], zero: str, frozen: str) -> Spec:
    """Products of scalars, each factor named by a letter."""
    rules = ((name, FactorRule(Call("zeros" if name in zero else "ones"), name in frozen)) for name in FACTORS)
    update = Update(tuple(Product(tuple(Reference(name, ()) for name in product)) for product in products))
    return Spec("scalars", Target(("query",)), update, tuple(rules))


def moved(products: list[str], zero: str, frozen: str) -> set[str]:
    """The factors that a descent along the gradients of a random loss has moved away from zero."""
    values = {name: 0.0 if name in zero else 1.0 + random.random() for name in FACTORS}
    weights = [1.0 + random.random() for _ in products]
    for _ in range(len(FACTORS) + 1):
        steps = dict.fromkeys(FACTORS, 0.0)
        for product, weight in zip(products, weights, strict=True):
            for place, name in enumerate(product):
                others = product[:place] + product[place + 1 :]
                gradient = weight
                for other in others:
                    gradient *= values[other]
                steps[name] += gradient
        for name in set(FACTORS) - set(frozen):
            values[name] += 1e-2 * steps[name]
    return {name for name, value in values.items() if value}


products = st.text(FACTORS, min_size=1, max_size=4)
some = st.sets(st.sampled_from(FACTORS)).map("".join)


@settings(deadline=None)
@given(st.lists(products, min_size=1, max_size=5), some, some)
def test_dead_factors_are_those_that_no_descent_moves(products: list[str], zero: str, frozen: str) -> None:
    carried = set("".join(products))
    dead = dead_factors(spec_of(products, zero, frozen)) & carried
    assert dead == carried - moved(products, zero, frozen)


@settings(deadline=None)
@given(st.lists(products, min_size=1, max_size=5), some)
def test_products_without_a_zero_factor_are_not_zero(products: list[str], zero: str) -> None:
    found = {str(product) for product in nonzero_products(spec_of(products, zero, ""))}
    assert found == {" * ".join(product) for product in products if not set(product) & set(zero)}


NUMBERS = {  # factor -> its init and its modes; the bond m is as large as d_out
    "u": ("ones", ("layer", "d_out")),
    "t": ("ones", ("m",)),
    "E": ("identity", ("layer", "d_out", "m")),
    "B": ("uniform(1)", ("d_out", "d_in")),
    "C": ("start(B)", ("d_out", "d_in")),
    "M": ("identity", ("d_out", "d_in")),
    "W": ("", ("d_out", "d_in")),
}
WAYS = [*NUMBERS.values(), ("", ("m", "d_in")), ("", ("layer", "m", "d_out")), ("", ("m",)), ("", ("layer", "m"))]


def starting_values(factor: str) -> np.ndarray:
    """A factor's numbers at one site; of sizes 3 for the output and the bond, 4 for the input."""
    init, modes = NUMBERS[factor]
    shape = [{"d_out": 3, "m": 3, "d_in": 4}[mode] for mode in modes if mode != "layer"]
    if init in ("ones", "identity"):
        return np.ones(shape) if init == "ones" else np.eye(*shape)
    return np.random.default_rng(7 if factor == "W" else 8).normal(size=shape)


def value(product: Product) -> np.ndarray:
    letters = {"d_out": "o", "d_in": "i", "m": "m"}
    inputs = ["".join(letters[mode] for mode in ref.modes if mode != "layer") for ref in product.factors]
    values = [starting_values(ref.factor) for ref in product.factors]
    ones = [np.ones(size) for size in (3, 4)]  # whatever is not carried is the same everywhere
    return product.sign * np.einsum(f"{','.join([*inputs, 'o', 'i'])}->oi", *values, *ones)


@st.composite
def mentions(draw: st.DrawFn) -> Reference:
    factor = draw(st.sampled_from(list(NUMBERS)))
    _, modes = NUMBERS[factor]
    ways = [
        other
        for _, other in WAYS
        if len(other) == len(modes) and [m == "layer" for m in other] == [m == "layer" for m in modes]
    ]
    sized = [other for other in ways if [m == "d_in" for m in other] == [m == "d_in" for m in modes]]
    return Reference(factor, draw(st.sampled_from(sized)))


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.tuples(st.lists(mentions(), min_size=1, max_size=3), st.sampled_from([1, -1])), min_size=1, max_size=4)
)
def test_what_counts_as_zero_is_zero(terms: list[tuple[list[Reference], int]]) -> None:
    update = Update(tuple(Product(tuple(factors), sign) for factors, sign in terms))
    text = {name: init for name, (init, _) in NUMBERS.items() if init}
    rules = tuple((name, FactorRule(parse_init(literal(init)))) for name, init in text.items())
    spec = Spec("numbers", Target(("query",)), update, rules, ranks=(("m", Name("d_out")),))
    moving = nonzero_products(spec)
    rest = [value(product) for product in update.products if product not in moving]
    assert np.allclose(sum(rest, np.zeros((3, 4))), 0)


CANCELLING = {
    "R[matrix, layer, d_out, m] * W[m, d_in] - W[d_out, d_in]": "m: d_out",
    "W[d_out, m] * R[matrix, layer, m, n] * R[matrix, layer, n, d_in] - W[d_out, d_in]": "m: d_in, n: m",
    "v[matrix, layer, d_out] * W[d_out, d_in] - W[d_out, d_in]": "",
    "v[matrix, layer, d_out] * v[matrix, layer, m] * R[matrix, layer, d_out, m] * W[m, d_in] - W[d_out, d_in]": "m: d_out",
    "R[matrix, layer, p, o, a] * W[x, d_in] - W[d_out, d_in]": "a: 4",
}
BLOCKS = "modes: [d_out = p * o(4), x = p * a]\n"


@pytest.mark.parametrize(("update", "ranks"), CANCELLING.items())
def test_ones_and_identities_change_nothing(update: str, ranks: str) -> None:
    factors = {"R": "{init: identity}", "v": "{init: ones}"}
    said = ", ".join(f"{name}: {rule}" for name, rule in factors.items() if f"{name}[" in update)
    sizes = f"rank: {{{ranks}}}\n" if ranks else ""
    blocks = BLOCKS if "[x" in update else ""
    assert nonzero_products(load_spec(f"{HEAD}{blocks}update: {update}\n{sizes}factors: {{{said}}}\n")) == []


NOLA = """
rank: {r: 4, m: 6}
update: >-
  a[matrix, layer, m] * Am[m, r, d_in] * b[matrix, layer, m2] * Bm[m2, d_out, r]
  + b[matrix, layer, m2] * Bm[m2, d_out, r] * A0[matrix, layer, r, d_in]
factors:
  {a: {init: zeros}, b: {init: zeros}, Am: {frozen: true}, Bm: {frozen: true}, A0: {frozen: true}}
""".replace("m: 6", "m: 6, m2: 6")


def test_a_zero_factor_may_be_brought_to_life_by_another() -> None:
    assert dead_factors(load_spec(HEAD + NOLA)) == set()


SUBTRACTED = {
    "a pair": (
        "update: B[layer, d_out, r] * A[layer, r, d_in]\nrank: 4",
        "B[layer, d_out, r] * A[layer, r, d_in] - B0[layer, d_out, r] * A0[layer, r, d_in]",
        {"B0": "start(B)", "A0": "start(A)"},
    ),
    "a frozen factor": (
        "update: B[layer, d_out, r] * A[r, d_in]\nrank: 4\nfrozen: [A]",
        "B[layer, d_out, r] * A[r, d_in] - B0[layer, d_out, r] * A[r, d_in]",
        {"B0": "start(B)"},
    ),
    "a difference": (
        "update: -W[d_out, d_in] * v[layer, d_out]\nfactors: {v: {init: ones}}",
        "- W[d_out, d_in] * v[layer, d_out] + W[d_out, d_in] * v0[layer, d_out]",
        {"v0": "start(v)"},
    ),
    "one product of two": (
        "update: B[d_out, r] * A[r, d_in] + C[d_out, r] * A[r, d_in]\nrank: 4\nfactors: {C: {init: zeros}}",
        "B[d_out, r] * A[r, d_in] + C[d_out, r] * A[r, d_in] - B0[d_out, r] * A0[r, d_in]",
        {"B0": "start(B)", "A0": "start(A)", "C": "zeros"},
    ),
    "a name that is taken": (
        "update: A[d_out, r] * A0[r, d_in]\nrank: 4",
        "A[d_out, r] * A0[r, d_in] - A00[d_out, r] * A000[r, d_in]",
        {"A00": "start(A)", "A000": "start(A0)"},
    ),
    "a factor twice": (
        "update: u[layer, d_out] * u[layer, m] * W[m, d_in]\nrank: {m: d_out}",
        "u[layer, d_out] * u[layer, m] * W[m, d_in] - u0[layer, d_out] * u0[layer, m] * W[m, d_in]",
        {"u0": "start(u)"},
    ),
    "two entries": (
        "update: {key: 'u[layer, d_out] * W[d_out, d_in]', value: 'v[layer, d_in] * W[d_out, d_in]'}",
        "{key: u[layer, d_out] * W[d_out, d_in] - u0[layer, d_out] * W[d_out, d_in]; "
        "value: v[layer, d_in] * W[d_out, d_in] - v0[layer, d_in] * W[d_out, d_in]}",
        {"u0": "start(u)", "v0": "start(v)"},
    ),
}


@pytest.mark.parametrize(("text", "update", "inits"), SUBTRACTED.values(), ids=SUBTRACTED)
def test_subtract_is_written_out(text: str, update: str, inits: dict[str, str]) -> None:
    spec = load_spec(f"{HEAD}{text}\nstart: subtract\n")
    assert str(spec.update) == update
    assert inits.items() <= {name: str(rule.init) for name, rule in spec.factors}.items()
    assert all(rule.frozen for name, rule in spec.factors if str(rule.init).startswith("start"))
    assert spec.start == "zero"
    assert nonzero_products(spec) == []
    assert load_spec(str(spec)) == spec


def test_copies_of_what_comes_from_the_weight_are_stored() -> None:
    text = "structure: matrix\nrank: 4\nfactors: {B: {init: 'svd(W).U[:r]'}, A: {init: ones}}\nstart: subtract\n"
    rules = dict(load_spec(HEAD + text).factors)
    assert [name for name, rule in rules.items() if rule.stored] == ["B0"]
    frozen = load_spec(HEAD + text.replace("[:r]'", "[:r]', frozen: true")).factor("B")
    assert frozen.stored


def test_what_does_not_cancel_is_refused() -> None:
    text = "update: B[d_out, r] * A[r, d_in] - B0[d_out, r] * A[r, d_in]\nrank: 4\nfactors: {B0: {init: %s, frozen: true}}\n"
    assert load_spec(HEAD + text % "start(B)").start == "zero"
    for wrong in ("kaiming_uniform(a=sqrt(5))", "ones"):
        with pytest.raises(ValueError, match="does not start at zero"):
            load_spec(HEAD + text % wrong)
    with pytest.raises(ValueError, match="does not start at zero"):
        load_spec(HEAD + text.replace(" - ", " + ") % "start(B)")
