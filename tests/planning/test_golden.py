"""The plan of every shipped spec, as text: whoever changes the planner reads what that changes."""

from __future__ import annotations

from pathlib import Path

import pytest

import tensorpeft as tp
from tensorpeft.language.shipped import method_paths
from tensorpeft.model.cards import model_shape
from tensorpeft.pipeline import front
from tensorpeft.planning.regime import Regime
from tensorpeft.scanning.scan import scan
from tests.catalogue_page import without_scores
from tests.models import build

GOLDEN = Path(__file__).parent / "golden"
MODELS = ("llama-2-7b", "gpt2", "vit-base", "mixtral-8x7b", "roberta with a head")  # the first that a spec fits
REGIMES = {
    "training": Regime(),
    "16 tokens, forward alone": Regime(16, gradients=False),
}


def plans(name: str) -> str:
    for model in MODELS:
        try:
            shape = model_shape(model) if model != MODELS[-1] else scan(build("roberta"))
            spec = without_scores(tp.load_spec(name))
            found = {title: front(spec, shape, regime) for title, regime in REGIMES.items()}
        except tp.SpecError:
            continue
        for each in found.values():
            each.verify()
        return f"{name} on {model}\n\n" + "\n\n".join(f"# {title}\n{each}" for title, each in found.items()) + "\n"
    raise AssertionError(f"{name} fits none of {MODELS}")


@pytest.mark.parametrize("name", method_paths())
def test_the_plan_is_the_golden_one(name: str, update_golden: bool) -> None:
    path, text = GOLDEN / f"{name}.txt", plans(name)
    if update_golden:
        path.write_text(text)
    assert path.read_text() == text


def test_there_is_no_other_golden_plan() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == {*method_paths()}
