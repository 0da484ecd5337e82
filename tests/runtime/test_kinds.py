"""Sites that are no linear modules, held to the base run with W + dW, where dW is a formula over the factors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import tensorpeft as tp
from tensorpeft.language.catalogue import method_paths
from tensorpeft.language.errors import AdapterError, SpecError
from tests.models import randomise

Deltas = Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]
Formula = Callable[[dict[str, Tensor], Tensor], Tensor]  # factors, W (d_out, d_in) -> dW (d_out, d_in)
HEAD = "tensorpeft: 1\ntarget: {matrices: [%s]}\n"
STRUCTURES: dict[str, tuple[str, Formula]] = {
    "lora": (
        "rank: {r: 2}\nalpha: 4\nscale: alpha / r\n"
        "update: B[matrix, d_out, r] * A[matrix, r, d_in]\nfactors: {B: {init: zeros}}\n",
        lambda f, w: 2 * f["B"][0] @ f["A"][0],
    ),
    "a sum with a sign": (
        "rank: {r: 2, s: 1}\nupdate: B[d_out, r] * A[r, d_in] - D[d_out, s] * C[s, d_in]\n"
        "factors: {B: {init: zeros}, D: {init: zeros}}\n",
        lambda f, w: f["B"] @ f["A"] - f["D"] @ f["C"],
    ),
    "hadamard": (
        "rank: {r: 2, s: 2}\nupdate: B[d_out, r] * A[r, d_in] * D[d_out, s] * C[s, d_in]\nfactors: {B: {init: zeros}}\n",
        lambda f, w: (f["B"] @ f["A"]) * (f["D"] @ f["C"]),
    ),
    "vera": (
        "rank: {r: 3}\nupdate: b[d_out] * B[d_out, r] * d[r] * A[r, d_in]\n"
        "factors: {A: {init: kaiming_uniform, frozen: true}, B: {init: kaiming_uniform, frozen: true}, b: {init: zeros}}\n",
        lambda f, w: f["b"][:, None] * (f["B"] * f["d"]) @ f["A"],
    ),
    "kronecker": (
        "modes: [d_out = o1(2) * o2, d_in = i1(2) * i2]\nupdate: A[o1, i1] * B[o2, i2]\nfactors: {B: {init: zeros}}\n",
        lambda f, w: torch.kron(f["A"], f["B"]),
    ),
    "blocks": (
        "rank: {r: 2}\nmodes: [d_out = p(2) * o, d_in = q(2) * i]\nupdate: B[p, q, o, r] * A[p, q, r, i]\n"
        "factors: {B: {init: zeros}}\n",
        lambda f, w: torch.einsum("pqor,pqri->poqi", f["B"], f["A"]).reshape(w.shape),
    ),
    "dense": ("update: D[d_out, d_in]\nfactors: {D: {init: zeros}}\n", lambda f, w: f["D"]),
    "base weight": (
        "update: W[d_out, d_in] * u[d_out] * v[d_in]\nfactors: {u: {init: zeros}}\n",
        lambda f, w: w * f["u"][:, None] * f["v"],
    ),
}


def embedding() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Embedding(10, 6, padding_idx=0)), torch.tensor([[1, 2, 9], [3, 1, 4]])


def scaled_embedding() -> tuple[nn.Module, Tensor]:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 3 * super().forward(ids)

    return nn.Sequential(Scaled(10, 6)), torch.tensor([[1, 2, 9], [3, 1, 4]])


def conv(module: nn.Module, *shape: int) -> Callable[[], tuple[nn.Module, Tensor]]:
    def made() -> tuple[nn.Module, Tensor]:
        return nn.Sequential(copy.deepcopy(module)), torch.randn(shape, generator=torch.Generator().manual_seed(3))

    return made


MODULES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "embedding": embedding,
    "embedding of a class of its own": scaled_embedding,
    "conv1d": conv(nn.Conv1d(4, 6, 3), 2, 4, 7),
    "conv1d, no batch": conv(nn.Conv1d(4, 6, 3), 4, 7),
    "conv2d": conv(nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), dilation=(2, 1)), 2, 4, 7, 5),
    "conv2d, same": conv(nn.Conv2d(4, 6, 3, padding="same", bias=False), 2, 4, 5, 5),
    "conv2d, reflected": conv(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), 2, 4, 5, 5),
    "conv3d": conv(nn.Conv3d(2, 6, 2, padding=1, padding_mode="circular"), 2, 2, 3, 4, 3),
}


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    return weight.t() if isinstance(module, nn.Embedding) else weight.flatten(1)


def stored(module: nn.Module, matrix: Tensor) -> Tensor:
    return matrix.t() if isinstance(module, nn.Embedding) else matrix.reshape(module.weight.shape)


def built(module: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    model, x = MODULES[module]()
    return model.double(), x.double() if x.is_floating_point() else x


def all_factors(adapter: tp.Adapter) -> dict[str, Tensor]:
    """Copies of the factors, which take gradients."""
    tensors = [*adapter.factors.named_parameters(), *adapter.factors.named_buffers()]
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors}


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def hold(model: nn.Module, adapter: tp.Adapter, inputs: dict[str, Tensor], deltas: Deltas) -> None:
    """Hold an adapter's outputs, gradients, deltas and merges to the base run with other weights.

    ``deltas`` gives from the factors and the base's weights what is added to some of these, by their names.
    """
    weights = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if "tensorpeft" not in name}
    with adapter.disabled():
        base = first(model(**inputs))
    randomise(adapter)
    factors = all_factors(adapter)
    changes = deltas(factors, weights)
    found = first(model(**inputs))
    with adapter.disabled():
        changed = {name: weights[name] + change for name, change in changes.items()}
        expected = first(functional_call(model, {**weights, **changed}, (), inputs))
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=expected.dtype)
    (found * probe).sum().backward()
    (expected * probe).sum().backward()
    assert (found - base).norm() > 1e-3 * base.norm()
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)
    for name, parameter in adapter.factors.named_parameters():
        assert torch.allclose(parameter.grad, factors[name].grad, rtol=1e-8, atol=1e-11), name
    adapter.merge()
    assert torch.allclose(first(model(**inputs)), expected, rtol=1e-9, atol=1e-11)
    assert all(torch.allclose(model.get_parameter(name), tensor) for name, tensor in changed.items())
    adapter.unmerge()
    adapter.detach()
    assert torch.allclose(first(model(**inputs)), base, rtol=1e-12, atol=1e-14)  # torch may take another path
    assert {name for name, _ in model.named_parameters()} == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.named_parameters())


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("module", MODULES)
def test_a_module_s_output_and_gradients_are_those_of_the_formula(module, structure):
    model, x = built(module)
    text, formula = STRUCTURES[structure]
    base = model(x)
    adapter = tp.attach(model, HEAD % "'*'" + text)
    assert torch.equal(model(x), base)

    def deltas(factors: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
        matrix = formula(factors, as_matrix(model[0], weights["0.weight"]))
        assert torch.allclose(adapter.delta("0"), matrix, rtol=1e-12, atol=1e-14)
        return {"0.weight": stored(model[0], matrix)}

    hold(model, adapter, {"input": x}, deltas)


@pytest.mark.parametrize("module", ["embedding", "conv2d", "embedding of a class of its own"])
def test_masks(module):
    model, x = built(module)
    update = "rank: {r: 2}\nupdate: B[d_out, r] * A[r, d_in]\nfactors: {B: {init: zeros}}\n"
    text = update + "mask:\n  B[d_out]: keep(3)\n  A[d_in]: keep(4)\n"
    adapter = tp.attach(model, HEAD % "'*'" + text)
    (term,) = adapter.network.groups[0].terms

    def deltas(factors: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
        matrix = torch.zeros_like(as_matrix(model[0], weights["0.weight"]))
        small = factors["B"].view(3, 2) @ factors["A"].view(2, 4)
        rows, columns = torch.from_numpy(term.rows), torch.from_numpy(term.columns)
        return {"0.weight": stored(model[0], matrix.index_put((rows[:, None], columns), small))}

    hold(model, adapter, {"input": x}, deltas)


@pytest.mark.parametrize("module", ["embedding", "conv2d", "embedding of a class of its own"])
def test_single_entries(module):
    model, x = built(module)
    text = "update: D[d_out, d_in]\nfactors: {D: {init: zeros}}\nmask: {'D[d_out, d_in]': keep(20)}\n"
    adapter = tp.attach(model, HEAD % "'*'" + text)
    (block,) = adapter.network.blocks

    def deltas(factors: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
        matrix = torch.zeros_like(as_matrix(model[0], weights["0.weight"]))
        kept = torch.from_numpy(block.positions)
        return {"0.weight": stored(model[0], matrix.flatten().index_put((kept,), factors["D"]).view(matrix.shape))}

    hold(model, adapter, {"input": x}, deltas)


@pytest.mark.parametrize("module", MODULES)
def test_a_start_from_the_weight(module):
    """PiSSA's factors: at rank 6 of 6 their product is the whole weight."""
    model, x = built(module)
    weight = as_matrix(model[0], model[0].weight.detach())
    text = (
        "rank: {r: 6}\nupdate: B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]\nstart: subtract\n"
        "factors: {B: {init: 'svd(W).U[:r] * S ** 0.5'}, A: {init: 'svd(W).V[:r] * S ** 0.5'}}\n"
    )
    base = model(x)
    adapter = tp.attach(model, HEAD % "'*'" + text)
    assert torch.allclose(model(x), base, rtol=1e-12, atol=1e-12)
    factors = all_factors(adapter)
    assert torch.allclose(factors["B"][0, 0] @ factors["A"][0, 0], weight, rtol=1e-10, atol=1e-12)


