"""What records a model once and runs it many times: torch.compile, and CUDA graphs, for which the meta device stands in.

A forward pass that a CUDA graph can record reads nothing from the device, takes nothing from the host, and does the same each
time. On the meta device there is nothing to read, and every tensor that comes from the host is told by its device.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tensorpeft as tp
from tests.models import build, inputs, randomise, run
from tests.runtime.every import every
from tests.runtime.test_life import attached, gradients

SPECS = ["lora", "lorta", "vera", "partial_lora", "lori", "shared_a", "ia3", "randlora", "c3a", "quanta"]


class Recorder(TorchDispatchMode):
    """What was done, and with which shapes; it refuses tensors that are not on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[torch.Size]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
        assert all(tensor.is_meta for tensor in tensors), f"{function} meets a tensor of the host"
        self.seen.append((str(function), [tensor.shape for tensor in tensors]))
        return out


def recorded(step: Any) -> list[tuple[str, list[torch.Size]]]:
    with Recorder() as recorder:
        step()
    return recorder.seen


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("spec", [*SPECS, "every kind of site"])
def test_a_step_takes_nothing_from_the_host_and_is_the_same_each_time(spec: str, gradients: bool) -> None:
    if spec == "every kind of site":
        model, adapter, x = every()
    else:
        model, x = build("bert"), inputs("bert")
        adapter = tp.attach(model, spec)
    model.to("meta")
    x, ids = x.to("meta"), torch.tensor([2, 0, 1])

    def step() -> None:
        with contextlib.nullcontext() if gradients else torch.no_grad():
            y = model(x)
            y = y if isinstance(y, Tensor) else y[0]
            if gradients:
                torch.autograd.grad(y.sum(), list(adapter.parameters()))

    with adapter.tasks(ids) if adapter.spec.tasks else contextlib.nullcontext():
        step()  # constants are put on the device
        first = recorded(step)
        assert len(first) > len(adapter.sites)
        assert recorded(step) == first


def test_what_was_made_before_a_capture_is_made_again_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer recorded by itself: a replay must not read memory that the graph did not fill."""
    model, _ = attached("llama", "lorta")
    module, x = model.model.layers[0].self_attn.q_proj, torch.randn(2, 3, 64, dtype=torch.float64)
    made = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            made.append(str(function))
            return out

    def count() -> int:
        made.clear()
        with torch.no_grad(), Products():
            module(x)
        return len(made)

    alone, again = count(), count()
    assert again < alone
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert (count(), count()) == (alone, again)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert count() == alone


@pytest.mark.parametrize(("spec", "gradients"), [("lorta", True), ("partial_lora", False)])
def test_another_adapter_of_a_spec_needs_no_compilation(spec: str, gradients: bool) -> None:
    torch._dynamo.reset()
    model, adapter = attached("llama", spec, torch.float32)
    compiled, x = torch.compile(model, fullgraph=True, backend="aot_eager"), inputs("llama")

    def outputs(model: nn.Module) -> Tensor:
        with contextlib.nullcontext() if gradients else torch.no_grad():
            return run(model, x)

    before = outputs(compiled)
    adapter.detach()
    other = tp.attach(model, adapter.spec)
    randomise(other, seed=9)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = outputs(compiled)
        if gradients:
            found.square().sum().backward()
    grads = [parameter.grad for parameter in other.parameters()]
    assert torch.allclose(found, outputs(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before, rtol=1e-2)
    if gradients:
        truth = torch.autograd.grad(outputs(model).square().sum(), list(other.parameters()))
        assert all(torch.allclose(g, t, rtol=1e-3, atol=1e-4) for g, t in zip(grads, truth, strict=True))


def test_lengths_and_plans_of_their_own_need_no_compilation() -> None:
    """What runs between two calls of a compiled model makes plans for other lengths, of which the compiler must not know."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    randomise(tp.attach(model, tp.load_spec("lora", rank=2, matrices=["all-linear"])))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for number, (batch, tokens) in enumerate([(3, 7), (2, 5), (4, 19), (5, 40)]):
        x = torch.randn(batch, tokens, 6)
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            found = compiled(x)
        assert torch.allclose(found, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # the compiler looks at each layer's input
def test_layers_that_are_compiled_by_themselves() -> None:
    torch._dynamo.reset()
    model, adapter = attached("llama", "lorta", torch.float32)
    x = inputs("llama")
    truth, grads = run(model, x), gradients(model, adapter, x)
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        found = gradients(model, adapter, x)
        assert torch.allclose(run(model, x), truth, rtol=1e-4, atol=1e-5)
        assert all(torch.allclose(found[name], grads[name], rtol=1e-3, atol=1e-4) for name in grads)


def test_traced_by_torch_jit() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), torch.randn(4, 6).double()
    randomise(tp.attach(model, tp.load_spec("lora", rank=2, matrices=["all-linear"])))
    assert torch.allclose(torch.jit.trace(model, (x,))(2 * x), model(2 * x), rtol=1e-12)


def test_every_kind_of_site_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    model, adapter, x = every()
    factors = list(adapter.parameters())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found, truth = compiled(x), model(x)
    assert torch.allclose(found, truth, rtol=1e-10)
    ours, its = (torch.autograd.grad(y.square().sum(), factors) for y in (found, truth))
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(ours, its, strict=True))
