"""What the interpreter does at each site, counted: exact figures, which no machine's noise moves."""

from __future__ import annotations

import copy

import pytest

import tensorpeft as tp
from tests.benchmarks import calls


@pytest.mark.parametrize("name", calls.ROWS)
def test_calls_per_adapted_module(name: str) -> None:
    decoding, training = calls.ours(name)
    most = calls.ROWS[name][4]
    assert 0 < decoding <= most[0]
    assert 0 < training <= most[1]


@pytest.mark.parametrize("name", calls.ROWS)
def test_the_first_forward_finds_its_plan_and_its_code(name: str) -> None:
    """Planning and emission are attach's: what is left to the first pass are shapes that it has not seen."""
    _, spec, settings, _, _ = calls.ROWS[name]
    bare = calls.base().eval()
    calls.decode(bare)  # imports of the library's own
    model = copy.deepcopy(bare)
    tp.attach(model, tp.load_spec(spec, **settings))
    first, second = (calls.calls(calls.decode, model, warm=0) for _ in range(2))
    assert first <= 3 * second
