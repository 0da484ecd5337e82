"""The steps that are told are those that are planned."""

from __future__ import annotations

import pytest

from tensorpeft.planning.plan import plan
from tensorpeft.planning.regime import Regime
from tensorpeft.reporting.steps import steps
from tests.reporting.test_drawing import SPECS, network


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("tokens", [1, 4096])
def test_they_cost_what_the_plan_costs(name, tokens):
    planned = plan(network(name), Regime(tokens))
    assert sum(step.flops * step.runs for step in steps(planned)) == planned.flops


def test_bytes():
    """LoRA at a site reads x and A and writes r numbers a token, then reads these and B and writes y."""
    planned = plan(network("lora"), Regime(100))
    found = [(str(step), step.runs, step.bytes) for step in steps(planned)]
    assert found == [
        ("x1[token, r] = x[token, d_in] * A[d_in, r]", 24, 4 * (100 * 768 + 768 * 8 + 100 * 8)),
        ("y[token, d_out] = x1[token, r] * B[r, d_out]", 24, 4 * (100 * 8 + 8 * 768 + 100 * 768)),
    ]
