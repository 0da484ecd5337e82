"""PEFT's layers with the same factors: the same dW, and the same output of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import tensorpeft as tp
from tensorpeft.network.shapes import Site
from tests.models import inputs, run
from tests.runtime.reference import modes_at, stored_at
from tests.structures import model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # of transformers, asked by PEFT

Values = dict[str, Tensor]


def lora(layer: nn.Module) -> Values:
    return {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}


def vera(layer: nn.Module) -> Values:
    return {
        "A": layer.vera_A["default"][:, : layer.in_features],
        "B": layer.vera_B["default"][: layer.out_features],
        "d": layer.vera_lambda_d["default"],
        "b": layer.vera_lambda_b["default"],
    }


def loha(layer: nn.Module) -> Values:
    names = {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"}
    return {ours: getattr(layer, theirs)["default"] for ours, theirs in names.items()}


def lokr(layer: nn.Module) -> Values:
    names = {"W1": "lokr_w1", "W2a": "lokr_w2_a", "W2b": "lokr_w2_b"}
    return {ours: getattr(layer, theirs)["default"] for ours, theirs in names.items()}


def adalora(layer: nn.Module) -> Values:
    return {"P": layer.lora_B["default"], "E": layer.lora_E["default"][:, 0], "Q": layer.lora_A["default"]}


def randlora(layer: nn.Module) -> Values:
    """PEFT pairs A flattened over (r, n) with B flattened over (n, r): B's entries are read as (r, n) to say what it does."""
    a, b = layer.randlora_A["default"], layer.randlora_B["default"]
    r, n = layer.randlora_lambda["default"].shape
    return {
        "A": a[:, 0, : layer.in_features],
        "B": b[: layer.out_features, :n].reshape(layer.out_features, r, n),
        "L": layer.randlora_lambda["default"],
        "G": layer.randlora_gamma["default"],
    }


@dataclass(frozen=True)
class Method:
    """A method in both libraries: a spec, a config, and the factors that a layer of PEFT's comes down to."""

    spec: str
    config: Callable[..., peft.PeftConfig]
    settings: dict[str, object]
    factors: Callable[[nn.Module], Values]


