"""Every shipped spec, by itself: whoever adds a YAML file adds its tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import tensorpeft as tp
from tensorpeft.language.catalogue import method_paths
from tensorpeft.language.text import spec_text
from tests.models import build, inputs, randomise, run
from tests.runtime.test_oracle import by_adapter
from tests.runtime.test_structures import check

SITES = ["query", "value"]
UNEVEN = {("fact_tt", "llama"), ("fact_tk", "llama")}  # chunks as wide as the model; grouped values are narrower
LONGEST = 15  # lines of a spec, comments left out


@pytest.mark.parametrize("name", method_paths())
def test_is_a_sentence_with_a_source(name: str) -> None:
    lines = method_paths()[name].read_text().splitlines()
    said = [line for line in lines if line.strip() and not line.startswith("#")]
    assert len(said) <= LONGEST
    assert lines[0].startswith("# ")
    assert yaml.safe_load("\n".join(lines))["name"] == name


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("name", method_paths())
def test_equals_one_einsum(name: str, architecture: str) -> None:
    text = spec_text(tp.load_spec(name, matrices=SITES))
    if (name, architecture) in UNEVEN:
        model = build(architecture)
        with pytest.raises(tp.SpecError, match=r"out_chunk \* o\(width\).* do not multiply to d_out = 32 of value"):
            tp.attach(model, tp.load_spec(text))
    else:
        check(text, architecture)


@pytest.mark.parametrize("name", method_paths())
def test_saves_loads_and_counts(name: str, tmp_path: Path) -> None:
    spec = tp.load_spec(name, matrices=SITES)
    model, twin, x = build("bert"), build("bert"), inputs("bert", batch=3)
    report = tp.report(spec, model)
    adapter = tp.attach(model, spec)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == report.trainable
    randomise(adapter)
    adapter.save(tmp_path)
    loaded = tp.load(twin, tmp_path)
    truth, found = by_adapter(model, adapter, x), by_adapter(twin, loaded, x)
    assert all(torch.equal(found[key], truth[key]) for key in truth)
    assert all(truth[key].abs().sum() > 0 for key in truth)  # every trained factor has a gradient
    loaded.detach()
    assert not torch.equal(run(twin, x), truth["output"])
