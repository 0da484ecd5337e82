"""Convolutions and embeddings, held to the base run with W + dW, where dW is a formula over the factors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn

import tensorpeft as tp
from tensorpeft.language.errors import AdapterError, SpecError
from tensorpeft.language.shipped import method_paths
from tests.models import randomise
from tests.runtime.kinds import (
    EXPERTS,
    HEAD,
    IDS,
    MODULES,
    all_factors,
    as_matrix,
    built,
    encoder,
    first,
    hold,
    mixture,
    stored,
)

Formula = Callable[[dict[str, Tensor], Tensor], Tensor]  # factors, W (d_out, d_in) -> dW (d_out, d_in)
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


LENGTHS = (
    "rank: {r: 2}\nupdate: m[matrix, layer, d_out] * B[d_out, r] * A[r, d_in]\n"
    "factors: {m: {norm: true}, B: {init: zeros}}\n"
)


def test_lengths_are_for_linear_modules():
    with pytest.raises(SpecError) as caught:
        tp.attach(built("conv2d")[0], HEAD % "'*'" + LENGTHS)
    assert "`norm` needs the input of a linear module" in str(caught.value)


def test_each_expert_has_lengths_of_its_own():
    experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 4)}) for _ in range(3))
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": experts})])}).double()
    with pytest.raises(SpecError) as caught:
        tp.attach(model, HEAD % "up" + LENGTHS)
    assert str(caught.value).splitlines()[0] == (
        "<spec>:4:9: `m[matrix, layer, d_out]` is over the norms of W + dW, and experts.up of layer 0, expert 0 "
        "(layers.0.experts.0.up) is one of several experts; expected the mode `expert`"
    )
    adapter = tp.attach(model, HEAD % "up" + LENGTHS.replace("layer, d_out", "layer, expert, d_out"))
    randomise(adapter)
    for number, expert in enumerate(experts):
        pair = adapter.factors["B"] @ adapter.factors["A"]
        lengths = adapter.factors["m"][0, 0, number] / (expert["up"].weight + pair).norm(dim=1)
        change = adapter.delta(f"layers.0.experts.{number}.up")
        assert torch.allclose(change, lengths[:, None] * pair, rtol=1e-12)


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


# They have a mode, a task or a length that no such site has, or are for matrices by name
NOWHERE = {"bd_lora", "dora", "fourierft", "ia3", "lorta_lora", "shared_a", "targeted_lora", "waveft"}


@pytest.mark.parametrize("name", method_paths())
def test_every_shipped_method_on_every_kind(name):
    """It is refused as a spec, or what it does to the output is what it merges."""
    n_accepted = 0
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
        n_accepted += 1
        base = first(model(**inputs))
        randomise(adapter, std=0.1)
        output = first(model(**inputs))
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        adapter.merge()
        changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
        assert changed or not torch.allclose(
            output, base, rtol=1e-6
        )  # of an entry that no row looks up, the weight alone
        assert torch.allclose(first(model(**inputs)), output, rtol=1e-8, atol=1e-10)
    assert (n_accepted == 0) == (name in NOWHERE)