LOKR = """
update: W1[matrix, layer, o1, i1] * W2a[matrix, layer, o2, r] * W2b[matrix, layer, r, i2]
modes: [d_out = o1 * o2, d_in = i1 * i2]
rank: {r: 2}
factors: {W1: {init: zeros}}
alpha: 5
"""
VERA = """
update: b[matrix, layer, d_out] * B[d_out, r] * d[matrix, layer, r] * A[r, d_in]
rank: {r: 6}
factors: {A: {frozen: true}, B: {frozen: true}, d: {init: constant(0.1)}, b: {init: zeros}}
ragged: slice
"""
LOHA = """
update: B1[matrix, layer, d_out, r] * A1[matrix, layer, r, d_in] * B2[matrix, layer, d_out, s] * A2[matrix, layer, s, d_in]
rank: {r: 3, s: 3}
factors: {B2: {init: zeros}}
alpha: 6
"""  # alpha / r is 2: PEFT rounds it to float32
ADALORA = """
update: P[matrix, layer, d_out, r] * E[matrix, layer, r] * Q[matrix, layer, r, d_in]
rank: {r: 3}
factors: {E: {init: zeros}}
alpha: 5
scale: alpha / (r + 0.00001)
"""
RANDLORA = """
update: B[d_out, r, n] * L[matrix, layer, r, n] * A[r, d_in] * G[matrix, layer, n, d_in]
rank: {r: 7, n: 'ceil(min(d_in, d_out) / r)'}
factors: {A: {frozen: true}, B: {frozen: true}, L: {init: zeros}}
ragged: slice
alpha: 5
scale: alpha / r
"""
METHODS = {
    "lora": Method("structure: matrix\nrank: 3\nalpha: 5", peft.LoraConfig, {"r": 3, "lora_alpha": 5}, lora),
    "vera": Method(VERA, peft.VeraConfig, {"r": 6, "projection_prng_key": 1}, vera),
    "loha": Method(LOHA, peft.LoHaConfig, {"r": 3, "alpha": 6}, loha),
    "lokr": Method(LOKR, peft.LoKrConfig, {"r": 2, "alpha": 5}, lokr),
    "adalora": Method(ADALORA, peft.AdaLoraConfig, {"init_r": 3, "lora_alpha": 5, "total_step": 1}, adalora),
    "randlora": Method(RANDLORA, peft.RandLoraConfig, {"r": 7, "randlora_alpha": 5}, randlora),
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
CONV1D = ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
CASES = [
    *((method, "llama", LINEAR) for method in ("lora", "vera", "loha", "lokr", "adalora")),
    *((method, "gpt2", CONV1D) for method in ("lora", "vera", "adalora")),
    ("randlora", "llama", ["q_proj", "up_proj"]),  # where d_in is the smaller side: the other way round is another spec
    ("randlora", "gpt2", CONV1D[:2]),
]


def with_peft(architecture: str, method: Method, modules: list[str]) -> nn.Module:
    """A model with PEFT's layers in it, every one of their numbers random."""
    own = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    config = method.config(target_modules=modules, **own, **method.settings)
    base = peft.get_peft_model(model(architecture), config).base_model.model.double()
    generator = torch.Generator().manual_seed(4)
    theirs = {id(t): t for layer in layers(base).values() for t in adapter_tensors(layer)}
    for tensor in theirs.values():
        tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.3
    return base.eval()


def layers(base: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in base.named_modules() if isinstance(module, BaseTunerLayer)}


def adapter_tensors(layer: nn.Module) -> Iterator[Tensor]:
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        if not name.startswith("base_layer") and "ranknum" not in name:
            yield tensor


@torch.no_grad()
def copied(
    adapter: tp.Adapter, theirs: dict[str, nn.Module], method: Method, part: Callable[[Site, Values], Values]
) -> None:
    """Give the adapter the factors of PEFT's layers."""
    tensors = {block.name: adapter.factors[block.name] for block in adapter.network.blocks}
    references = {f.factor: f for product in adapter.spec.update.products for f in product.factors}
    for site in adapter.sites:
        for name, value in part(site, method.factors(theirs[site.module])).items():
            stored_at(adapter, tensors, references[name], site, modes_at(adapter, site)).copy_(value)
    adapter.forget()


def compare(architecture: str, name: str, modules: list[str], part: Callable[[Site, Values], Values]) -> None:
    method, x = METHODS[name], inputs(architecture)
    other = with_peft(architecture, method, modules)
    base = model(architecture)
    matrices = ", ".join(modules)
    adapter = tp.attach(base, tp.load_spec(f"tensorpeft: 1\ntarget: {{matrices: [{matrices}]}}\n{method.spec}\n"))
    theirs = layers(other)
    assert {site.module for site in adapter.sites} == set(theirs)
    copied(adapter, theirs, method, part)
    for path, layer in theirs.items():
        expected = layer.get_delta_weight("default")
        expected = expected.T if architecture == "gpt2" else expected
        assert (adapter.delta(path) - expected).norm() <= 1e-12 * expected.norm(), path
    with torch.no_grad():
        ours, truth = run(base, x), run(other, x)
    assert (ours - truth).norm() <= 1e-12 * truth.norm()
    with adapter.disabled(), torch.no_grad():
        assert not torch.allclose(run(base, x), truth, rtol=1e-4)


@pytest.mark.parametrize(("name", "architecture", "modules"), CASES, ids=[f"{n}-{a}" for n, a, _ in CASES])
def test_equals_peft(name: str, architecture: str, modules: list[str]) -> None:
    compare(architecture, name, modules, lambda site, values: values)


def test_lora_on_a_fused_module_is_three_matrices_of_one_a() -> None:
    """PEFT sees one matrix in GPT-2's c_attn: its B is ours of query, key and value one below the other."""

    def thirds(site: Site, values: Values) -> Values:
        return {"A": values["A"], "B": values["B"][torch.from_numpy(site.row_indices())]}

    compare("gpt2", "lora", ["c_attn"], thirds)
