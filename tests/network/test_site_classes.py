"""What differs from site to site: products, ranks, scales; and how a tensor serves sites of several sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tensorpeft.language.errors import SpecError
from tensorpeft.language.grammar import parse_update
from tensorpeft.language.loader import load_spec
from tensorpeft.language.nodes import Scalar
from tensorpeft.language.source import Source, Span
from tensorpeft.language.spec import FactorRule, Spec
from tensorpeft.language.syntax import EVERYWHERE, Call, Choice, Number, Product, Selector, Update
from tensorpeft.model.cards import model_shape
from tensorpeft.model.shape import Site
from tensorpeft.model.target import fits
from tensorpeft.network.lower import lower
from tensorpeft.network.network import Network

LLAMA = model_shape(
    {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 100,
    }
)
EMPTY = load_spec("tensorpeft: 1\ntarget: all-linear\nstructure: matrix\nrank: 2")


def span(text: str) -> Span:
    return Span(Source("test", text), 0, len(text))


def selector(names: str, layers: tuple[int, ...] | None = None) -> Selector:
    return Selector(tuple(names.split()), layers, span(names))


def products(entries: dict[Selector, str]) -> tuple[Product, ...]:
    found = []
    for at, text in entries.items():
        update = parse_update(Scalar(text, text, span(text), span(text)))
        found += [replace(product, at=at) for product in update.products]
    return tuple(found)


def spec_of(entries: dict[Selector, str], **fields: object) -> Spec:
    written = products(entries)
    names = dict.fromkeys(f.factor for product in written for f in product.factors if f.factor != "W")
    factors = tuple((name, FactorRule(Call("normal", (Number(1),)))) for name in names)
    return replace(EMPTY, update=Update(written, span("update")), factors=factors, **{"ranks": (), **fields})


def choice(**entries: int) -> Choice:
    return Choice(tuple((selector(name), Number(n)) for name, n in entries.items()), span("choice"))


def stored(network: Network) -> dict[str, tuple[int, ...]]:
    return {block.name: block.shape for block in network.blocks}


@pytest.mark.parametrize(
    ("at", "fitting"),
    [
        (EVERYWHERE, 21),
        (selector("query value"), 6),
        (selector("query", (0, 2)), 2),
        (selector("", (1,)), 7),
        (selector("mlp.*"), 9),
        (selector("v_proj"), 3),
        (selector("?p"), 3),
        (selector("nothing"), 0),
    ],
)
def test_what_a_selector_fits(at: Selector, fitting: int) -> None:
    inside = [site for site in LLAMA.sites if site.stack is not None]
    assert sum(fits(at, site) for site in inside) == fitting


def test_a_selector_of_layers_fits_nothing_outside_the_layers() -> None:
    head = Site("lm_head", "lm_head", 0, 100, 64)
    assert fits(selector("lm_head"), head)
    assert not fits(selector("", (0,)), head)


IA3 = {
    selector("key value"): "W[d_out, d_in] * u[matrix, layer, d_out]",
    selector("down"): "W[d_out, d_in] * v[layer, d_in]",
}


def test_a_factor_is_stored_for_the_sites_whose_products_have_it() -> None:
    spec = spec_of(IA3, target=replace(EMPTY.target, matrices=("key", "value", "down")))
    network = lower(spec, LLAMA)
    assert stored(network) == {"u": (2, 3, 32), "v": (3, 96)}
    assert [[o.factor for o in group.terms[0].operands] for group in network.groups] == [["W", "u"], ["W", "v"]]


def test_the_last_entry_that_fits_counts() -> None:
    entries = {
        EVERYWHERE: "A[layer, d_out] * B[d_in]",
        selector("query value"): "C[layer, d_out] * B[d_in]",
        selector("value", (1,)): "D[d_out] * B[d_in] - C[layer, d_out] * E[d_in]",
    }
    network = lower(spec_of(entries), LLAMA)
    used = {
        (site.matrix, site.layer): [[o.factor for o in term.operands] for term in group.terms]
        for group in network.groups
        for site in group.sites
    }
    assert used["key", 1] == [["A", "B"]]
    assert used["query", 1] == used["value", 0] == [["C", "B"]]
    assert used["value", 1] == [["D", "B"], ["C", "E"]]
    assert stored(network)["D"] == (32,)


def test_the_base_weight_tells_its_shape_and_is_not_stored() -> None:
    spec = spec_of(
        {EVERYWHERE: "W[d_out, d_in] * B[matrix, layer, d_out, r] * A[layer, r, d_in]"}, ranks=(("r", Number(2)),)
    )
    network = lower(replace(spec, target=replace(EMPTY.target, matrices=("query", "down"))), LLAMA)
    assert {block.factor for block in network.blocks} == {"A", "B"}
    for group in network.groups:
        (base, *others) = group.terms[0].operands
        assert base.is_base
        assert not any(operand.is_base for operand in others)
        assert base.block.shape == base.sizes == (group.sites[0].d_out, group.sites[0].d_in)
        assert (base.site_modes, set(base.keys), len(base.keys)) == ((), {()}, 3)


def test_the_base_weight_has_the_parts_of_its_sides_and_what_masks_leave() -> None:
    text = "tensorpeft: 1\ntarget: {matrices: [query]}\nupdate: A[d_out, d_in] * g[layer, head] * h[d_in]\n"
    text += "start: nonzero\nmask: {'h[d_in]': keep(5), 'g[head]': keep(3)}"
    spec = load_spec(text)
    ((first, *rest),) = [product.factors for product in spec.update.products]
    update = Update((replace(spec.update.products[0], factors=(replace(first, factor="W"), *rest)),))
    network = lower(replace(spec, update=update, factors=spec.factors[1:]), LLAMA)
    for group in network.groups:
        base = group.terms[0].operands[0]
        assert (base.modes, base.sizes) == (("head", "head_dim", "d_in"), (3, 8, 5))
        heads, features = group.terms[0].operands[1].block.kept[base_key(group)][0], base.take[1]
        assert [row // 8 for row in base.take[0]] == [head for head in heads for _ in range(8)]
        assert len(features) == 5


def base_key(group: object) -> tuple:
    return group.terms[0].operands[1].keys[0]


def test_ranks_and_scales_differ_from_site_to_site() -> None:
    spec = load_spec("tensorpeft: 1\ntarget: {matrices: [query, value, down]}\nstructure: matrix\nrank: 2")
    layers = Choice(
        (
            (EVERYWHERE, Number(8)),
            (selector("value"), Number(4)),
            (selector("", (0, 1)), Number(16)),
            (selector("value", (1,)), Number(2)),
        )
    )
    network = lower(replace(spec, ranks=(("r", layers),), scale=choice(query=1, value=2, down=3)), LLAMA)
    ranks = {(s.matrix, s.layer): g.terms[0].sizes["r"] for g in network.groups for s in g.sites}
    assert ranks == {
        ("query", 0): 16, ("query", 1): 16, ("query", 2): 8,
        ("value", 0): 16, ("value", 1): 2, ("value", 2): 4,
        ("down", 0): 16, ("down", 1): 16, ("down", 2): 8,
    }  # fmt: skip
    assert {s.matrix: g.scale for g in network.groups for s in g.sites} == {"query": 1, "value": 2, "down": 3}
    assert sum(block.count for block in network.blocks if block.factor == "A") == (
        (16 + 16 + 8 + 16 + 2 + 4) * 64 + (16 + 16 + 8) * 96
    )


def test_a_shared_factor_of_ragged_rank_is_sliced() -> None:
    entries = {EVERYWHERE: "B[matrix, layer, d_out, r] * A[r, d_in]"}
    fields = {"ranks": (("r", choice(query=4, key=2)),), "target": replace(EMPTY.target, matrices=("query", "key"))}
    apart = lower(spec_of(entries, **fields), LLAMA)
    assert stored(apart)["A_r4"] == (4, 64)
    assert stored(apart)["A_r2"] == (2, 64)
    sliced = lower(spec_of(entries, ragged=(("r", "slice"), ("*", "by_size")), **fields), LLAMA)
    assert stored(sliced) == {"B_d_out64_r4": (1, 3, 64, 4), "B_d_out32_r2": (1, 3, 32, 2), "A": (4, 64)}
    assert [group.terms[0].operands[1].take for group in sliced.groups] == [(None, None), (range(2), None)]


def test_grouped_heads_serve_their_neighbours() -> None:
    text = (
        "tensorpeft: 1\ntarget: {matrices: [query, key]}\nstructure: cp\nmodes: [layer, head, head_dim, width]\nrank: 3"
    )
    network = lower(replace(load_spec(text), ragged=(("head", "group"), ("*", "by_size"))), LLAMA)
    assert stored(network)["A_head"] == (4, 3)
    takes = {g.sites[0].matrix: o.take for g in network.groups for o in g.terms[0].operands if o.factor == "A_head"}
    assert takes == {"query": ((0, 0, 1, 1, 2, 2, 3, 3), None), "key": (None, None)}


def test_sizes_that_are_no_multiples_cannot_be_grouped() -> None:
    spec = spec_of({EVERYWHERE: "B[layer, d_out] * A[layer, d_in]"}, ragged=(("*", "group"),))
    with pytest.raises(SpecError) as caught:
        lower(spec, LLAMA)
    assert "mode `d_in` of factor `A` is `group`, but its size 96 is no multiple of 64, its least" in str(caught.value)


def test_a_factor_may_stand_there_under_other_names_of_its_modes() -> None:
    fields = {"ranks": (("m", Number(64)),), "target": replace(EMPTY.target, matrices=("query",))}
    network = lower(spec_of({EVERYWHERE: "u[layer, d_out] * u[layer, m] * W[m, d_in]"}, **fields), LLAMA)
    assert stored(network) == {"u": (3, 64)}
    ((term,),) = [group.terms for group in network.groups]
    assert [(o.factor, o.modes) for o in term.operands] == [("u", ("d_out",)), ("u", ("m",)), ("W", ("m", "d_in"))]


REFUSED = {
    "another size": (
        spec_of({EVERYWHERE: "u[layer, d_out] * u[layer, m] * A[m, d_in]"}, ranks=(("m", Number(5)),)),
        "`u[layer, m]` has m = 5 at query of layer 0 (model.layers.0.self_attn.q_proj), expected d_out = 64",
    ),
    "another size of the base": (
        spec_of({EVERYWHERE: "u[layer, d_out] * v[m] * W[m, d_in]"}, ranks=(("m", Number(5)),)),
        "`W[m, d_in]` has m = 5 at query of layer 0 (model.layers.0.self_attn.q_proj), expected d_out = 64",
    ),
    "no entry": (
        spec_of({selector("query"): "A[d_out] * B[d_in]"}),
        "no entry of `update` fits key of layer 0 (model.layers.0.self_attn.k_proj); expected one that does, such as `*`",
    ),
    "no rank": (
        spec_of({EVERYWHERE: "A[d_out, r] * B[r, d_in]"}, ranks=(("r", choice(query=2)),)),
        "no entry of the rank of `r` fits key of layer 0 (model.layers.0.self_attn.k_proj); "
        "expected one that does, such as `*`",
    ),
    "no matrix": (
        spec_of({EVERYWHERE: "A[d_out] * B[d_in]", selector("qeury"): "C[d_out] * B[d_in]"}),
        "`qeury` is no matrix of the target; did you mean `query`?",
    ),
    "no layer": (
        spec_of({EVERYWHERE: "A[d_out] * B[d_in]", selector("query", (3, 4)): "C[d_out] * B[d_in]"}),
        "`query layers 3-4` fits no site of the target, which has it in layers 0-2",
    ),
    "heads of no matrix": (
        replace(
            load_spec("tensorpeft: 1\ntarget: {matrices: [query]}\nstructure: cp\nmodes: [head, head_dim, width]\nrank: 2\n"
                      "heads: {side: {quary: d_in}}")
        ),
        "`heads: {side: ...}` speaks of `quary`, which is no matrix of the target; did you mean `query`?",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_the_model_is_told(name: str) -> None:
    spec, message = REFUSED[name]
    with pytest.raises(SpecError) as caught:
        lower(spec, LLAMA)
    (problem,) = caught.value.problems
    assert problem.message == message
    assert problem.span is not None
