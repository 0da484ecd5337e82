"""A report says of a model what an attached adapter then has."""

from __future__ import annotations

import pytest

from tensorpeft.language.loader import load_spec
from tensorpeft.pipeline import attach, report
from tests import models

METHODS = ["lora", "lorta", "vera", "partial_lora", "shared_a"]


@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_counts_are_those_of_the_tensors(method, architecture):
    model = models.build(architecture)
    base = sum(parameter.numel() for parameter in model.parameters())
    found = report(load_spec(method), model=model)
    adapter = attach(model, load_spec(method))
    assert found.base == base
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    tensors = [*adapter.parameters(), *adapter.buffers()]
    in_memory = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.is_floating_point()}
    assert found.bytes["factors"] == sum(in_memory.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_config_says_as_much_as_its_model(method):
    model = models.build("llama")
    by_config = report(load_spec(method), model=model.config.to_dict())
    by_model = report(load_spec(method), model=model)
    assert by_config.factors == by_model.factors
    assert by_config.matrices == by_model.matrices
    assert by_config.base == by_model.base


def test_an_adapter_tells_where_it_is():
    adapter = attach(models.build("llama"), load_spec("vera", rank=4))
    assert repr(adapter) == (
        "Adapter(\n"
        "  vera: b[matrix, layer, d_out] * B[d_out, r] * d[matrix, layer, r] * A[r, d_in]\n"
        "  sites: 2 of query, 2 of value\n"
        "  trained: 208\n"
        "  (factors): Factors(\n"
        "    b_d_out64: 1 x 2 x 64\n"
        "    b_d_out32: 1 x 2 x 32\n"
        "    d: 2 x 2 x 4\n"
        "    B, frozen: 64 x 4\n"
        "    A, frozen: 4 x 64\n"
        "  )\n"
        "  (trained_base): TrainedBase()\n"
        ")"
    )
