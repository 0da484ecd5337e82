"""The catalogue tells of every shipped file what it says of itself, and counts what an adapter of it would train."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest

from tensorpeft.language.errors import SpecError
from tensorpeft.language.shipped import method_paths
from tensorpeft.model.cards import cards, model_shape
from tensorpeft.pipeline import report
from tensorpeft.reporting.catalogue import COUNTED_ON, Catalogue, Paper, catalogue, described

SHIPPED = Path(__file__).resolve().parents[2] / "specs"


@cache
def shipped() -> Catalogue:
    return catalogue()


# what the catalogue was asked for: a method that goes missing is noticed
PUBLISHED = [
    "adalora",
    "c3a",
    "fact_tk",
    "fact_tt",
    "glora",
    "gralora",
    "hira",
    "ia3",
    "loha",
    "lokr",
    "lokr_both",
    "lokr_full",
    "lora",
    "lora_fa",
    "lora_xs",
    "loretta_rep",
    "lorta",
    "lorta_litgpt",
    "lorta_lora",
    "lorta_peft",
    "lotr",
    "miss",
    "moslora",
    "nola",
    "partial_lora",
    "partial_lora_elements",
    "pissa",
    "randlora",
    "rslora",
    "shared_a",
    "targeted_lora",
    "tinylora",
    "vera",
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_method_ships(name):
    """Each as a sentence of at most 15 lines, and with its source."""
    text = method_paths()[name].read_text(encoding="utf-8")
    said = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert len(said) <= 15
    title, _, paper = described(text)
    assert (paper.title and paper.year) or "submitted to ICLR 2024" in title


def test_everything_that_ships_is_there():
    found = shipped()
    assert [method.name for method in found.methods] == sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    assert [card.name for card in found.cards] == list(cards())
    assert all(card.parameters == model_shape(card.name).n_parameters for card in found.cards)


@pytest.mark.parametrize("name", method_paths())
def test_a_method_is_counted_or_its_refusal_is_told(name):
    method = next(method for method in shipped().methods if method.name == name)
    if method.refused is None:
        found = report(name, model=COUNTED_ON)
        assert (method.trainable, method.extra) == (found.trainable, found.extra)
    else:
        with pytest.raises(SpecError) as refusal:
            report(name, model=COUNTED_ON)
        assert (method.trainable, method.extra, method.refused) == (None, None, str(refusal.value))


@pytest.mark.parametrize("name", method_paths())
def test_a_file_begins_with_what_it_is(name):
    title, what, paper = described(method_paths()[name].read_text(encoding="utf-8"))
    assert title
    assert what.endswith(".")
    assert paper != Paper() or "20" in title


@pytest.mark.parametrize(
    ("comment", "told"),
    [
        ("", ("", "", Paper())),
        ("# words", ("", "words", Paper())),
        ("# A-B: one\n# thing. Another.", ("A-B", "one thing.", Paper())),
        ("# A: a.\n# \"T: t\", ICLR 2021.", ("A", "a.", Paper(title="T: t", year="2021"))),
        (
            "# A: a.\n# B. Someone\n# Some et al., \"Long\n# title\", 2021, arXiv:2106.09685. More in 2022.",
            ("A", "a.", Paper("Some et al.", "Long title", "2021", "arXiv:2106.09685")),
        ),
        ("# A: a.\nname: x\n# Some, \"T\", 2021", ("A", "a.", Paper())),
    ],
)  # fmt: skip
def test_comments(comment, told):
    assert described(comment) == told


def test_formats():
    found = shipped()
    data = json.loads(found.to_json())
    lora = next(method for method in data["methods"] if method["name"] == "lora")
    assert lora["trainable"] == 4194304
    assert lora["trained"] == ["B", "A"]
    assert lora["paper"]["arxiv"] == "arXiv:2106.09685"
    assert data["model"] == COUNTED_ON
    for shown in (found.to_text(), found.to_markdown(), found.to_html()):
        assert all(name in shown for name in (*method_paths(), *cards()))
        assert "4,194,304" in shown
