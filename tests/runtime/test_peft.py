"""PEFT's layers with the same factors: the same dW, and the same output of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import peft
import pytest
import torch
from peft.tuners.c3a.utils import BlockCircularConvolution, get_circulant_fast
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

import tensorpeft as tp
from tensorpeft.model.shape import Site
from tests.models import build, inputs, run, widen_norms
from tests.runtime.reference import modes_at, stored_at
from tests.runtime.test_oracle import by_formula
from tests.structures import model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # of transformers, asked by PEFT

Values = dict[str, Tensor]


def named(layer: nn.Module, names: dict[str, str]) -> Values:
    """Our names of factors, and the attributes of PEFT's layer that they are."""
    return {ours: getattr(layer, theirs)["default"] for ours, theirs in names.items()}


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
    return named(layer, {"B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b"})


def lokr(layer: nn.Module) -> Values:
    return named(layer, {"W1": "lokr_w1", "W2a": "lokr_w2_a", "W2b": "lokr_w2_b"})


def lokr_full(layer: nn.Module) -> Values:
    return named(layer, {"W1": "lokr_w1", "W2": "lokr_w2"})


def lokr_both(layer: nn.Module) -> Values:
    return named(layer, {"W1a": "lokr_w1_a", "W1b": "lokr_w1_b", "W2a": "lokr_w2_a", "W2b": "lokr_w2_b"})


def adalora(layer: nn.Module) -> Values:
    return {"P": layer.lora_B["default"], "E": layer.lora_E["default"][:, 0], "Q": layer.lora_A["default"]}


def randlora(layer: nn.Module) -> Values:
    """PEFT pairs A flattened over (r, n) with B flattened over (n, r): B's entries are read as (r, n) to say what it does.

    So matrices of other n share no B in PEFT, though it is the same tensor: each case has one n.
    """
    a, b = layer.randlora_A["default"], layer.randlora_B["default"]
    small, large = sorted((layer.in_features, layer.out_features))
    r, n = layer.randlora_lambda["default"].shape
    return {
        "A": a[:, 0, :small],
        "B": b[:large, :n].reshape(large, r, n),
        "L": layer.randlora_lambda["default"],
        "G": layer.randlora_gamma["default"],
    }


