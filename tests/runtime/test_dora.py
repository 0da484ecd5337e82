"""Factors over the norms of W + dW, beside norms that are taken of the dense matrix in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorpeft as tp
from tests.models import inputs, randomise, run
from tests.planning.test_no_dense import sizes_of
from tests.runtime.reference import updates
from tests.structures import model

HEAD = "tensorpeft: 1\nname: lengths\ntarget: {matrices: %s}\n"
WHOLE = "+ m[matrix, layer, d_out] * W[d_out, d_in] - one * W[d_out, d_in]\n"
ONES = "m: {norm: true}, one: {init: ones, frozen: true}"
SPECS = {
    "lora": (
        "[query, value]",
        f"rank: 3\nupdate: m[matrix, layer, d_out] * B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in] {WHOLE}"
        f"factors: {{{ONES}, B: {{init: zeros}}}}\n",
    ),
    "lora with a scale": (
        "[query, value]",
        "rank: 3\nscale: 0.5\nupdate: m[matrix, layer, d_out] * B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]\n"
        "factors: {m: {norm: true}, B: {init: zeros}}\n",
    ),
    "one cp tensor for the model": (
        "[query, key, value, out]",
        "rank: 3\nupdate: m[matrix, layer, d_out] * M[matrix, r] * L[layer, r] * H[head, r] * D[head_dim, r] * A[width, r] "
        f"{WHOLE}factors: {{{ONES}, D: {{init: zeros}}}}\n",
    ),
    "tucker": (
        "[query, value]",
        "rank: {a: 3, b: 2}\nupdate: m[matrix, layer, d_out] * U[d_out, a] * G[matrix, layer, a, b] * V[d_in, b] "
        f"{WHOLE}factors: {{{ONES}, G: {{init: zeros}}}}\n",
    ),
    "masks": (
        "[query, value]",
        f"rank: 3\nupdate: m[matrix, layer, d_out] * B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in] {WHOLE}"
        f"factors: {{{ONES}, B: {{init: zeros}}}}\nmask: {{'B[d_out]': keep(0.5), 'A[d_in]': keep(0.4)}}\n",
    ),
    "columns": (
        "[query, value]",
        "rank: 3\nupdate: m[matrix, layer, d_in] * B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in] "
        "+ m[matrix, layer, d_in] * W[d_out, d_in] - one * W[d_out, d_in]\n"
        f"factors: {{{ONES}, B: {{init: zeros}}}}\n",
    ),
    "rows and columns": (
        "[query, value]",
        "rank: 3\nupdate: m[matrix, layer, d_out] * n[matrix, layer, d_in] * B[matrix, layer, d_out, r] * A[layer, r, d_in]\n"
        "factors: {m: {norm: true}, n: {norm: true}, B: {init: zeros}}\n",
    ),
    "rows of W scaled by another factor": (
        "[query, value]",
        "rank: 3\nstart: nonzero\nupdate: m[matrix, layer, d_out] * B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in] "
        "+ m[matrix, layer, d_out] * g[layer, d_out] * W[d_out, d_in]\n"
        "factors: {m: {norm: true}, g: {init: normal(0.1)}, B: {init: zeros}}\n",
    ),
    "two products": (
        "[query, value]",
        "rank: {r: 2, s: 3}\nupdate: m[matrix, layer, d_out] * B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in] "
        f"- C[layer, d_out, s] * D[matrix, s, d_in] {WHOLE}"
        f"factors: {{{ONES}, B: {{init: zeros}}, C: {{init: zeros}}}}\n",
    ),
    "W by its magnitude": (
        "[query, value]",
        "rank: 3\nscale: 0.25\nstart: nonzero\n"
        "update: m[matrix, layer, d_out] * B[matrix, layer, d_out, r] * A[layer, r, d_in] "
        "+ m[matrix, layer, d_out] * W[d_out, d_in]\n"
        "factors: {m: {norm: true}, B: {init: zeros}}\n",
    ),
    "W alone": (
        "[query, value]",
        f"update: m[matrix, layer, d_out] * W[d_out, d_in] - one * W[d_out, d_in]\nfactors: {{{ONES}}}\n",
    ),
    "an outer product": (
        "[query, value]",
        f"update: m[matrix, layer, d_out] * u[matrix, layer, d_out] * v[layer, d_in] {WHOLE}"
        f"factors: {{{ONES}, u: {{init: zeros}}}}\n",
    ),
    "no narrow cut": (
        "[query, value]",
        "modes: [d_out = o1(4) * o2, d_in = i1(4) * i2]\n"
        f"update: m[matrix, layer, d_out] * K[layer, o1, i1] * L[matrix, o2, i2] {WHOLE}"
        f"factors: {{{ONES}, K: {{init: zeros}}}}\n",
    ),
}
DENSE = {"no narrow cut"}
CASES = [(name, architecture) for name in SPECS for architecture in ("llama", "gpt2")]


def spec(name: str) -> str:
    target, text = SPECS[name]
    return HEAD % target + text


def prepared(name: str, architecture: str) -> tuple[nn.Module, tp.Adapter]:
    base = model(architecture)
    adapter = tp.attach(base, tp.load_spec(spec(name)))
    randomise(adapter)
    return base, adapter


def tensors(adapter: tp.Adapter) -> dict[str, Tensor]:
    return {**dict(adapter.factors.named_parameters()), **dict(adapter.factors.named_buffers())}


@pytest.mark.parametrize("name", SPECS)
def test_no_dw_is_planned_but_where_no_cut_is_narrow(name: str) -> None:
    _, adapter = prepared(name, "llama")
    assert {each.is_dense for each in adapter.plan.norms} == {name in DENSE}


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_dw_is_that_of_the_dense_norms(name: str, architecture: str) -> None:
    _, adapter = prepared(name, architecture)
    for path, expected in updates(adapter, tensors(adapter)).items():
        assert (adapter.delta(path) - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_forward_and_gradients_are_those_of_the_dense_norms(name: str, architecture: str) -> None:
    base, adapter = prepared(name, architecture)
    x = inputs(architecture)
    trained = dict(adapter.factors.named_parameters())
    found = run(base, x)
    gradients = torch.autograd.grad(found.square().sum(), list(trained.values()))
    leaves = {n: t.detach().clone().requires_grad_(n in trained) for n, t in tensors(adapter).items()}
    dense = updates(adapter, leaves)
    adapter.detach()
    for path, change in dense.items():
        module = base.get_submodule(path)
        weight = module.weight.detach() + (change.T if hasattr(module, "nf") else change)
        del module.weight
        module.weight = weight
    expected = run(base, x)
    assert (found - expected).norm() <= 1e-12 * expected.norm()
    for gradient, other in zip(
        gradients, torch.autograd.grad(expected.square().sum(), [leaves[n] for n in trained]), strict=True
    ):
        assert (gradient - other).norm() <= 1e-9 * other.norm()


@pytest.mark.parametrize("name", ["lora", "no narrow cut"])
def test_a_zero_row_has_the_quotient_one(name: str) -> None:
    base = model("llama")
    weight = base.get_submodule("model.layers.0.self_attn.q_proj").weight
    with torch.no_grad():
        weight[3] = 0
    expected = run(base, inputs("llama")).detach()
    adapter = tp.attach(base, tp.load_spec(spec(name)))
    assert adapter.factors["m_d_out64"][0, 0, 3] == 0
    found = run(base, inputs("llama"))
    assert (found - expected).norm() <= 1e-12 * expected.norm()
    found.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters())
    assert adapter.factors["m_d_out64"].grad[0, 0, 3] == 0
    assert any(parameter.grad.any() for name, parameter in adapter.named_parameters() if ".m" not in name)
    assert adapter.delta("model.layers.0.self_attn.q_proj").isfinite().all()


def lengths(adapter: tp.Adapter, weight: Tensor) -> Tensor:
    """The norms at the first site, of the dense matrix."""
    pair = adapter.factors["B_d_out64"][0, 0] @ adapter.factors["A"][0, 0]
    return (weight + pair).norm(dim=1)


@pytest.mark.parametrize(
    "change",
    [
        lambda weight, module: weight.mul_(2),
        lambda weight, module: setattr(weight, "data", weight.detach().clone() * 2),
        lambda weight, module: setattr(module, "weight", nn.Parameter(weight * 2)),
        lambda weight, module: (delattr(module, "weight"), setattr(module, "weight", weight.detach() * 2)),
    ],
    ids=["in place", "its data", "the parameter", "a plain tensor"],
)
def test_a_weight_that_changes_is_noticed(change: Any) -> None:
    base, adapter = prepared("lora", "llama")
    x, module = inputs("llama"), base.get_submodule("model.layers.0.self_attn.q_proj")
    with torch.no_grad():
        run(base, x)
        change(module.weight, module)
        found = adapter.engine.magnitudes.norms()["m_d_out64"][0, 0]
        expected = lengths(adapter, module.weight)
    assert (found - expected).norm() <= 1e-12 * expected.norm()


def test_norms_of_bfloat16_weights_are_taken_in_float32() -> None:
    base = model("llama").to(torch.bfloat16)
    adapter = tp.attach(base, tp.load_spec(spec("lora")))
    randomise(adapter)
    weight = base.get_submodule("model.layers.0.self_attn.q_proj").weight.detach().double()
    pair = adapter.factors["B_d_out64"][0, 0].double() @ adapter.factors["A"][0, 0].double()
    found, expected = adapter.engine.magnitudes.norms()["m_d_out64"][0, 0], (weight + pair).norm(dim=1)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_a_row_that_dw_cancels_stays_finite() -> None:
    base = model("llama").float()
    adapter = tp.attach(base, tp.load_spec(spec("lora")))
    weight = base.get_submodule("model.layers.0.self_attn.q_proj").weight
    with torch.no_grad():  # the first row of B A is -W's, as well as float32 has it
        adapter.factors["A"][0, 0, 0] = weight[0] * 3
        adapter.factors["B_d_out64"][0, 0, 0, 0] = -1 / 3
    norms = adapter.engine.magnitudes.norms()["m_d_out64"][0, 0]
    assert norms[0] <= 1e-3 * weight[0].norm()
    assert norms.isfinite().all()
    run(base, inputs("llama").float() if inputs("llama").is_floating_point() else inputs("llama")).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters())


def test_no_tensor_is_as_large_as_dw() -> None:
    base, adapter = prepared("lora", "llama")
    x = inputs("llama")
    with adapter.disabled():
        own = sizes_of(base, lambda: run(base, x))
    areas = {site.d_out * site.d_in for site in adapter.sites} - own
    run(base, x).sum().backward()
    assert areas  # else the test could not tell
    assert not sizes_of(base, lambda: run(base, x).sum().backward()) & areas