EXPERTS = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = {"input_ids": torch.arange(3, 17).view(2, 7)}
PATH = "model.layers.{}.mlp.experts.{}"


def mixture(implementation: str = "eager") -> nn.Module:
    torch.manual_seed(1)
    config = transformers.MixtralConfig(**EXPERTS, experts_implementation=implementation)
    return transformers.MixtralForCausalLM(config).double().eval()


def interleaved() -> nn.Module:
    """Of gpt-oss, whose weights are stored (d_in, d_out), a column of `gate` and one of `up` in turn."""
    torch.manual_seed(1)
    model = (
        transformers.GptOssForCausalLM(transformers.GptOssConfig(**EXPERTS, experts_implementation="eager"))
        .double()
        .eval()
    )
    for name, parameter in model.named_parameters():
        if "experts" in name or "sinks" in name or "router" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


BY_EXPERT = (
    HEAD % "gate, up, down" + "rank: {r: 2}\n"
    "update: B[matrix, layer, expert, d_out, r] * A[matrix, layer, r, d_in]\nfactors: {B: {init: zeros}}\n"
)


def expert_deltas(is_interleaved: bool) -> Deltas:
    def deltas(factors: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for layer in range(2):
            gate, up = (
                torch.einsum("eor,ri->eoi", factors["B_d_out12"][m, layer], factors["A_d_in16"][m, layer])
                for m in (0, 1)
            )
            down = torch.einsum("eor,ri->eoi", factors["B_d_out16"][0, layer], factors["A_d_in12"][0, layer])
            both = torch.stack([gate, up], 2).flatten(1, 2) if is_interleaved else torch.cat([gate, up], 1)
            turned = (both.mT, down.mT) if is_interleaved else (both, down)
            found |= {
                PATH.format(layer, name): each for name, each in zip(("gate_up_proj", "down_proj"), turned, strict=True)
            }
        return found

    return deltas


@pytest.mark.parametrize("is_interleaved", [False, True], ids=["mixtral", "gpt-oss"])
def test_experts_have_what_is_theirs_and_share_what_is_not(is_interleaved):
    model = interleaved() if is_interleaved else mixture()
    adapter = tp.attach(model, BY_EXPERT)
    assert len(adapter.sites) == 3 * 2 * 3
    assert adapter.delta(PATH.format(0, "gate_up_proj")).shape == (3, 24, 16)
    hold(model, adapter, IDS, expert_deltas(is_interleaved))


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_whatever_reads_the_experts(implementation):
    outputs = []
    for model in (mixture(), mixture(implementation)):
        randomise(tp.attach(model.float(), BY_EXPERT), std=0.3)
        outputs.append(model(**IDS)[0])
    assert torch.allclose(*outputs, rtol=1e-4, atol=1e-5)


def test_the_base_weight_of_each_expert():
    model = mixture()
    text = HEAD % "experts.up" + "update: W[d_out, d_in] * u[layer, expert, d_in]\nfactors: {u: {init: zeros}}\n"

    def deltas(factors: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for layer in range(2):
            name = PATH.format(layer, "gate_up_proj")
            up = weights[name][:, 12:] * factors["u"][layer][:, None]
            found[name] = torch.cat([torch.zeros_like(up), up], 1)
        return found

    hold(model, tp.attach(model, text), IDS, deltas)


def test_a_router():
    model = mixture()
    text = HEAD % "router" + "rank: {r: 1}\nupdate: B[layer, d_out, r] * A[r, d_in]\nfactors: {B: {init: zeros}}\n"
    name = "model.layers.{}.mlp.gate.weight"
    hold(model, tp.attach(model, text), IDS, lambda f, w: {name.format(n): f["B"][n] @ f["A"] for n in range(2)})


def encoder() -> nn.Module:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()


@pytest.mark.parametrize("training", [True, False])
def test_attention_of_torch(training):
    model = encoder().train(training)
    text = HEAD % "query, value, out, linear1" + (
        "rank: {r: 2}\nupdate: B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]\nfactors: {B: {init: zeros}}\n"
    )
    adapter = tp.attach(model, text)

    def deltas(factors: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for n in range(2):
            query, value, out = factors["B_d_out8"][:, n] @ factors["A"][:3, n]
            layer = f"layers.{n}"
            found[f"{layer}.self_attn.in_proj_weight"] = torch.cat([query, torch.zeros_like(query), value])
            found[f"{layer}.self_attn.out_proj.weight"] = out
            found[f"{layer}.linear1.weight"] = factors["B_d_out12"][0, n] @ factors["A"][3, n]
        return found

    x = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    hold(model, adapter, {"src": x}, deltas)


def test_all_linear_has_the_weights_that_attention_reads():
    sites = tp.attach(encoder(), "tensorpeft: 1\ntarget: all-linear\nstructure: matrix\nrank: 2\n").sites
    assert {site.matrix for site in sites} == {"query", "key", "value", "out", "fc1", "fc2"}


@pytest.mark.parametrize("line", ["tasks: 2", "dropout: 0.1"])
def test_what_needs_an_activation_is_refused(line):
    update = "B[task, d_out, r] * A[r, d_in]" if "tasks" in line else "B[d_out, r] * A[r, d_in]"
    text = f"rank: {{r: 2}}\nupdate: {update}\nfactors: {{B: {{init: zeros}}}}\n{line}\n"
    word = line.partition(":")[0]
    with pytest.raises(SpecError) as caught:
        tp.attach(built("conv2d")[0], HEAD % "'*'" + text)
    assert str(caught.value).splitlines()[0] == (
        f"<spec>:4:9: `{word}` needs the input of a linear module, which linear of layer 0 (0) does not have; "
        "leave it out of the target"
    )


def test_heads_of_torch_s_attention():
    text = HEAD % "query, out" + "structure: cp\nmodes: [matrix, layer, head, head_dim, width]\nrank: 2\n"
    sites = {site.matrix: site for site in tp.attach(encoder(), text).sites}
    assert {(site.heads, site.head_side) for site in sites.values()} == {(2, "d_out"), (2, "d_in")}


# What replaces a weight is gone when the forward is over


class Broken(nn.Module):
    """It reads a weight of its own, and fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:
            raise KeyError("on demand")
        return x @ self.weight.t()


READ = (
    HEAD % "'*'"
    + "rank: {r: 1}\nupdate: B[d_out, r] * A[r, d_in]\nfactors: {B: {init: ones}, A: {init: ones}}\nstart: nonzero\n"
)
ROW = torch.ones(2, 4, dtype=torch.float64)


def test_an_error_of_the_forward_leaves_the_weight():
    model = Broken()
    weight = model.weight
    tp.attach(model, READ)
    model.fails = True
    with pytest.raises(KeyError, match="on demand"):
        model(ROW)
    assert model.weight is weight
    model.fails = False
    assert torch.allclose(model(ROW), ROW @ (weight + 1).t())
    assert model.weight is weight
    assert "weight" not in model.__dict__


def test_two_adapters_on_one_weight():
    model = Broken()
    weight = model.weight.detach().clone()
    one, two = (tp.attach(model, READ, name=name) for name in ("one", "two"))
    assert torch.allclose(model(ROW), ROW @ (weight + 2).t())
    with one.disabled():
        assert torch.allclose(model(ROW), ROW @ (weight + 1).t())
    one.merge()
    assert torch.allclose(model(ROW), ROW @ (weight + 2).t())
    two.detach()
    assert torch.allclose(model(ROW), ROW @ (weight + 1).t())
    one.detach()
    assert torch.equal(model.weight, weight)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Broken()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    x = ROW.clone().requires_grad_()
    gradients = []
    for model_class in (Broken, Checkpointed):
        torch.manual_seed(0)
        model = model_class()
        adapter = tp.attach(model, READ)
        model(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in adapter.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_names_and_values_in_the_state_dict_stay():
    model = mixture()
    names, values = zip(*model.state_dict().items(), strict=True)
    values = [value.clone() for value in values]
    adapter = tp.attach(model, BY_EXPERT)
    randomise(adapter)
    seen: list[dict[str, Tensor]] = []
    model.model.layers[0].mlp.experts.act_fn.register_forward_hook(lambda *_: seen.append(model.state_dict()))
    model(**IDS)
    within = {name: value for name, value in seen[0].items() if "tensorpeft" not in name}
    assert (*within,) == names
    assert all(torch.equal(a, b) for a, b in zip(within.values(), values, strict=True))


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_a_tied_weight_is_not_merged(name):
    config = transformers.LlamaConfig(
        **{k: v for k, v in EXPERTS.items() if "experts" not in k}, tie_word_embeddings=True
    )
    model = transformers.LlamaForCausalLM(config)
    before = model.model.embed_tokens.weight.clone()
    adapter = tp.attach(model, HEAD % f"query, {name}" + "structure: matrix\nrank: 2\n")
    randomise(adapter)
    with pytest.raises(AdapterError) as caught:
        adapter.merge()
    paths = ["model.embed_tokens", "lm_head"]
    if name == "lm_head":
        paths.reverse()
    assert str(caught.value) == (
        f"the weight of `{paths[0]}` is that of `{paths[1]}` too, which the update is not for, so nothing can be merged into it"
    )
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert adapter.merged is None


def test_a_tied_embedding_alone_is_adapted():
    config = transformers.LlamaConfig(
        **{k: v for k, v in EXPERTS.items() if "experts" not in k}, tie_word_embeddings=True
    )
    model = transformers.LlamaForCausalLM(config).double()
    adapter = tp.attach(model, HEAD % "embed_tokens" + "structure: matrix\nrank: 2\n")
    randomise(adapter)
    factors = all_factors(adapter)
    embedded = nn.functional.embedding(
        IDS["input_ids"], model.model.embed_tokens.weight + (factors["B"][0, 0] @ factors["A"][0, 0]).t()
    )
    with adapter.disabled():
        expected = model(inputs_embeds=embedded)[0]
    assert torch.allclose(model(**IDS)[0], expected, rtol=1e-10, atol=1e-12)


def test_an_adapter_of_every_kind_is_saved_and_copied(tmp_path):
    text = HEAD % "query, embed_tokens, experts.down, router" + "structure: matrix\nrank: 2\n"
    model = mixture()
    adapter = tp.attach(model, text)
    randomise(adapter)
    output = model(**IDS)[0]
    adapter.save(tmp_path)
    fresh = mixture()
    tp.load(fresh, tmp_path)
    assert torch.equal(fresh(**IDS)[0], output)
    assert torch.equal(copy.deepcopy(model)(**IDS)[0], output)


def test_a_half_precision_base():
    model, x = built("conv2d")
    model, x = model.bfloat16(), x.bfloat16()
    adapter = tp.attach(model, HEAD % "'*'" + "structure: matrix\nrank: 2\n")
    assert {parameter.dtype for parameter in adapter.parameters()} == {torch.float32}
    randomise(adapter, std=0.1)
    y = model(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


@pytest.mark.parametrize("name", method_paths())
def test_every_shipped_method_on_every_kind(name):
    """It is refused as a spec, or what it does to the output is what it merges."""
    for model, matrices, inputs in (
        (built("conv2d")[0], "*", {"input": built("conv2d")[1]}),
        (built("embedding")[0], "*", {"input": built("embedding")[1]}),
        (mixture(), "experts.down", IDS),
        (encoder(), "query", {"src": torch.randn(2, 5, 8, dtype=torch.float64)}),
    ):
        try:
            adapter = tp.attach(model, tp.load_spec(name, matrices=[matrices]))
        except SpecError:
            continue
        randomise(adapter, std=0.1)
        output = first(model(**inputs))
        adapter.merge()
        assert torch.allclose(first(model(**inputs)), output, rtol=1e-8, atol=1e-10)
