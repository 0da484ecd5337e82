"""What is loaded is what was saved, to the last bit."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tensorpeft as tp
from tests.checkpoint import sample
from tests.models import build, inputs, randomise, run

SPECS = ("lora", "vera", "shared_a", "partial_lora", "lorta")


def answer(name: str, model: nn.Module, adapter: tp.Adapter) -> Tensor:
    with adapter.tasks(torch.tensor([2, 0, 1])) if adapter.spec.tasks else nullcontext():
        return run(model, inputs(name))


def factors(adapter: tp.Adapter) -> dict[str, Tensor]:
    return {block.name: adapter.factors[block.name].detach().clone() for block in adapter.network.blocks}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items()
    )


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_shipped_method_gives_the_same_outputs_after_loading(name: str, spec: str, tmp_path: Path) -> None:
    model = build(name)
    adapter = tp.attach(model, spec)
    base = answer(name, model, adapter)
    randomise(adapter)
    expected = answer(name, model, adapter)
    assert not torch.equal(expected, base)
    assert adapter.save(tmp_path) == tmp_path / sample.FILE

    fresh = build(name)
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    loaded = tp.load(fresh, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(answer(name, fresh, loaded), expected)
    assert same(factors(loaded), factors(adapter))
    assert (loaded.name, loaded.spec) == (adapter.name, adapter.spec)
    assert [n for n, p in fresh.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


def test_a_loaded_adapter_trains_and_detaches(tmp_path: Path) -> None:
    sample.adapter_on(sample.model()).save(tmp_path)
    model = sample.model()
    before = sample.state(model)
    adapter = tp.load(model, tmp_path)
    sample.outputs(model).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter.parameters())
    adapter.detach()
    assert sample.state(model) == before


def test_the_base_may_have_another_dtype_the_factors_keep_theirs(tmp_path: Path) -> None:
    adapter = sample.adapter_on(sample.model())
    adapter.save(tmp_path)
    for dtype in (torch.bfloat16, torch.float64):
        loaded = tp.load(sample.model().to(dtype), tmp_path)
        assert same(factors(loaded), factors(adapter))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_factors_of_every_dtype_come_back(dtype: torch.dtype, tmp_path: Path) -> None:
    adapter = sample.adapter_on(sample.model()).to(dtype)
    adapter.save(tmp_path)
    assert same(factors(tp.load(sample.model(), tmp_path)), factors(adapter))


def test_a_frozen_factor_that_its_seed_no_longer_gives_is_stored(tmp_path: Path) -> None:
    model = sample.model()
    adapter = sample.adapter_on(model)
    adapter.save(tmp_path)
    assert "A" not in sample.parts(tmp_path).tensors
    adapter.factors["A"].mul_(2)
    adapter.save(tmp_path)
    assert "A" in sample.parts(tmp_path).tensors
    fresh = sample.model()
    assert same(factors(tp.load(fresh, tmp_path)), factors(adapter))
    assert torch.equal(sample.outputs(fresh), sample.outputs(model))


def test_a_merged_adapter_saves_its_factors(tmp_path: Path) -> None:
    model = sample.model()
    adapter = sample.adapter_on(model)
    adapter.save(tmp_path / "before")
    adapter.merge()
    adapter.save(tmp_path / "merged")
    adapter.unmerge()
    adapter.detach()
    adapter.save(tmp_path / "detached")
    contents = {(tmp_path / folder / sample.FILE).read_bytes() for folder in ("before", "merged", "detached")}
    assert len(contents) == 1


def test_a_second_adapter_takes_another_name(tmp_path: Path) -> None:
    model = sample.model()
    sample.adapter_on(model).save(tmp_path)
    before = sample.state(model)
    with pytest.raises(tp.AdapterError, match="the model already has an adapter `sample`; give this one another name"):
        tp.load(model, tmp_path)
    assert sample.state(model) == before
    assert tp.load(model, tmp_path, name="twin").name == "twin"


def test_the_file_it_was_loaded_from_may_be_replaced(tmp_path: Path) -> None:
    sample.adapter_on(sample.model()).save(tmp_path)
    model = sample.model()
    adapter = tp.load(model, tmp_path)
    expected = sample.outputs(model)
    (tmp_path / sample.FILE).write_bytes(b"x" * (tmp_path / sample.FILE).stat().st_size)
    adapter.refresh()
    assert torch.equal(sample.outputs(model), expected)
