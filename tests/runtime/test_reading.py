"""Weights that a forward reads, experts' and attention's among them: replaced while it runs, and only then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tensorpeft as tp
from tests.models import randomise
from tests.runtime.kinds import HEAD, IDS, Deltas, encoder, hold, interleaved, mixture

PATH = "model.layers.{}.mlp.experts.{}"
BY_EXPERT = (
    HEAD % "gate, up, down" + "rank: {r: 2}\n"
    "update: B[matrix, layer, expert, d_out, r] * A[matrix, layer, r, d_in]\nfactors: {B: {init: zeros}}\n"
)


def by_expert(factors: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """dW of gate, up and down in a layer, (experts, d_out, d_in)."""
    gate, up = (
        torch.einsum("eor,ri->eoi", factors["B_d_out12"][m, layer], factors["A_d_in16"][m, layer]) for m in (0, 1)
    )
    return gate, up, torch.einsum("eor,ri->eoi", factors["B_d_out16"][0, layer], factors["A_d_in12"][0, layer])


def shared_outer(factors: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor, Tensor]:
    gate, up = (torch.einsum("eor,ri->eoi", factors["B"][m, layer], factors["A"][layer]) for m in (0, 1))
    return gate, up, torch.einsum("or,eri->eoi", factors["D"][layer], factors["C"][layer])


def expert_deltas(is_interleaved: bool, of_layer: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Deltas:
    def deltas(factors: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for layer in range(2):
            gate, up, down = of_layer(factors, layer)
            both = torch.stack([gate, up], 2).flatten(1, 2) if is_interleaved else torch.cat([gate, up], 1)
            turned = (both.mT, down.mT) if is_interleaved else (both, down)
            found |= {
                PATH.format(layer, name): each for name, each in zip(("gate_up_proj", "down_proj"), turned, strict=True)
            }
        return found

    return deltas


@pytest.mark.parametrize(
    ("spec", "of_layer"), [(BY_EXPERT, by_expert), ("shared_outer", shared_outer)], ids=["by expert", "shared_outer"]
)
@pytest.mark.parametrize("is_interleaved", [False, True], ids=["mixtral", "gpt-oss"])
def test_experts_have_what_is_theirs_and_share_what_is_not(is_interleaved, spec, of_layer):
    model = interleaved() if is_interleaved else mixture()
    adapter = tp.attach(model, spec)
    assert len(adapter.sites) == 3 * 2 * 3
    assert adapter.delta(PATH.format(0, "gate_up_proj")).shape == (3, 24, 16)
    hold(model, adapter, IDS, expert_deltas(is_interleaved, of_layer))


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
