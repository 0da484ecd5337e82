"""Values by site: selectors, which entries there are, and what a caller puts over them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensorpeft.language.grammar import parse_selector
from tensorpeft.language.loader import load_spec
from tensorpeft.language.nodes import literal
from tensorpeft.language.overrides import parse_override
from tensorpeft.language.spec import Spec
from tensorpeft.language.syntax import EVERYWHERE, Choice, Selector

HEAD = "tensorpeft: 1\ntarget: {matrices: [query, value]}\n"
LORA = HEAD + "structure: matrix\n"

SELECTORS = {
    "*": EVERYWHERE,
    "query": Selector(("query",)),
    "query,value": Selector(("query", "value")),
    "layers 0-3, 7": Selector((), (0, 1, 2, 3, 7)),
    "layers 7,0 - 1": Selector((), (0, 1, 7)),
    "* layers 5": Selector((), (5,)),
    "query, mlp.* layers 2": Selector(("query", "mlp.*"), (2,)),
    "layers.0.q_proj layers 0": Selector(("layers.0.q_proj",), (0,)),
    "0-3": Selector(("0-3",)),
}


@pytest.mark.parametrize(("text", "selector"), SELECTORS.items())
def test_selectors(text: str, selector: Selector) -> None:
    assert parse_selector(literal(text)) == selector


names = st.from_regex(r"[A-Za-z0-9_.?\[\]!-]{1,8}", fullmatch=True).filter(lambda name: name != "layers")
layers = st.none() | st.sets(st.integers(0, 65535), min_size=1).map(sorted).map(tuple)


@given(st.lists(names, unique=True, max_size=4).map(tuple), layers)
def test_selectors_parse_back(matrices: tuple[str, ...], layers: tuple[int, ...] | None) -> None:
    selector = Selector(matrices, layers)
    assert parse_selector(literal(str(selector))) == selector


def entries(spec: Spec, bond: str = "r") -> dict[str, str]:
    size = dict(spec.ranks)[bond]
    assert isinstance(size, Choice)
    return {str(selector): str(value) for selector, value in size.entries}


def test_one_value_for_every_site_is_that_value() -> None:
    plain = load_spec(LORA + "rank: 4\nscale: 2\nmask: {'A[d_in]': keep(3)}\n")
    assert load_spec(LORA + "rank: {r: {'*': 4}}\nscale: {'*': 2}\nmask: {'A[d_in]': {'*': keep(3)}}\n") == plain
    update = "B[layer, d_out] * A[layer, d_in]"
    rest = "factors: {B: {init: zeros}}\n"
    assert load_spec(f"{HEAD}update: {{'*': '{update}'}}\n{rest}") == load_spec(f"{HEAD}update: {update}\n{rest}")


def test_an_override_extends_a_choice_or_a_value_for_every_site() -> None:
    sized = LORA + "rank: {r: 4}\n"
    assert entries(load_spec(sized, rank={"r": {"value": 2}})) == {"*": "4", "value": "2"}
    assert entries(load_spec(sized, parse_override("rank.r.value=2"))) == {"*": "4", "value": "2"}
    chosen = LORA + "rank: {r: {query: 4, value: 5}}\n"
    assert entries(load_spec(chosen, parse_override("rank.r.value=2"))) == {"query": "4", "value": "2"}
    assert str(dict(load_spec(chosen, rank=7).ranks)["r"]) == "7"
    assert load_spec(sized, dropout={"r": 0.5}).dropout == (("r", 0.5),)
    both = load_spec(LORA + "rank: {r: 4}\ndropout: 0.1\nragged: slice\n", dropout={"r": 0.5}, ragged={"d_in": "error"})
    assert both.dropout == (("x", 0.1), ("r", 0.5))
    assert (both.policy("d_in"), both.policy("d_out")) == ("error", "slice")


BOUND = HEAD + "update: A[p, d_in] * C[layer, p, q] * B[d_out, q]\nfactors: {C: {init: zeros}}\n"


@pytest.mark.parametrize(
    ("rank", "override", "ranks", "free"),
    [
        ("{p: 4, q: 3}", "rank={budget: 20k}", {}, ("p", "q")),
        ("{p: 4, q: 3}", "rank.budget=20k", {}, ("p", "q")),
        ("{p: 4, q: 3}", "rank.budget=20K", {}, ("p", "q")),
        ("{p: 4, q: 3}", "rank.budget=0.02m", {}, ("p", "q")),
        ("{p: 4, q: p}", "rank={budget: 20k}", {"q": "p"}, ("p",)),
        ("{p: 4, q: d_out}", "rank={budget: 20k}", {"q": "d_out"}, ("p",)),
        ("{p: 4, q: 3}", "rank={budget: 20k, q: 5}", {"q": "5"}, ("p",)),
        ("{budget: 1k}", "rank.budget=0.02M", {}, ("p", "q")),
        ("{budget: 1k, p: 4}", "rank={budget: 20000}", {}, ("p", "q")),
    ],
)
def test_a_budget_takes_the_place_of_ranks(
    rank: str, override: str, ranks: dict[str, str], free: tuple[str, ...]
) -> None:
    spec = load_spec(BOUND + f"rank: {rank}\n", parse_override(override))
    assert ({bond: str(size) for bond, size in spec.ranks}, spec.free, spec.budget) == (ranks, free, 20000)


def test_a_budget_sizes_r_alone_where_there_is_one() -> None:
    renamed = BOUND.replace("p,", "r,").replace(", p", ", r") + "rank: {r: 4, q: 3}\n"
    spec = load_spec(renamed, rank={"budget": 500})
    assert ([bond for bond, _ in spec.ranks], spec.free, spec.budget) == (["q"], ("r",), 500)
    assert load_spec(renamed, rank={"budget": 500}) == load_spec(renamed, parse_override("rank.budget=500"))
    sized = load_spec(renamed.replace("{r: 4, q: 3}", "{q: 3, budget: 500}"), rank=4)
    assert (sized.budget, {bond: str(size) for bond, size in sized.ranks}) == (None, {"q": "3", "r": "4"})
    assert load_spec("lora", rank={"budget": "20k"}).free == ("r",)
    assert load_spec(HEAD + "structure: tt\nrank: {budget: 9k}\n", rank=4) == load_spec(
        HEAD + "structure: tt\nrank: 4\n"
    )


def test_an_update_may_be_absent_where_something_else_is_trained() -> None:
    spec = load_spec(HEAD + "train: [biases]\n")
    assert (spec.update.products, spec.factors, spec.train) == ((), (), ("biases",))


def test_wrong_layers_and_heads_are_found_where_they_are_written() -> None:
    text = (
        HEAD.replace("]}", "], layers: [0, 40]}")
        + "structure: matrix\nrank: 2\nheads: {side: {query: d_in, '*': d_out}, count: 4}\n"
    )
    spec = load_spec(text)
    assert str(spec.target.span(40)) == f"<spec>:2:{text.splitlines()[1].index('40') + 1}"
    assert [str(spec.heads.span(*where)) for where in (("side", "query"), ("side", "*"), ("count", "*"))] == [
        "<spec>:5:16",
        "<spec>:5:29",
        "<spec>:5:49",
    ]
