"""Constants in emitted code, and constant positions that it is given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from tensorpeft.emission.index import Index
from tensorpeft.emission.intern import module


def times(constant: float) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.call_method("mul", (graph.placeholder("x"), constant)))
    return module(graph, "Times")


@pytest.mark.parametrize(("constant", "dtype"), [(1, torch.int64), (1.0, torch.float32), (True, torch.int64)])
def test_constants_of_other_types_are_other_code(constant: float, dtype: torch.dtype) -> None:
    """They compare equal, and give results of other dtypes."""
    others = [times(other) for other in (1, 1.0, True) if type(other) is not type(constant)]
    code = times(constant)
    assert code is times(constant)
    assert code not in others
    found: Tensor = code(torch.arange(3))
    assert found.dtype == dtype


def test_positions_placed_in_inference_mode_serve_in_training() -> None:
    """Autograd saves them, which it refuses of tensors that were made in inference mode."""
    index = Index.of(np.array([2, 0]))
    with torch.inference_mode():
        assert index.on(torch.device("cpu")).tolist() == [2, 0]
    x = torch.arange(3.0, requires_grad=True)
    x.index_select(0, index.on(x.device)).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 0, 1]
