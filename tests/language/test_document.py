"""YAML 1.2, not PyYAML's 1.1; every node at its place."""

from __future__ import annotations

import re

import pytest

from tensorpeft.language.document import parse_document
from tensorpeft.language.errors import SpecError
from tensorpeft.language.nodes import Scalar
from tensorpeft.language.source import Source

PLAIN = {
    "4": 4,
    "-4": -4,
    "0": 0,
    "0x1F": 31,
    "0o17": 15,
    "1e-3": 0.001,
    "1E3": 1000.0,
    ".5": 0.5,
    "5.": 5.0,
    "-0.5": -0.5,
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "": None,
    "on": "on",
    "yes": "yes",
    "n": "n",
    "1_000": "1_000",
    "12:30:45": "12:30:45",
    "2001-01-01": "2001-01-01",
    "alpha / r": "alpha / r",
    "'010'": "010",
    '"true"': "true",
    "1000000000000000000": 10**18,
}


@pytest.mark.parametrize(("text", "value"), PLAIN.items())
def test_scalars_mean_what_yaml_1_2_says(text: str, value: object) -> None:
    found = parse_document(Source("spec", f"key: {text}\n")).plain()["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", ["010", "-007", ".nan", "-.inf", "1e999", "9" * 21])
def test_scalars_that_mean_nothing_sure_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match=r"^spec:1:6: ") as caught:
        parse_document(Source("spec", f"key: {text}\n"))
    assert len(caught.value.problems) == 1


STYLES = {
    "plain": "update: B[d_out, r] * A[r, oops]\n",
    "single": "update: 'B[d_out, r] * A[r, oops]'\n",
    "double": 'update: "B[d_out, r] * A[r, oops]"\n',
    "folded": "update: >\n  B[d_out, r]\n    * A[r, oops]\n",
    "literal": "update: |-\n  B[d_out, r]\n\n  * A[r, oops]\n",
    "plain over lines": "update: B[d_out, r]\n\n   * A[r,\n      oops]\n",
    "after accents": "name: 'été 数'\nupdate: B[d_out, r] * A[r, oops] # ok\n",
}


@pytest.mark.parametrize("text", STYLES.values(), ids=STYLES)
def test_a_part_of_a_text_is_found_where_it_is_written(text: str) -> None:
    node = parse_document(Source("spec", text)).get("update")
    assert isinstance(node, Scalar)
    start = node.text.index("oops")
    span = node.part(start, start + 4)
    assert text[span.start : span.end] == "oops"


def test_a_part_of_an_escaped_text_is_the_whole_of_it() -> None:
    text = r'update: "A[r,\x20oops]"' + "\n"
    node = parse_document(Source("spec", text)).get("update")
    assert isinstance(node, Scalar)
    assert node.text == "A[r, oops]"
    assert node.part(5, 9) == node.span


def test_keys_keep_their_order_and_place() -> None:
    text = "b: 1\na: {d: 2, c: [x, y]}\n"
    table = parse_document(Source("spec", text))
    assert list(table) == ["b", "a"]
    assert table.plain() == {"b": 1, "a": {"d": 2, "c": ["x", "y"]}}
    assert [str(table.table("a").where(key)) for key in ("d", "c")] == ["spec:2:5", "spec:2:11"]


def test_a_message_never_speaks_of_pyyaml() -> None:
    for text in (
        "a: [",
        "a: {b",
        "a: 'b",
        "a: b: c",
        "- a\nb: c",
        "a: |x\n",
        "? [a]: b",
        "a: @",
        "a: %",
        "a:\n\t- b",
        "a: ]",
    ):
        with pytest.raises(SpecError) as caught:
            parse_document(Source("spec", text))
        assert not re.search(r"token|<.*>|block end|flow|scalar|stream|Mark|yaml\.", str(caught.value).splitlines()[0])
