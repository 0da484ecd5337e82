"""The door of the language: where a spec comes from, and what is said over it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorpeft.language.errors import SpecError
from tensorpeft.language.loader import load_spec
from tensorpeft.language.overrides import parse_override
from tensorpeft.language.shipped import method_paths
from tensorpeft.language.spec import Spec

CHAIN = """
tensorpeft: 1
target: {matrices: [query], layers: [0, 1]}
rank: {p: 4, q: 3}
update: A[p, d_in] * C[layer, p, q] * B[d_out, q]
factors: {C: {init: zeros}}
"""


def ranks(spec: Spec) -> dict[str, float]:
    return {bond: size.evaluate({}) for bond, size in spec.ranks}


@pytest.mark.parametrize("name", method_paths())
def test_every_shipped_method_loads_by_its_name(name: str) -> None:
    assert load_spec(name) == load_spec(method_paths()[name]) == load_spec(name.replace("_", "-"))
    assert load_spec(name).name == name
    lines = [line for line in method_paths()[name].read_text().splitlines() if not line.startswith("#")]
    assert len(lines) <= 15


def test_a_path_and_its_text_are_the_same_spec(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + CHAIN.replace("\n", "\r\n").encode())
    assert load_spec(path) == load_spec(str(path)) == load_spec(CHAIN)


def test_a_rank_by_itself_sizes_r_or_every_bond() -> None:
    assert ranks(load_spec("vera", rank=4)) == {"r": 4}
    assert ranks(load_spec(CHAIN, rank=5)) == {"p": 5, "q": 5}
    extra = CHAIN.replace("{p: 4, q: 3}", "{r: 4, q: 3}").replace("p,", "r,").replace(", p", ", r")
    assert ranks(load_spec(extra, rank=5)) == {"r": 5, "q": 3}


@pytest.mark.parametrize("override", [{"rank": {"q": 9}}, parse_override("rank.q=9"), parse_override("rank={q: 9}")])
def test_a_mapping_extends_a_mapping(override: object) -> None:
    spec = load_spec(CHAIN, **override) if isinstance(override, dict) else load_spec(CHAIN, override)  # type: ignore[arg-type]
    assert ranks(spec) == {"p": 4, "q": 9}


def test_the_keys_of_target_may_be_given_by_themselves() -> None:
    spec = load_spec(CHAIN, matrices=["q_proj", "*.v_proj"], exclude=["lm_head"])
    assert spec.target.matrices == ("q_proj", "*.v_proj")
    assert spec.target.exclude == ("lm_head",)
    assert spec.target.layers == (0, 1)
    assert (
        load_spec(CHAIN, layers=None, matrices="all-linear").target
        == load_spec(CHAIN, target=None, matrices=["all-linear"]).target
    )
    everywhere = load_spec(CHAIN, target="all-linear")
    assert everywhere.target.matrices == ("all-linear",)
    narrowed = load_spec(CHAIN.replace("{matrices: [query], layers: [0, 1]}", "all-linear"), layers=range(3))
    assert (narrowed.target.matrices, narrowed.target.layers) == (("all-linear",), (0, 1, 2))


def test_any_key_can_be_replaced_or_taken_away() -> None:
    spec = load_spec("lora", alpha=None, scale="1 / sqrt(r)", seed=7, name="mine", tasks=3)
    assert (spec.alpha, str(spec.scale), spec.seed, spec.name, spec.tasks) == (None, "1 / sqrt(r)", 7, "mine", 3)
    assert str(spec.update).startswith("B[task, matrix, layer, d_out, r]")
    assert str(load_spec("lora", parse_override("factors.A.init=normal(0.02)")).factor("A").init) == "normal(0.02)"


MESSAGES = {
    "rank=abc": "--set rank=abc:1:6: unknown name `abc`; expected one of `r`, `d_out`, ",
    "rank=010": "--set rank=010:1:6: `010` has a leading zero",
    "rank=": "--set rank=:1:1: expected a value after `=`",
    "rank": "--set rank:1:1: expected `key=value`",
    "rnak=4": "--set rnak=4:1:1: unknown key `rnak`; did you mean `rank`?",
    "target.matrices=[query, ]]": "--set target.matrices=[query, ]]:1:26: ",
    "scale=alpha / k": "--set scale=alpha / k:1:15: unknown name `k`",
}


@pytest.mark.parametrize(("text", "message"), MESSAGES.items())
def test_an_error_in_an_override_is_shown_there(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec("lora", parse_override(text))
    assert str(caught.value).startswith(message)


VALUES = {
    "rank": ("abc", "rank='abc':1:7: unknown name `abc`"),
    "alpha": (float("nan"), "alpha=nan:1:7: `nan` is not a finite number"),
    "ranks": (4, "ranks=4:1:1: unknown key `ranks`; did you mean `rank`?"),
    "dropout": (1, "dropout=1:1:9: `dropout` is `1`; expected a probability below 1, or one for `x` and for bonds"),
    "matrices": ([["query"]], "matrices=[['query']]:1:10: an entry of `target.matrices` is a list"),
    "factors": (b"A", "factors=b'A':1:9: found a value of type `bytes`"),
}


BROKEN = {  # `$` in a regular expression would pass a line break at the end
    'name: "lora\\n"': "`name` is the text `lora` with a line break; expected a text of at most 64 letters",
    'ragged: "slice\\n"': "`ragged` is the text `slice` with a line break; expected ",
    'heads: {side: "d_in\\n"}': "`heads.side` is the text `d_in` with a line break; expected ",
    'rank: {budget: "20k\\n"}': "`rank.budget` is the text `20k` with a line break; expected a number of trained numbers",
    'frozen: ["A\\n"]': "an entry of `frozen` is the text `A` with a line break; expected ",
    'target: "all-linear\\n"': "`target` is the text `all-linear` with a line break; expected ",
}


@pytest.mark.parametrize(("line", "message"), BROKEN.items())
def test_a_line_break_at_the_end_belongs_to_a_text(line: str, message: str) -> None:
    lines = ["tensorpeft: 1", "target: all-linear", "structure: matrix", "rank: 4"]
    text = "\n".join([*(other for other in lines if other.partition(":")[0] != line.partition(":")[0]), line])
    with pytest.raises(SpecError) as caught:
        load_spec(text)
    (problem,) = caught.value.problems
    assert problem.message.startswith(message)
    assert problem.span is not None
    assert problem.span.position[0] == text.count("\n") + 1


def test_the_small_languages_may_be_written_over_several_lines() -> None:
    text = "tensorpeft: 1\ntarget: all-linear\nrank: 4\nfactors: {B: {init: zeros}}\nupdate: "
    folded = load_spec(text + '"B[layer, d_out, r]\\n  * A[layer, r, d_in]\\n"')
    assert folded == load_spec(text + "B[layer, d_out, r] * A[layer, r, d_in]") == load_spec(str(folded))


@pytest.mark.parametrize(("key", "value", "message"), [(key, *rest) for key, rest in VALUES.items()])
def test_an_error_in_a_keyword_is_shown_there(key: str, value: object, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec("lora", **{key: value})
    assert str(caught.value).startswith(message)


def test_a_value_that_holds_itself_is_refused() -> None:
    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(SpecError, match="nested more than"):
        load_spec("lora", frozen=endless)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("vear", "no method is called `vear`; did you mean `vera`?"),
        ("", "no method is called ``; the catalogue has "),
        ("no/such.yaml", "`no/such.yaml` cannot be read: no such file or directory"),
        ("a\0b.yaml", "cannot be read"),
    ],
)
def test_what_cannot_be_found(what: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        load_spec(what)
    assert message in str(caught.value)
