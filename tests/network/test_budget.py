"""Counts without a network, and the largest rank within a budget, both held to the network itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tensorpeft.language.errors import SpecError
from tensorpeft.language.loader import load_spec
from tensorpeft.language.shipped import method_paths
from tensorpeft.language.spec import Spec
from tensorpeft.language.syntax import Number
from tensorpeft.model.cards import model_shape
from tensorpeft.network.budget import n_trained
from tensorpeft.network.lower import lower
from tests.network.test_site_classes import LLAMA
from tests.structures import STRUCTURES


def counted(spec: Spec) -> int | str:
    """The numbers that the network trains, or why there is no network."""
    try:
        return sum(block.count for block in lower(spec, LLAMA).blocks if block.trainable)
    except SpecError as error:
        return str(error)


def counted_alone(spec: Spec) -> int | str:
    try:
        return n_trained(spec, LLAMA)
    except SpecError as error:
        return str(error)


UPDATES = [name for name in method_paths() if load_spec(name).update.products]


@pytest.mark.parametrize("text", [*STRUCTURES.values(), *UPDATES])
def test_a_count_is_that_of_the_network(text: str, tmp_path: Path) -> None:
    spec = load_spec(text)
    if spec.scores is not None:
        draw = np.random.default_rng(0)
        scores = {f"{site.matrix}.{site.layer}": draw.random((site.d_out, site.d_in)) for site in LLAMA.sites}
        np.savez(tmp_path / "scores.npz", **scores)
        spec = load_spec(text, scores=str(tmp_path / "scores.npz"))
    assert counted_alone(spec) == counted(spec)


def free(name: str, budget: int, *bonds: str) -> Spec:
    """A spec of which some bonds are sized by a budget."""
    spec = load_spec(name)
    bonds = bonds or tuple(dict(spec.ranks))
    ranks = tuple((bond, size) for bond, size in spec.ranks if bond not in bonds)
    return replace(spec, ranks=ranks, budget=budget, free=bonds)


@pytest.mark.parametrize("budget", [5_000, 12_345, 100_000])
@pytest.mark.parametrize("name", ["lora", "adalora", "lotr", "lorta", "partial_lora", "fact_tk"])
def test_the_largest_rank_that_fits(name: str, budget: int) -> None:
    model = model_shape("vit-base") if name == "fact_tk" else LLAMA
    spec = free(name, budget)
    network = lower(spec, model)
    sizes = dict(network.spec.ranks)
    (rank,) = {sizes[bond].value for bond in spec.free}
    assert (network.spec.budget, network.spec.free) == (None, ())
    larger = tuple((bond, Number(rank + 1) if bond in spec.free else size) for bond, size in network.spec.ranks)
    assert n_trained(network.spec, model) <= budget < n_trained(replace(network.spec, ranks=larger), model)
    assert n_trained(spec, model) == n_trained(network.spec, model)


def test_counts_that_fall_before_they_fit() -> None:
    """C3A has fewer numbers the larger its blocks: of k = 1, 2, 4, ... the budget holds only what comes last."""
    counts = {k: n_trained(load_spec("c3a", rank=k), LLAMA) for k in (1, 2, 16, 32)}
    assert counts[1] == 2 * counts[2] == 32 * counts[32]
    budget = counts[32] + 1
    assert counts[16] > budget
    network = lower(free("c3a", budget), LLAMA)
    assert dict(network.spec.ranks)["k"] == Number(32)
    assert n_trained(network.spec, LLAMA) == counts[32]


def test_one_bond_of_several() -> None:
    network = lower(free("moslora", 20_000, "s"), LLAMA)
    assert dict(network.spec.ranks)["r"] == load_spec("moslora").ranks[0][1]


def test_a_budget_that_is_too_small() -> None:
    spec = free("lora", 100)
    least = n_trained(load_spec("lora", rank=1), LLAMA)
    with pytest.raises(SpecError) as caught:
        lower(spec, LLAMA)
    expected = f"the budget is 100, but rank 1 trains {least:,} numbers already; expected a larger budget"
    assert caught.value.problems[0].message == expected


def test_a_budget_that_determines_nothing() -> None:
    text = "tensorpeft: 1\ntarget: all-linear\nrank: 2\nupdate: B[d_out, r] * g[layer] * A[r, d_in]\n"
    text += "factors: {A: {frozen: true}, B: {frozen: true}, g: {init: zeros}}"
    with pytest.raises(SpecError, match="3 numbers are trained at every rank, so a budget does not determine it"):
        lower(free(text, 100), LLAMA)
