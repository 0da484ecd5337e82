"""Launches, saved bytes, FLOPs and peak memory of a training step over the frozen base: what the runtime is held to."""

from __future__ import annotations

import pytest

from tests.benchmarks.counted import ALL, CASES, Counts, frozen_base, ours, over_base, per_layer

# launches exactly; at most so much of the base's saved bytes, of its FLOPs as torch counts them, and of all FLOPs
WANTED = {
    "LoRA r=8, q and v": (10, 0.072, 0.006, 0.008),
    "LoRA r=8, all seven": (37, 0.34, 0.026, 0.037),
    "LoRTA r=8, q and v": (10, 0.072, 0.008, 0.008),
    "VeRA r=256, q and v": (16, 0.18, 0.13, 0.13),
    "LoHa r=8, q and v": (10, 0.37, 0.2653, 0.2653),
    "LoKr r=8, q and v": (17, 0.15, 0.04, 0.04),
    "DoRA r=8, q and v": (30, 0.19, 0.007, 0.0104),
    "IA3, k, v and down": (18, 0.3, 0, 0),  # products alone count
}


@pytest.fixture(scope="module")
def base() -> Counts:
    return per_layer(frozen_base)


@pytest.mark.parametrize("name", CASES)
def test_costs_no_more(name: str, base: Counts) -> None:
    launches, saved, flops, all_flops = WANTED[name]
    found = over_base(CASES[name][0], base)
    assert found["launches"] == launches
    assert 0 < found["saved"] <= saved
    assert 0 <= found["flops"] <= flops
    assert found["flops"] < found["all_flops"] <= all_flops or found["flops"] == found["all_flops"] <= all_flops


def test_at_its_peak_a_step_holds_what_it_keeps_and_little_more() -> None:
    """LoRA of rank 16 on all linear modules of width 4,096, at 8,192 tokens: an eighth of each."""
    shape = (2, 512)
    base, found = per_layer(frozen_base, shape), per_layer(ours("lora", ALL, 2), shape)
    assert base.peak < found.peak <= base.peak + (found.saved - base.saved) + 0.02 * base.peak
