"""The language reference beside the grammars speaks of everything there is."""

from __future__ import annotations

import json
import re

from tensorpeft.language.keywords import (
    BUILT_IN_MODES,
    DECOMPOSITIONS,
    INITIALISERS,
    MASK_RULES,
    MODEL_SIZES,
    TRAINABLE,
)
from tensorpeft.language.loader import load_spec
from tensorpeft.language.shipped import grammar_path
from tensorpeft.language.spec import BUDGET, INPUT
from tensorpeft.language.syntax import ARITY, CONSTANTS

REFERENCE = grammar_path("README.md").read_text(encoding="utf-8")


def test_every_word_is_explained() -> None:
    schema = json.loads(grammar_path("spec.schema.json").read_text(encoding="utf-8"))
    code = " ".join(re.findall(r"`([^`]+)`", REFERENCE.replace("```", "")))
    words = set(re.findall(r"\w+", code))
    expected = {*schema["properties"], *INITIALISERS, *MASK_RULES, *ARITY, *MODEL_SIZES, *BUILT_IN_MODES}
    expected |= {*DECOMPOSITIONS, *CONSTANTS, *TRAINABLE, INPUT, BUDGET, "size"}
    expected |= {
        *schema["properties"]["start"]["enum"],
        *schema["properties"]["ragged"]["additionalProperties"]["enum"],
    }
    assert expected - words == set()


def test_its_examples_load() -> None:
    whole, part = re.findall(r"```yaml\n(.*?)```", REFERENCE, re.DOTALL)
    assert load_spec(whole) == load_spec("lora")
    assert len(load_spec(f"tensorpeft: 1\ntarget: all-linear\n{part}").update.entries) == 2
