"""The tensors across layers against their formulas: dW of every matrix, the model's output, every gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import tensorpeft as tp
from tests.models import enliven, inputs
from tests.runtime.naive_tensors import FORMULAS, Matrix
from tests.runtime.test_oracle import by_adapter, by_formula, errors, measured, named_factors, with_extras
from tests.structures import model

ATTENTION = ["query", "key", "value", "out"]
SPLIT = {"modes": ["d_out = o1(2) * o2(4) * o3", "d_in = i1(4) * i2(2) * i3"]}
CASES = [
    *(
        (name, architecture, {"matrices": ATTENTION})
        for name in ("lorta", "lorta_peft", "lorta_litgpt", "lotr")
        for architecture in ("llama", "gpt2", "bert")
    ),
    *((name, "gpt2", {"matrices": [*ATTENTION, "fc1", "fc2"]}) for name in ("fact_tt", "fact_tk", "lotr")),
    *((name, "bert", {"matrices": ATTENTION}) for name in ("fact_tt", "fact_tk")),
    ("nola", "gpt2", {"matrices": ATTENTION, "rank": {"r": 5, "m": 7, "s": 2}}),
    *(("loretta_rep", architecture, {"matrices": ATTENTION, **SPLIT}) for architecture in ("llama", "gpt2")),
]


def formula(adapter: tp.Adapter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """dW of every module."""
    width = dict(adapter.network.model.sizes)["width"]
    order = dict.fromkeys(site.matrix for site in sorted(adapter.sites, key=lambda site: ROLES.index(site.matrix)))
    one = {site.matrix: site for site in adapter.sites}
    matrices = tuple(Matrix(name, one[name].d_out, one[name].d_in, one[name].heads or 0, width) for name in order)
    found: dict[str, Tensor] = {}
    for site in adapter.sites:
        mine = next(matrix for matrix in matrices if matrix.name == site.matrix)
        change = FORMULAS[adapter.spec.name](tensors, replace(mine, others=matrices), site.layer)
        whole = change.new_zeros(site.module_d_out, site.d_in)
        rows = torch.from_numpy(site.row_indices())
        found[site.module] = found.get(site.module, 0) + whole.index_add(0, rows, change)
    return found


ROLES = ("query", "key", "value", "out", "fc1", "fc2")


@pytest.mark.parametrize(("name", "architecture", "overrides"), CASES, ids=[f"{n}-{a}-{len(o)}" for n, a, o in CASES])
def test_equals_the_formula(name: str, architecture: str, overrides: dict[str, object]) -> None:
    base, x = model(architecture), inputs(architecture)
    adapter = tp.attach(base, tp.load_spec(name, **overrides))
    enliven(adapter)
    leaves = {n: f.detach().clone().requires_grad_(f.requires_grad) for n, f in named_factors(adapter).items()}
    dense = formula(adapter, leaves)
    for path, change in dense.items():
        assert (adapter.delta(path) - change).norm() <= 1e-12 * change.norm(), path
    twin = model(architecture)
    extras = with_extras(adapter, twin)
    with by_formula(twin, dense):
        truth = measured(twin, x, {**leaves, **extras})
    found = errors(by_adapter(base, adapter, x), truth)
    assert max(found.values()) <= 1e-12, found
