"""Adapters whose factors start from the base weight, on live models: filled at attach, saved, filled again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import tensorpeft as tp
from tests.models import inputs, randomise, run
from tests.network.test_spectral import PISSA
from tests.structures import model

# LoRA-XS: frozen outer factors, which span the first singular vectors of each weight
LORA_XS = """\
tensorpeft: 1
target: {matrices: [query, value]}
rank: {r: 4, s: 4}
start: nonzero
update: U[matrix, layer, d_out, r] * R[matrix, layer, r, s] * V[layer, s, matrix, d_in]
factors:
  U: {init: "svd(W).U[:r] * S", frozen: true}
  R: {init: identity}
  V: {init: "svd(W).V[:s]", frozen: true}
"""
# OLoRA, and the last singular vectors
OLORA = """\
tensorpeft: 1
target: {matrices: [query, value]}
rank: {r: 4}
start: nonzero
update: B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]
factors: {B: {init: "qr(W).Q[:r]"}, A: {init: "qr(W).R[:r]"}}
"""
MILORA = PISSA.replace("[:r]", "[-r:]").replace("start: subtract", "start: nonzero")
STARTS = {
    "pissa": (PISSA.replace("start: subtract", "start: nonzero"), slice(4)),
    "milora": (MILORA, slice(-4, None)),
    "lora_xs": (LORA_XS, slice(4)),
    "olora": (OLORA, None),
}


def weights(base: torch.nn.Module, adapter: tp.Adapter) -> dict[str, Tensor]:
    """W of each module that has sites, (d_out, d_in), and zero in the rows of a fused one that are of no site."""
    found = {}
    for site in adapter.sites:
        module = base.get_submodule(site.module)
        weight = module.weight.T if hasattr(module, "nf") else module.weight
        rows = torch.from_numpy(site.row_indices())
        found.setdefault(site.module, []).append((rows, weight.detach()[rows]))
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", STARTS)
def test_they_start_from_the_weight(name: str, architecture: str) -> None:
    text, kept = STARTS[name]
    base = model(architecture)
    adapter = tp.attach(base, text)
    for path, parts in weights(base, adapter).items():
        delta = adapter.delta(path)
        for rows, weight in parts:
            if kept is None:
                q, r = torch.linalg.qr(weight)
                expected = q[:, :4] @ r[:4]
            else:
                u, s, vt = torch.linalg.svd(weight, full_matrices=False)
                expected = (u[:, kept] * s[kept]) @ vt[kept]
            assert (delta[rows] - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_subtracted_they_start_at_zero_and_train_from_there(architecture: str) -> None:
    base, x = model(architecture), inputs(architecture)
    with torch.no_grad():
        expected = run(base, x)
    adapter = tp.attach(base, PISSA)
    assert all(not adapter.delta(site.module).any() for site in adapter.sites)
    assert (run(base, x) - expected).norm() <= 1e-12 * expected.norm()
    path, parts = next(iter(weights(base, adapter).items()))
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.mul_(2 if ".B" in name else 1)
    u, s, vt = torch.linalg.svd(parts[0][1], full_matrices=False)
    assert (adapter.delta(path)[parts[0][0]] - (u[:, :4] * s[:4]) @ vt[:4]).norm() <= 1e-12 * s[0]


@pytest.mark.parametrize("text", [PISSA, LORA_XS])
def test_they_are_saved_and_loaded_without_the_weight(text: str, tmp_path: Path) -> None:
    base, x = model("llama"), inputs("llama")
    adapter = tp.attach(base, text)
    randomise(adapter)
    with torch.no_grad():
        expected = run(base, x)
    adapter.save(tmp_path)
    adapter.detach()
    other = model("llama")
    with torch.no_grad():
        q_proj = other.get_submodule("model.layers.0.self_attn.q_proj").weight
        saved = q_proj.clone()
        q_proj.zero_()  # what was decomposed is not looked at again
        tp.load(other, tmp_path)
        q_proj.copy_(saved)
        assert torch.equal(run(other, x), expected)


def test_reset_takes_the_weights_of_before_any_merge() -> None:
    base = model("gpt2")
    adapter, merged = tp.attach(base, LORA_XS), tp.attach(base, tp.load_spec("lora", alpha=99.0), name="merged")
    randomise(merged)
    start = {name: value.clone() for name, value in adapter.state_dict().items()}
    assert {"factors.U", "factors.V", "factors.R"} == {*start}
    randomise(adapter)
    merged.merge()
    adapter.reset_parameters()
    assert all(torch.equal(value, start[name]) for name, value in adapter.state_dict().items())


def test_a_weight_without_a_decomposition() -> None:
    base = model("llama")
    with torch.no_grad():
        base.get_submodule("model.layers.1.self_attn.v_proj").weight[3, 4] = torch.nan
    before = {name: id(value) for name, value in base.state_dict(keep_vars=True).items()}
    with pytest.raises(tp.AdapterError) as caught:
        tp.attach(base, PISSA)
    assert str(caught.value) == (
        "the weight of value of layer 1 (model.layers.1.self_attn.v_proj) has values that are not finite, "
        "so it has no decomposition"
    )
    assert before == {name: id(value) for name, value in base.state_dict(keep_vars=True).items()}
    assert not any(module._forward_hooks for module in base.modules())
