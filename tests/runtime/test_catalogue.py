"""Every shipped spec, by itself: whoever adds a YAML file adds its tests."""

from __future__ import annotations

import contextlib
import copy
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

import tensorpeft as tp
from tensorpeft.language.shipped import method_paths
from tensorpeft.language.spec import Spec
from tensorpeft.reporting.report import Report
from tensorpeft.runtime import hooks
from tests.models import build, enliven, inputs, randomise, run, widen_norms
from tests.runtime.reference import counted, updates
from tests.runtime.test_life import state
from tests.runtime.test_oracle import (
    IDS,
    by_adapter,
    by_formula,
    errors,
    hold_roundings,
    measured,
    named_factors,
    with_extras,
)
from tests.runtime.test_structures import check

SPECS = method_paths()
ARCHITECTURES = ("llama", "gpt2", "bert")  # grouped-query heads, fused Conv1D, plain linear modules
CASES = [
    *((name, architecture) for name in SPECS for architecture in ARCHITECTURES),
    ("lorta_lora", "roberta"),
    ("shared_outer", "mixtral"),
]
REFUSED: dict[tuple[str, str], str] = {
    **{("lorta_lora", architecture): "`classifier.dense` matches nothing in" for architecture in ARCHITECTURES},
    **{("shared_outer", architecture): "`*.experts.gate` matches nothing in" for architecture in ARCHITECTURES},
    ("bitfit", "llama"): "`bias` is no parameter of LlamaForCausalLM",
}
FITTING = [case for case in CASES if case not in REFUSED]
LONGEST = 15  # lines of a spec, comments left out


def scored(name: str, architecture: str, folder: Path) -> Spec:
    """A spec, with random scores if it reads a file of them."""
    spec = tp.load_spec(name)
    if spec.scores is not None:
        sites = tp.attach(build(architecture), tp.load_spec("lora", matrices=list(spec.target.matrices))).sites
        draw = np.random.default_rng(5)
        np.savez(folder / "scores.npz", **{f"{s.matrix}.{s.layer}": draw.random((s.d_out, s.d_in)) for s in sites})
        spec = tp.load_spec(str(spec), scores=str(folder / "scores.npz"))
    return spec


def output(model: nn.Module, adapter: tp.Adapter, x: Tensor) -> Tensor:
    with torch.no_grad(), adapter.tasks(IDS) if adapter.spec.tasks else contextlib.nullcontext():
        return run(model, x)


@pytest.mark.parametrize("name", SPECS)
def test_is_a_sentence_with_a_source(name: str) -> None:
    lines = SPECS[name].read_text().splitlines()
    said = [line for line in lines if line.strip() and not line.startswith("#")]
    assert len(said) <= LONGEST
    assert lines[0].startswith("# ")
    assert yaml.safe_load("\n".join(lines))["name"] == name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_is_refused_with_a_reason(architecture: str, tmp_path: Path) -> None:
    model = build(architecture)
    before = state(model)
    for name, reason in ((name, why) for (name, where), why in REFUSED.items() if where == architecture):
        with pytest.raises(tp.SpecError, match=re.escape(reason)) as refusal:
            tp.attach(model, scored(name, architecture, tmp_path))
        assert all(problem.span is not None for problem in refusal.value.problems)
        assert state(model) == before


@pytest.mark.parametrize(("name", "architecture"), FITTING)
def test_equals_one_einsum(name: str, architecture: str, tmp_path: Path) -> None:
    check(str(scored(name, architecture, tmp_path)), architecture, enliven)


@pytest.mark.parametrize(("name", "architecture"), FITTING)
def test_lives(name: str, architecture: str, tmp_path: Path) -> None:
    """It trains what the report counts, is saved, loaded and copied whole, stands beside another, and leaves no trace."""
    model, x, spec = build(architecture), inputs(architecture), scored(name, architecture, tmp_path)
    before, base = state(model), run(model, x).detach()
    report = tp.report(spec, model)
    adapter = tp.attach(model, spec)
    if spec.start == "zero":  # by zeros, or by a difference that rounds
        rounds = "start(" in str(spec)
        assert (output(model, adapter, x) - base).norm() <= (1e-5 if rounds else 0) * base.norm()
    check_trains(model, adapter, x, report)
    enliven(adapter)
    truth = output(model, adapter, x)
    assert not torch.allclose(truth, base, rtol=1e-3)
    with adapter.disabled():
        assert torch.equal(run(model, x), base)
    check_saves(model, adapter, build(architecture), x, tmp_path)
    twin = copy.deepcopy(model)
    (copied,) = hooks.adapters(twin)
    assert torch.equal(output(twin, copied, x), truth)
    check_beside_another(model, adapter, x)
    adapter.detach()
    assert torch.equal(run(model, x), base)
    assert state(model) == before


