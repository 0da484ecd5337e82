"""The generator: frozen values, independence of everything but (seed, name, index), and the right distributions."""

from __future__ import annotations

import itertools
from hashlib import sha256

import numpy as np
import pytest
from scipy import special, stats

from tensorpeft.numerics import generator as random

MODULUS = 1 << 64


def mix(z: int) -> int:
    """The finaliser of splitmix64, in Python's integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % MODULUS
    return z ^ (z >> 31)


def word(coordinate: str | int) -> int:
    if isinstance(coordinate, int):
        return coordinate
    return int.from_bytes(sha256(coordinate.encode()).digest()[:8], "little")


def by_definition(seed: int, name: str, index: tuple[str | int, ...]) -> int:
    state = mix(mix(seed) ^ word(name))
    for coordinate in index:
        state = mix((state + 0x9E3779B97F4A7C15 * (word(coordinate) + 1)) % MODULUS)
    return state


def test_frozen_values() -> None:
    """They must never change: adapters that are stored as a seed would become other adapters."""
    state = random.stream(0, "A", ("query", 3))
    assert state == 9702978186706542198
    assert [hex(word) for word in random.bits(state, [np.arange(3)])] == [
        "0x7139d8a14eccefdb",
        "0xaa9c112d29218d50",
        "0xb8ad524bd2eed1d3",
    ]
    grid = np.ix_(np.arange(2), np.arange(2))
    assert random.uniform(state, grid).tolist() == [
        [0.8203228469599102, 0.4877371695260245],
        [0.4890642626412314, 0.3377870499533723],
    ]
    assert random.standard_normal(state, grid).tolist() == [
        [0.9165961433176727, -0.030743199700049163],
        [-0.027415262283306454, -0.4185102418781651],
    ]


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5])
def test_equals_its_definition(seed: int) -> None:
    rows, columns = [0, 5, 4095], [2, 3]
    found = random.bits(random.stream(seed, "B", ("gate", 31)), np.ix_(rows, columns))
    for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        assert int(found[i, j]) == by_definition(seed, "B", ("gate", 31, row, column))


def test_a_part_of_a_grid_has_the_numbers_of_the_whole() -> None:
    state, rows, columns = random.stream(3, "A"), np.array([7, 2, 30]), np.array([1, 0])
    whole = random.standard_normal(state, np.ix_(np.arange(40), np.arange(5)))
    assert np.array_equal(random.standard_normal(state, np.ix_(rows, columns)), whole[np.ix_(rows, columns)])


def test_every_coordinate_counts() -> None:
    names = [("A", ()), ("A_", ()), ("A", ("query",)), ("A", (0,)), ("A", (0, 0)), ("A", (1, 0)), ("A", (0, 1))]
    states = {random.stream(seed, name, index) for seed in (0, 1) for name, index in names}
    assert len(states) == 2 * len(names)


def test_no_seed_is_too_large() -> None:
    assert random.stream(2**64 + 9, "A") == random.stream(9, "A")


def test_uniform_numbers_are_uniform() -> None:
    for seed in range(3):
        drawn = random.uniform(random.stream(seed, "A", ("query", 0)), np.ix_(np.arange(300), np.arange(100)))
        assert 0 <= drawn.min() < drawn.max() < 1
        assert np.array_equal(drawn * 2**53, np.floor(drawn * 2**53))
        assert stats.kstest(drawn.ravel(), "uniform").pvalue > 1e-3
        for ordered in (drawn, drawn.T):  # neighbours in either direction are independent
            assert abs(np.corrcoef(ordered[:-1].ravel(), ordered[1:].ravel())[0, 1]) < 4 / np.sqrt(drawn.size)


def test_normal_numbers_are_normal() -> None:
    for seed in range(3):
        drawn = random.standard_normal(random.stream(seed, "A"), np.ix_(np.arange(200), np.arange(200))).ravel()
        assert stats.kstest(drawn, "norm").pvalue > 1e-3
        assert abs(stats.skew(drawn)) < 0.06
        assert abs(stats.kurtosis(drawn)) < 0.12


def test_the_normal_quantile_has_sixteen_digits() -> None:
    index = [np.arange(200_000)]
    state = random.stream(5, "tails")
    cells = (random.bits(state, index) >> np.uint64(12)).astype(np.float64)
    exact = special.ndtri((cells + 0.5) * 2.0**-52)
    np.testing.assert_allclose(random.standard_normal(state, index), exact, rtol=1e-13, atol=1e-15)


def test_the_far_tails_are_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = np.array([0, 2**64 - 1], dtype=np.uint64)
    monkeypatch.setattr(random, "bits", lambda state, indices: ends)
    low, high = random.standard_normal(0, [np.arange(2)])
    assert low == -high == pytest.approx(special.ndtri(2.0**-53), rel=1e-15)
