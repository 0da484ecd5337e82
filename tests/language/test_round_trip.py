"""Random specs of every word of the language: what is read is printed, and what is printed reads as the same spec."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tensorpeft.language.loader import load_spec

PRODUCTS = {  # product -> the factor that starts at zero, its bonds, the modes it needs
    "B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]": ("B", "r", ()),
    "W[d_out, d_in] * u[matrix, layer, d_out]": ("u", "", ()),
    "V[d_out, k] * V[m, k] * g[layer, k] * W[m, d_in]": ("g", "km", ()),
    "D[task, matrix, layer, d_out, d_in]": ("D", "", ()),
    "K[slot, o1, i1, r] * L[o2, j1, j2, r]": ("K", "r", (0, 1, 2, 3)),
    "T1[layer, d_out, s] * T2[i1, t] * T3[i2, t]": ("T1", "t", (1, 4)),
}
MODES = ["d_out = o1(8) * o2", "d_in = i1 * i2", "i2 = j1 * j2", "slot = layer * matrix", "s = i2 * t"]
RANKS = {"r": ["8", "ceil(d_in / 7)"], "k": ["2"], "m": ["d_in"], "t": ["gcd(d_in, 12)", "max(1, mod(d_out, 5))"]}
SELECTORS = ["*", "query", "value, key", "layers 0-3", "mlp.* layers 2, 5-7", "7*, [ab]?"]  # none hides one before it
INITS = ["kaiming_uniform", "normal(1 / sqrt(d_in + d_out))", "uniform(0.5)", "ones", "constant(-2)", "xavier_uniform"]
OF_A = [
    "svd(W).V[:r]",
    "svd(W).V[-r:] * S ** (1 / 2)",
    "qr(W).R[:r]",
    "orthogonal",
    "formula(cos(2 * pi * r / size(d_in)))",
]
RULES = ["bernoulli(0.5, query=0.1)", "keep(3)", "top(0.25)", "sample(2)"]


@st.composite
def choices(draw: st.DrawFn, values: st.SearchStrategy[Any]) -> Any:
    """A value, or one for each of some selectors."""
    if draw(st.booleans()):
        return draw(values)
    chosen = draw(st.lists(st.sampled_from(SELECTORS), min_size=1, unique=True))
    return {selector: draw(values) for selector in sorted(chosen, key=SELECTORS.index)}


@st.composite
def updates(draw: st.DrawFn) -> str:
    products = draw(st.lists(st.sampled_from(list(PRODUCTS)), min_size=1, max_size=3, unique=True))
    signs = [draw(st.sampled_from("+-")) for _ in products]
    return " ".join(f"{sign} {product}" for sign, product in zip(signs, products, strict=True)).removeprefix("+ ")


@st.composite
def plain_specs(draw: st.DrawFn) -> dict[str, Any]:
    """A spec as plain YAML values, sound by itself."""
    update = draw(choices(updates()))
    text = update if isinstance(update, str) else " ".join(update.values())
    used = [product for product in PRODUCTS if product in text]
    spec: dict[str, Any] = {"tensorpeft": 1, "target": {"matrices": ["query", "mlp.*"]}, "update": update}
    if modes := sorted({mode for product in used for mode in PRODUCTS[product][2]}):
        spec["modes"] = [MODES[mode] for mode in modes]
    bonds = sorted({bond for product in used for bond in PRODUCTS[product][1]})
    sized = [bond for bond in bonds if bond == "m" or draw(st.booleans())]
    rank = {bond: draw(choices(st.sampled_from(RANKS[bond]))) for bond in sized}
    if len(sized) < len(bonds):
        rank["budget"] = draw(st.sampled_from([20000, "20k", "1.5M"]))
    if rank:
        spec["rank"] = rank
    names = sorted({piece.split("[")[0] for product in used for piece in product.split(" * ")} - {"W"})
    zeros = {PRODUCTS[product][0] for product in used}
    spec["factors"] = {name: draw(_rules(name, zeros)) for name in names}
    if "D[" in text:
        spec["tasks"] = draw(st.integers(1, 9))
    spec.update(draw(_rest(names, bonds)))
    return spec


@st.composite
def _rules(draw: st.DrawFn, name: str, zeros: set[str]) -> dict[str, Any]:
    if name in zeros:
        return {"init": "zeros"} | ({"lr": draw(st.sampled_from([16, 0.5]))} if draw(st.booleans()) else {})
    rule: dict[str, Any] = {"init": draw(st.sampled_from(INITS + OF_A * (name == "A")))}
    if draw(st.booleans()):
        rule["frozen"] = True
    return rule


@st.composite
def _rest(draw: st.DrawFn, names: list[str], bonds: list[str]) -> dict[str, Any]:
    """The keys that say more of an update: masks, scale, ragged sizes, dropout and what is trained beside it."""
    found: dict[str, Any] = {}
    if "B" in names and draw(st.booleans()):
        rules = st.sampled_from([*RULES, "where(mod(d_out, 2))"])
        found["mask"] = {"B[d_out]": draw(choices(rules)), "A[r, d_in]": draw(choices(st.sampled_from(RULES)))}
        if any(word in str(found["mask"]) for word in ("top", "sample")):
            found["scores"] = draw(st.sampled_from(["a.npz", "./my scores/é'\\.npz", "on"]))
    if draw(st.booleans()):
        found |= {"alpha": 16, "scale": draw(choices(st.sampled_from(["alpha / 2", "-alpha ** 2"])))}
    if draw(st.booleans()):
        found["ragged"] = draw(
            st.sampled_from(["slice", "error", {"d_out": "group"}, {"*": "slice", "d_in": "by_size"}])
        )
        found["ragged"] = found["ragged"] if not {"K", "T1", "D"} & {*names} and {"A", "u"} & {*names} else "slice"
    if draw(st.booleans()):
        found["dropout"] = draw(st.sampled_from([0.1, 0, {"x": 0.1} | dict.fromkeys(bonds, 0.25)]))
    if draw(st.booleans()):
        found["train"] = draw(st.lists(st.sampled_from(["biases", "norms", "head", "*.bias"]), min_size=1, unique=True))
    return found


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(plain_specs())
def test_text_and_spec_are_one(plain: dict[str, Any]) -> None:
    spec = load_spec(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
    text = str(spec)
    again = load_spec(text)
    assert again == spec
    assert str(again) == text
    printed = yaml.safe_load(text)  # other readers understand it too
    assert {*printed["factors"]} == {*plain["factors"]}
    assert printed.get("train") == plain.get("train")


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(plain_specs(), st.sampled_from(["subtract", "nonzero"]))
def test_a_start_that_is_not_zero(plain: dict[str, Any], start: str) -> None:
    plain["factors"] = {
        name: {key: value for key, value in rule.items() if key != "frozen"} | {"init": "ones"}
        for name, rule in plain["factors"].items()
    }
    spec = load_spec(yaml.safe_dump(plain | {"start": start}, sort_keys=False, allow_unicode=True))
    assert load_spec(str(spec)) == spec
    written = load_spec(yaml.safe_dump(plain | {"start": "nonzero"}, sort_keys=False, allow_unicode=True))
    if start == "subtract":
        assert spec.start == "zero"
        assert len(spec.update.products) == 2 * len(written.update.products)
        assert sum(product.sign for product in spec.update.products) == 0
        assert [rule.frozen for _, rule in spec.factors].count(True) == len(written.factors)