def check_trains(model: nn.Module, adapter: tp.Adapter, x: Tensor, report: Report) -> None:
    """What an optimizer sees, what it moves, what the report says and what the formula says are as many numbers."""
    assert sum(parameter.numel() for parameter in adapter.factors.parameters()) == report.trainable == counted(adapter)
    assert sum(parameter.numel() for parameter in adapter.parameters()) == report.trainable + report.extra
    enliven(adapter)
    old = {name: value.clone() for name, value in named_factors(adapter).items()}
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    with adapter.tasks(IDS) if adapter.spec.tasks else contextlib.nullcontext():
        y = run(model, x)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    optimizer.step()
    optimizer.zero_grad()
    moved = {name for name, value in named_factors(adapter).items() if not torch.equal(value, old[name])}
    assert moved == {block.name for block in adapter.network.blocks if block.trainable}


def check_saves(model: nn.Module, adapter: tp.Adapter, other: nn.Module, x: Tensor, folder: Path) -> None:
    adapter.save(folder)
    torch.manual_seed(1234)
    loaded = tp.load(other, folder)
    assert all(torch.equal(value, named_factors(adapter)[name]) for name, value in named_factors(loaded).items())
    assert torch.equal(output(other, loaded, x), output(model, adapter, x))


def check_beside_another(model: nn.Module, adapter: tp.Adapter, x: Tensor) -> None:
    alone = output(model, adapter, x)
    second = tp.attach(model, tp.load_spec("lora", matrices=["query"]), name="second")
    randomise(second, seed=7)
    both = output(model, adapter, x)
    assert not torch.allclose(both, alone, rtol=1e-3)
    with second.disabled():
        assert torch.equal(output(model, adapter, x), alone)
    with adapter.disabled():
        assert not torch.allclose(run(model, x), both, rtol=1e-3)
    second.detach()
    assert torch.equal(output(model, adapter, x), alone)


@pytest.mark.parametrize(("name", "architecture"), [case for case in FITTING if case[1] != "bert"])
def test_in_bfloat16_no_worse_than_one_einsum(name: str, architecture: str, tmp_path: Path) -> None:
    model = widen_norms(build(architecture, torch.bfloat16))
    narrow = widen_norms(build(architecture, torch.bfloat16))
    wide = widen_norms(build(architecture, torch.bfloat16)).double()  # the same weights, as bfloat16 rounded them
    adapter = tp.attach(model, scored(name, architecture, tmp_path))
    mine: dict[str, list[float]] = defaultdict(list)
    its: dict[str, list[float]] = defaultdict(list)
    for draw in range(7):
        enliven(adapter, seed=draw)
        x = inputs(architecture, seed=draw)
        truth = by_einsum(wide, adapter, x, torch.float64)
        for of_draws, found in (
            (mine, by_adapter(model, adapter, x)),
            (its, by_einsum(narrow, adapter, x, torch.bfloat16)),
        ):
            for key, error in errors(found, truth).items():
                of_draws[key].append(error)
    hold_roundings(mine, its)


def by_einsum(model: nn.Module, adapter: tp.Adapter, x: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """One einsum of factors rounded to ``dtype`` a module, on a model that has no adapter."""
    leaves = {n: f.detach().clone().requires_grad_(f.requires_grad) for n, f in named_factors(adapter).items()}
    dense = updates(adapter, {name: leaf.to(dtype) for name, leaf in leaves.items()})
    extras = with_extras(adapter, model)
    with by_formula(model, dense):
        return measured(model, x, {**leaves, **extras})