def gralora(layer: nn.Module) -> Values:
    """PEFT's A is (input block, its features, rank), its rank cut by output block; its B's rank by input block."""
    a, b = layer.gralora_A["default"], layer.gralora_B["default"]
    blocks, features, rank = a.shape
    return {
        "A": a.reshape(blocks, features, blocks, rank // blocks).permute(2, 0, 3, 1),
        "B": b.reshape(blocks, blocks, rank // blocks, -1).permute(0, 1, 3, 2),
    }


def miss(layer: nn.Module) -> Values:
    return {"D": layer.miss_block["default"].T}


def miss_change(layer: nn.Module) -> Tensor:
    """PEFT gives the whole weight, not its change."""
    weight = layer.base_layer.weight.data
    return layer.get_delta_weight_miss("default", weight.clone()) - weight


def hira(layer: nn.Module) -> Values:
    return named(layer, {"A": "hira_A", "B": "hira_B"})


def hira_change(layer: nn.Module) -> Tensor:
    return layer.base_layer.weight * layer.get_delta_weight("default")


def glora(layer: nn.Module) -> Values:
    a, b = layer.glora_A["default"], layer.glora_B["default"]
    return {"Ad": a.Xd, "Au": a.Xu, "Bd": b.Xd, "Bu": b.Xu}


def glora_change(layer: nn.Module) -> Tensor:
    return layer.weight * layer.glora_A["default"]() + layer.glora_B["default"]()


def ia3(layer: nn.Module) -> Values:
    """PEFT's vector holds the scales themselves, ours what they differ from one by."""
    return {"v" if layer.is_feedforward else "u": layer.ia3_l["default"].flatten() - 1}


def ia3_change(layer: nn.Module) -> Tensor:
    scales = layer.ia3_l["default"]
    return layer.base_layer.weight * ((scales.T if layer.fan_in_fan_out else scales) - 1)


def tinylora(layer: nn.Module) -> Values:
    found = named(layer, {"U": "tinylora_B", "V": "tinylora_A", "P": "tinylora_P"})
    return {**found, "v": layer.tinylora_v["default"][layer._tinylora_v_key["default"]]}


def c3a(layer: nn.Module) -> Values:
    return {"w": layer.c3a_kernel["default"]}


def c3a_change(layer: nn.Module) -> Tensor:
    """What PEFT's layer computes, in float64: the layer itself works in float32."""
    kernel = layer.c3a_kernel["default"].double()
    return get_circulant_fast(kernel) / layer.in_features


def bd_lora(layer: nn.Module) -> Values:
    """PEFT's r is that of all blocks; the factor that is block-diagonal holds the blocks alone, one below the other."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    if a.shape[1] < layer.in_features:
        return {"C": a.view(BLOCKS, -1, a.shape[1]), "D": b.view(len(b), BLOCKS, -1)}
    return {"A": a.view(BLOCKS, -1, a.shape[1]), "B": b.view(BLOCKS, -1, b.shape[1])}


def bd_lora_change(layer: nn.Module) -> Tensor:
    return layer.lora_variant["default"]._get_bdlora_delta_weight(layer, "default")


def dora(layer: nn.Module) -> Values:
    return {
        **lora(layer),
        "m": layer.lora_magnitude_vector["default"].weight,
        "s": torch.tensor(5 / 3, dtype=torch.float64),
    }


def dora_change(layer: nn.Module) -> Tensor:
    weight = layer.base_layer.weight.data
    pair = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
    turned = weight.T if layer.fan_in_fan_out else weight
    whole = turned + pair
    change = whole * (layer.lora_magnitude_vector["default"].weight / whole.norm(dim=1))[:, None] - turned
    return change.T if layer.fan_in_fan_out else change


@dataclass(frozen=True)
class Method:
    """A method in both libraries: a spec of the catalogue, a config, and the factors that a layer of PEFT's comes down to."""

    spec: str
    config: Callable[..., peft.PeftConfig]
    settings: dict[str, object]
    factors: Callable[[nn.Module], Values]
    overrides: dict[str, object] = field(default_factory=dict)
    change: Callable[[nn.Module], Tensor] = lambda layer: layer.get_delta_weight("default")
    tolerance: float = 1e-12  # of the output of PEFT's model


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
CONV1D = ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
# the smaller side of a matrix is the output's: the spec of the catalogue with its sides exchanged
TURNED = {
    "update": "B[d_in, r, n] * L[matrix, layer, r, n] * A[r, d_out] * G[matrix, layer, n, d_out]",
    "factors": {"G": {"init": "formula(1 / size(d_out))"}},
}
BLOCKS = 4
BLOCK_DIAGONAL = peft.tuners.lora.config.BdLoraConfig(LINEAR[3::2], [*LINEAR[:3], LINEAR[4]], nblocks=BLOCKS)
BY_BLOCK = {  # as in the catalogue, for the matrices of the MLP too
    "query, key, value": None,
    "out": None,
    "*": "B[matrix, layer, p, o, r] * A[matrix, layer, p, r, d_in]",
    "out, down": "D[matrix, layer, d_out, n, r] * C[matrix, layer, n, r, i]",
}
BY_INPUT = {"update": "W[d_out, d_in] * v[matrix, layer, d_in]", "factors": {"u": None}}
METHODS = {
    "lora": Method("lora", peft.LoraConfig, {"r": 3, "lora_alpha": 5}, lora, {"rank": 3, "alpha": 5}),
    "rslora": Method(
        "rslora", peft.LoraConfig, {"r": 4, "lora_alpha": 5, "use_rslora": True}, lora, {"rank": 4, "alpha": 5}
    ),
    "vera": Method("vera", peft.VeraConfig, {"r": 6, "projection_prng_key": 1}, vera, {"rank": 6}),
    "loha": Method(
        "loha", peft.LoHaConfig, {"r": 3, "alpha": 6}, loha, {"rank": 3, "alpha": 6}
    ),  # alpha / r is 2: PEFT rounds it to float32
    "lokr": Method("lokr", peft.LoKrConfig, {"r": 2, "alpha": 5}, lokr, {"rank": 2, "alpha": 5}),
    "lokr_full": Method("lokr_full", peft.LoKrConfig, {"r": 16, "alpha": 8}, lokr_full, {"scale": 0.5}),
    "lokr_both": Method(
        "lokr_both",
        peft.LoKrConfig,
        {"r": 2, "alpha": 5, "decompose_both": True},
        lokr_both,
        {"rank": 2, "alpha": 5},
    ),
    "adalora": Method(
        "adalora", peft.AdaLoraConfig, {"init_r": 3, "lora_alpha": 5, "total_step": 1}, adalora, {"rank": 3, "alpha": 5}
    ),
    "randlora": Method(
        "randlora", peft.RandLoraConfig, {"r": 7, "randlora_alpha": 5}, randlora, {"rank": 7, "alpha": 5}
    ),
    "randlora, turned": Method(
        "randlora", peft.RandLoraConfig, {"r": 7, "randlora_alpha": 5}, randlora, {"rank": 7, "alpha": 5, **TURNED}
    ),
    "gralora": Method(
        "gralora", peft.GraloraConfig, {"r": 6, "gralora_k": 2, "alpha": 5}, gralora, {"rank": 3, "alpha": 5}
    ),
}
METHODS |= {
    "miss": Method("miss", peft.MissConfig, {"r": 4}, miss, {"rank": 4}, miss_change),
    "miss, a rank that divides no side": Method("miss", peft.MissConfig, {"r": 7}, miss, {"rank": 7}, miss_change),
    "hira": Method("hira", peft.HiraConfig, {"r": 3}, hira, {"rank": 3}, hira_change),
    "glora": Method("glora", peft.GloraConfig, {"r": 3}, glora, {"rank": 3, "train": None}, glora_change),
    "ia3": Method("ia3", peft.IA3Config, {"feedforward_modules": ["down_proj"]}, ia3, {}, ia3_change),
    "ia3, by input": Method("ia3", peft.IA3Config, {"feedforward_modules": CONV1D}, ia3, BY_INPUT, ia3_change),
    "tinylora": Method("tinylora", peft.TinyLoraConfig, {"r": 3, "u": 5}, tinylora, {"rank": {"r": 5, "a": 3}}),
    "c3a": Method("c3a", peft.C3AConfig, {"block_size": 8}, c3a, {"rank": 8}, c3a_change, 1e-6),
    "dora": Method(
        "dora", peft.LoraConfig, {"r": 3, "lora_alpha": 5, "use_dora": True}, dora, {"rank": 3}, dora_change
    ),
    "bd_lora": Method(
        "bd_lora",
        peft.LoraConfig,
        {"r": 8, "lora_alpha": 5, "use_bdlora": BLOCK_DIAGONAL},
        bd_lora,
        {"rank": 2, "alpha": 5, "update": BY_BLOCK},
        bd_lora_change,
    ),
}
CASES = [
    *((method, "llama", LINEAR) for method in METHODS if not method.startswith(("randlora", "ia3"))),
    ("ia3", "llama", ["k_proj", "v_proj", "down_proj"]),
    ("ia3, by input", "gpt2", CONV1D),
    *((method, "gpt2", CONV1D) for method in ("lora", "vera", "adalora", "gralora", "hira", "dora")),
    ("randlora", "llama", ["q_proj", "up_proj"]),
    ("randlora", "gpt2", CONV1D[:2]),
    ("randlora, turned", "llama", ["k_proj", "v_proj"]),
    ("randlora, turned", "llama", ["down_proj"]),
    ("randlora, turned", "gpt2", ["mlp.c_proj"]),
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
def place(adapter: tp.Adapter, values: Callable[[Site], Values]) -> None:
    """Give the adapter the factors of every site."""
    tensors = {block.name: adapter.factors[block.name] for block in adapter.network.blocks}
    references = {f.factor: f for product in adapter.spec.update.products for f in product.factors}
    for site in adapter.sites:
        for name, value in values(site).items():
            own = stored_at(adapter, tensors, references[name], site, modes_at(adapter, site))
            own.copy_(value.reshape(own.shape))  # a side that is split has its parts here
    adapter.refresh()


def compare(architecture: str, name: str, modules: list[str], part: Callable[[Site, Values], Values]) -> None:
    method = METHODS[name]
    other = with_peft(architecture, method, modules)
    base = model(architecture)
    adapter = tp.attach(base, tp.load_spec(method.spec, matrices=modules, **method.overrides))
    theirs = layers(other)
    assert {site.module for site in adapter.sites} == set(theirs)
    place(adapter, lambda site: part(site, method.factors(theirs[site.module])))
    changes = {path: method.change(layer) for path, layer in theirs.items()}
    changes = {path: change.T if architecture == "gpt2" else change for path, change in changes.items()}
    check_agrees(architecture, base, adapter, other, changes, method.tolerance)


def check_agrees(
    architecture: str,
    base: nn.Module,
    adapter: tp.Adapter,
    other: nn.Module,
    changes: dict[str, Tensor],
    tolerance: float,
) -> None:
    """DW is that of PEFT's layers, and the output that of the base with it; PEFT's own output is as near as its dtype lets it."""
    x = inputs(architecture)
    for path, expected in changes.items():
        assert (adapter.delta(path) - expected).norm() <= 1e-12 * expected.norm(), path
    plain = model(architecture)
    with torch.no_grad(), by_formula(plain, changes):
        ours, truth, exact = run(base, x), run(other, x), run(plain, x)
    assert (ours - exact).norm() <= 1e-12 * exact.norm()
    assert (ours - truth).norm() <= tolerance * truth.norm()
    with adapter.disabled(), torch.no_grad():
        assert not torch.allclose(run(base, x), truth, rtol=1e-4)


@pytest.mark.parametrize(("name", "architecture", "modules"), CASES, ids=["-".join((n, a, *m)) for n, a, m in CASES])
def test_equals_peft(name: str, architecture: str, modules: list[str]) -> None:
    compare(architecture, name, modules, lambda site, values: values)


def test_lora_on_a_fused_module_is_three_matrices_of_one_a() -> None:
    """PEFT sees one matrix in GPT-2's c_attn: its B is ours of query, key and value one below the other."""

    def thirds(site: Site, values: Values) -> Values:
        return {"A": values["A"], "B": values["B"][torch.from_numpy(site.row_indices())]}

    compare("gpt2", "lora", ["c_attn"], thirds)


def test_c3a_s_convolution_in_float64() -> None:
    """PEFT's layer rounds to float32 before it convolves; its convolution does not."""
    adapter = tp.attach(model("llama"), tp.load_spec("c3a", rank=8, matrices=LINEAR))
    generator = torch.Generator().manual_seed(4)
    kernels: Values = {
        s.module: torch.randn(s.d_out // 8, s.d_in // 8, 8, generator=generator).double() for s in adapter.sites
    }
    place(adapter, lambda site: {"w": kernels[site.module]})
    for site in adapter.sites:
        x = torch.randn(3, site.d_in, generator=generator, dtype=torch.float64)
        theirs = BlockCircularConvolution.apply(x, kernels[site.module]) / site.d_in
        assert (x @ adapter.delta(site.module).T - theirs).norm() <= 1e-12 * theirs.norm()


def test_mica_starts_as_in_peft() -> None:
    """B is the same, up to signs and float32, and only A is trained; with numbers in A, dW and the output are PEFT's."""
    config = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="mica", target_modules=LINEAR)
    other = peft.get_peft_model(build("llama"), config).base_model.model
    other = widen_norms(other.double().eval())
    base, x, generator = model("llama"), inputs("llama"), torch.Generator().manual_seed(4)
    adapter = tp.attach(base, tp.load_spec("mica", rank=4, alpha=4, matrices=LINEAR))
    theirs = {path: lora(layer) for path, layer in layers(other).items()}
    assert {name for name, _ in adapter.factors.named_parameters()} == {"A_d_in64", "A_d_in96"}
    for path, pair in theirs.items():
        assert [tensor.requires_grad for tensor in (pair["A"], pair["B"])] == [True, False]
        ours, theirs_at = (b @ b.T for b in (factor_at(adapter, path, "B"), pair["B"]))
        assert (ours - theirs_at).norm() <= 1e-4 * theirs_at.norm()
        assert not pair["A"].any()
        pair["A"].data = torch.randn(pair["A"].shape, generator=generator, dtype=torch.float64) * 0.3
    place(adapter, lambda site: theirs[site.module])
    for path, layer in layers(other).items():
        expected = layer.get_delta_weight("default")
        assert (adapter.delta(path) - expected).norm() <= 1e-12 * expected.norm(), path
    with torch.no_grad():
        ours, truth = run(base, x), run(other, x)
    assert (ours - truth).norm() <= 1e-12 * truth.norm()


@pytest.mark.parametrize("spec", ["pissa", "olora"])
def test_a_start_from_the_weight_equals_peft(spec: str) -> None:
    """PEFT takes what the pair starts from out of the base weight; ours subtracts it, so that the base stays whole."""
    config = peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights=spec, target_modules=LINEAR)
    other = peft.get_peft_model(build("llama"), config).base_model.model  # its decompositions are of float32
    other = widen_norms(other.double().eval())
    base, x = model("llama"), inputs("llama")
    whole = {path: module.weight for path, module in base.named_modules() if isinstance(module, nn.Linear)}
    adapter = tp.attach(base, tp.load_spec(spec, rank=4, matrices=LINEAR))
    generator, values = torch.Generator().manual_seed(4), {}
    for path, layer in layers(other).items():
        pair = {name: value.detach().clone() for name, value in lora(layer).items()}
        start = pair["B"] @ pair["A"]
        residue = layer.base_layer.weight.data
        assert (residue - (whole[path] - start)).norm() <= 1e-6 * residue.norm()
        residue.copy_(whole[path] - start)  # to all digits
        for tensor in lora(layer).values():
            tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.3
        values[path] = {**lora(layer), **{f"{name}0": value for name, value in pair.items()}}
        assert (began(adapter, path) - start).norm() <= 1e-4 * start.norm()  # of float32
        assert not adapter.delta(path).any()
    place(adapter, lambda site: values[site.module])
    for path, layer in layers(other).items():
        expected = layer.base_layer.weight + layer.get_delta_weight("default") - whole[path]
        assert (adapter.delta(path) - expected).norm() <= 1e-12 * expected.norm(), path
    with torch.no_grad():
        ours, truth = run(base, x), run(other, x)
    assert (ours - truth).norm() <= 1e-12 * truth.norm()


def began(adapter: tp.Adapter, path: str) -> Tensor:
    """The product that our pair starts from at a module."""
    return factor_at(adapter, path, "B0") @ factor_at(adapter, path, "A0")


def factor_at(adapter: tp.Adapter, path: str, name: str) -> Tensor:
    """What a factor has for a module."""
    (site,) = (site for site in adapter.sites if site.module == path)
    references = {f.factor: f for product in adapter.spec.update.products for f in product.factors}
    tensors = {block.name: adapter.factors[block.name] for block in adapter.network.blocks}
    return stored_at(adapter, tensors, references[name], site, modes_at(adapter, site)).detach()
