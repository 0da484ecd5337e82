"""Options and fixtures that several test packages share."""

from __future__ import annotations

import os

import pytest

# the tests run in several processes, each of small tensors: more threads than cores only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the expected texts; read the difference")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))
