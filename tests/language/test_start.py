"""How updates start: against a descent along random gradients, and as `start: subtract` writes them out."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorpeft.language.load import load_spec
from tensorpeft.language.spec import FactorRule, Spec, Target
from tensorpeft.language.start import dead_factors, nonzero_products
from tensorpeft.language.syntax import Call, Product, Reference, Update
from tensorpeft.language.text import spec_text

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
    assert load_spec(spec_text(spec)) == spec


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
