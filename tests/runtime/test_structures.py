"""Structures that nobody planned for, held to one einsum: the mechanism must be right, not five methods."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tensorpeft as tp
from tensorpeft.planning.regime import Regime
from tests.models import inputs, randomise, run
from tests.runtime.reference import updates
from tests.runtime.test_oracle import by_adapter, by_formula, errors, measured, named_factors, with_extras
from tests.structures import CASES, STRUCTURES, model

# what a random spec may be refused for
MEANINGLESS = re.compile("nothing joins|its masks differ|cannot be masked|the masks leave nothing|twice, once within")


RANDOM = partial(randomise, std=0.5)


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_equals_one_einsum(name: str, architecture: str) -> None:
    check(STRUCTURES[name], architecture)


def check(text: str, architecture: str, fill: Callable[[tp.Adapter], None] = RANDOM) -> None:
    """Start, forward, gradients, dW and merge of an adapter against the reference, by plans for few tokens and for many."""
    base, x = model(architecture), inputs(architecture)
    adapter = tp.attach(base, tp.load_spec(text))
    tasks = range(adapter.spec.tasks) if adapter.spec.tasks else (None,)
    paths = dict.fromkeys(site.path for site in adapter.sites)
    assert any(adapter.delta(path, tasks[0]).any() for path in paths) == (adapter.spec.start == "nonzero")
    start = {name: value.clone() for name, value in base.state_dict().items()}
    fill(adapter)
    dense, truth = truth_of(model(architecture), adapter, x)
    found = errors(by_adapter(base, adapter, x), truth)
    assert max(found.values()) <= 1e-12, found
    with adapter.disabled():
        assert not torch.allclose(run(base, x), truth["output"], rtol=1e-6)
    for regime in (Regime(1, gradients=False), Regime(4096)):  # by itself it plans for 16 tokens, with gradients
        twin = model(architecture)
        other = tp.attach(twin, adapter.spec, regime=regime)
        other.factors.put(named_factors(adapter))
        with_extras(adapter, twin)
        found = errors(by_adapter(twin, other, x), truth)
        assert max(found.values()) <= 1e-12, (regime, found)
    for path in paths:
        for task in tasks:
            expected = dense[path] if task is None else dense[path].expand(len(tasks), -1, -1)[task]
            assert (adapter.delta(path, task) - expected).norm() <= 1e-12 * expected.norm()
    check_merge(base, adapter, x, tasks[-1])
    adapter.reset_parameters()
    assert all(torch.equal(value, start[name]) for name, value in base.state_dict().items())


def truth_of(model: nn.Module, adapter: tp.Adapter, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """dW of every module; output and gradients of a model without an adapter, given W + dW and what else is trained."""
    leaves = {n: f.detach().clone().requires_grad_(f.requires_grad) for n, f in named_factors(adapter).items()}
    dense = updates(adapter, leaves)
    extras = with_extras(adapter, model)
    with by_formula(model, dense):
        return {path: change.detach() for path, change in dense.items()}, measured(model, x, {**leaves, **extras})


def check_merge(model: nn.Module, adapter: tp.Adapter, x: Tensor, task: int | None) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        if task is None:
            factored = run(model, x)
        else:
            with adapter.tasks(torch.full((len(x),), task)):
                factored = run(model, x)
        adapter.merge(task)
        assert (run(model, x) - factored).norm() <= 1e-12 * factored.norm()
        adapter.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


SPLITS = {
    "d_out": {"d_out": ["d_out"], "d_out = o1 * o2": ["o1", "o2"], "d_out = p1(2) * p2": ["p1", "p2", "d_out"]},
    "d_in": {"d_in": ["d_in"], "d_in = i1 * i2": ["i1", "i2"], "d_in = j1 * j2(4)": ["j1", "j2", "d_in"]},
}
TARGETS = ("all-linear", {"matrices": ["mix", "grow"]}, {"matrices": ["*.0.mix", "*.1.grow"]})


POLICIES: tuple[dict[str, str], ...] = (
    {"*": "by_size"},
    {"*": "slice"},
    {"d_out": "slice"},
    {"*": "slice", "d_in": "by_size"},
    {"d_out": "group", "r0": "slice"},
)
ELSEWHERE = "layers 1"  # a selector that fits some sites of every target
KEPT = ("keep(0.6)", {"*": "keep(0.5)", ELSEWHERE: "bernoulli(0.7)"})
Modes = dict[str, list[str]]  # of each factor of a product


@st.composite
def products(draw: st.DrawFn, prefix: str, opened: list[str], bonds: list[str], task: bool) -> Modes:
    """The modes of two to five factors: an open mode is in one or two of them, or in none beside W; a bond in two or three."""
    names = [f"{prefix}{number}" for number in range(draw(st.integers(2, 5)))]
    base = draw(st.sampled_from([False, False, True]))
    modes: Modes = {name: [] for name in names}
    allowed = {
        **dict.fromkeys(opened, (1 - base, 2)),
        **dict.fromkeys(bonds, (2, 3)),
        "matrix": (0, 3),
        "layer": (0, 3),
    }
    if task:
        allowed["task"] = (1, 2)
    for mode, (least, most) in allowed.items():
        for name in draw(st.lists(st.sampled_from(names), min_size=least, max_size=min(most, len(names)), unique=True)):
            modes[name].insert(draw(st.integers(0, len(modes[name]))), mode)
    return {**modes, "W": ["d_out", "d_in"]} if base else modes


def summed(draw: st.DrawFn, terms: list[Modes]) -> str:
    return draw(st.sampled_from([" + ", " - "])).join(
        " * ".join(f"{name}[{', '.join(modes)}]" if modes else name for name, modes in product.items())
        for product in terms
    )


@st.composite
def masks(draw: st.DrawFn, terms: list[Modes], known: set[str]) -> dict[str, object]:
    """Up to two masks, each of one mode of a factor or of the entries over two."""
    of = {f: [m for m in modes if m in known] for product in terms for f, modes in product.items() if f != "W"}
    single = [f"{f}[{m}]" for f, modes in of.items() for m in modes]
    double = [f"{f}[{modes[0]}, {modes[-1]}]" for f, modes in of.items() if len(modes) > 1]
    chosen = draw(st.lists(st.sampled_from([*single, *double]), max_size=2, unique=True)) if single else []
    return {where: draw(st.sampled_from(KEPT)) for where in chosen}


@st.composite
def random_specs(draw: st.DrawFn) -> str:
    """One or two products over random modes, each with its own split of the sides, perhaps others in the second layer."""

    def product(prefix: str) -> Modes:
        opened = [mode for ways in SPLITS.values() for mode in draw(st.sampled_from(list(ways.values())))]
        return draw(products(prefix, opened, list(bonds), bool(tasks)))

    size = st.one_of(st.integers(1, 3), st.sampled_from([{"*": 2, ELSEWHERE: 3}, {"*": 3, ELSEWHERE: 1}, "layer + 1"]))
    bonds = {f"r{number}": draw(size) for number in range(draw(st.integers(1, 4)))}
    tasks = draw(st.sampled_from([None, 3]))
    entries = {
        where: [product(prefix) for prefix in prefixes]
        for where, prefixes in draw(st.sampled_from([{"*": "F"}, {"*": "FG"}, {"*": "F", ELSEWHERE: "GH"}])).items()
    }
    update = {where: summed(draw, terms) for where, terms in entries.items()}
    every = [each for terms in entries.values() for each in terms]
    carried = {mode for each in every for modes in each.values() for mode in modes}
    spec = {
        "tensorpeft": 1,
        "target": draw(st.sampled_from(TARGETS)),
        "modes": [
            way for ways in SPLITS.values() for way, modes in ways.items() if len(modes) > 1 and carried & {*modes[:2]}
        ],
        "rank": bonds,
        "tasks": tasks,
        "update": update if len(update) > 1 else update["*"],
        "factors": {draw(st.sampled_from([f for f in each if f != "W"])): {"init": "zeros"} for each in every},
        "ragged": {mode: policy for mode, policy in draw(st.sampled_from(POLICIES)).items() if mode in {*carried, "*"}},
        "mask": draw(masks(every, carried - {"matrix", "layer", "task"})),
    }
    return json.dumps({key: value for key, value in spec.items() if value}, indent=1)  # YAML too, and without anchors


@settings(max_examples=40, phases=[Phase.generate], deadline=None, derandomize=True, database=None)
@given(random_specs())
def test_a_random_network_equals_one_einsum(text: str) -> None:
    try:
        tp.attach(model("plain"), tp.load_spec(text))
    except tp.SpecError as error:
        if MEANINGLESS.search(str(error)):
            reject()
        raise
    check(text, "plain", partial(randomise, std=0.2))
