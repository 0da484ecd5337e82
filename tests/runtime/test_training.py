"""What holds in training alone: dropout, learning rates of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tensorpeft as tp
from tests.models import build, inputs, randomise, run
from tests.structures import model

P = 0.4
HEAD = "tensorpeft: 1\ntarget: {matrices: [query, value]}\n"
DROPPED = {
    "the input": HEAD + "structure: matrix\nrank: 3\ndropout: 0.4",
    "a bond": HEAD + "structure: matrix\nrank: 3\ndropout: {r: 0.4}",
    "both": HEAD + "structure: matrix\nrank: 3\ndropout: {x: 0.2, r: 0.4}",
    "bonds between several": HEAD + "rank: {r: 3, s: 4}\ndropout: {r: 0.4, s: 0.3}\nfactors: {B: {init: zeros}}\n"
    "update: B[matrix, layer, d_out, s] * M[matrix, s, r] * A[layer, r, d_in]",
    "a bond of a ring": HEAD + "rank: {a: 2, b: 3}\ndropout: {b: 0.4}\nfactors: {B: {init: zeros}}\n"
    "update: B[layer, d_out, a, b] * M[matrix, a] * A[b, d_in]",
    "masked columns": HEAD + "structure: matrix\nrank: 3\ndropout: {x: 0.4, r: 0.2}\nmask: {'A[d_in]': keep(0.5)}",
    "tasks": HEAD + "tasks: 3\nrank: 3\ndropout: {x: 0.3, r: 0.2}\nfactors: {B: {init: zeros}}\n"
    "update: B[task, matrix, layer, d_out, r] * A[r, d_in]",
    "the base weight": HEAD + "rank: 3\ndropout: 0.4\nfactors: {B: {init: zeros}}\n"
    "update: W[d_out, d_in] * B[matrix, layer, d_out, r] * A[layer, r, d_in]",
}


def loss(base: nn.Module, adapter: tp.Adapter, x: Tensor) -> Tensor:
    """Of fixed masks."""
    torch.manual_seed(5)
    if not adapter.spec.tasks:
        return run(base, x).square().sum()
    with adapter.tasks(torch.tensor([2, 0, 1])):
        return run(base, x).square().sum()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", DROPPED)
def test_the_gradient_is_the_slope(name: str, architecture: str) -> None:
    """Along a random direction, between two points so near that the masks are the only other thing that could matter."""
    base, x = model(architecture), inputs(architecture)
    adapter = tp.attach(base, tp.load_spec(DROPPED[name]))
    randomise(adapter)
    without = loss(base, adapter, x)
    adapter.train()
    value = loss(base, adapter, x)
    assert not torch.allclose(value, without, rtol=1e-6)
    torch.manual_seed(6)
    parameters = list(adapter.parameters())
    directions = [torch.randn_like(parameter) for parameter in parameters]
    gradients = torch.autograd.grad(value, parameters)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    found = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=step)
            found.append(loss(base, adapter, x))
    assert torch.allclose((found[0] - found[1]) / 2e-5, slope, rtol=1e-4, atol=1e-6)
    adapter.eval()
    with torch.no_grad():
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.add_(direction, alpha=1e-5)
    assert torch.allclose(loss(base, adapter, x), without, rtol=1e-8)


@pytest.mark.parametrize(("dropped", "where"), [("x", "A"), ("r", "B")])
def test_what_is_dropped_is_zero_and_what_is_left_is_scaled(dropped: str, where: str) -> None:
    """With an identity behind the activation that is dropped, the update shows that activation."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8, bias=False)).double()
    text = f"tensorpeft: 1\ntarget: all-linear\nstructure: matrix\nrank: 8\ndropout: {{{dropped}: {P}}}"
    adapter = tp.attach(base, tp.load_spec(text))
    with torch.no_grad():
        adapter.factors["A"].copy_(torch.eye(8).view_as(adapter.factors["A"]))
        adapter.factors["B"].copy_(torch.eye(8).view_as(adapter.factors["B"]))
    x = torch.rand(500, 8, dtype=torch.float64) + 1
    adapter.train()
    with torch.no_grad():
        update = base(x) - x @ base[0].weight.t()
    zero = update.abs() < 1e-12
    assert abs(zero.double().mean().item() - P) < 0.03
    assert torch.allclose(update[~zero], (x / (1 - P))[~zero])
    adapter.eval()
    assert torch.allclose(base(x), x @ base[0].weight.t() + x)


def test_sites_that_read_one_tensor_drop_the_same_of_it() -> None:
    base = build("llama", torch.float64)
    attention = base.model.layers[0].self_attn
    adapter = tp.attach(base, tp.load_spec("lora", rank=64, matrices=["query", "key"], dropout=P))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            eye = torch.eye(64)[: parameter.shape[-2]] if "B" in name else torch.eye(64)
            parameter.copy_(eye.expand_as(parameter))
    adapter.train()
    x = torch.rand(2, 9, 64, dtype=torch.float64) + 1
    query = attention.q_proj(x) - x @ attention.q_proj.weight.t()
    key = attention.k_proj(x) - x @ attention.k_proj.weight.t()
    assert torch.allclose(query[..., :32], key)
    assert (key.abs() < 1e-12).any()


def test_learning_rates_of_their_own() -> None:
    text = HEAD + "structure: matrix\nrank: 3\nfactors: {B: {init: zeros, lr: 16}}\ntrain: [norms]"
    base = build("llama")
    adapter = tp.attach(base, tp.load_spec(text))
    groups = adapter.parameter_groups(0.01)
    assert [group["lr"] for group in groups] == [0.16, 0.01]
    of_b, others = ([id(p) for p in group["params"]] for group in groups)
    assert of_b == [id(p) for name, p in adapter.named_parameters() if name.startswith("factors.B")]
    norms = [id(p) for name, p in base.named_parameters() if "norm" in name]
    assert others == [id(adapter.factors["A"]), *norms]
    before = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
    torch.optim.SGD(groups).zero_grad()
    optimizer = torch.optim.SGD(groups)
    run(base, inputs("llama")).square().sum().backward()
    optimizer.step()
    moved = {name: (p - before[name]).norm() / p.grad.norm() for name, p in adapter.named_parameters() if p.grad.any()}
    assert {round(step.item(), 6) for name, step in moved.items() if ".B" in name} == {0.16}
    assert {round(step.item(), 6) for name, step in moved.items() if "norm" in name} == {0.01}
