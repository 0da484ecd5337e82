"""What people do with a model that has an adapter: generate, train by halves, copy, transform, hook, and serve from threads."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import create_selective_checkpoint_contexts

import tensorpeft as tp
from tensorpeft.runtime import hooks
from tests.models import build, enliven, inputs, randomise, run
from tests.runtime.reference import updates
from tests.runtime.test_life import attached, gradients, same
from tests.runtime.test_oracle import named_factors
from tests.runtime.test_training import DROPPED


def dense(module: nn.Module, change: Tensor, x: Tensor) -> Tensor:
    return x @ (module.weight + change).t()


# Generation


@pytest.mark.parametrize("spec", ["lora", "lorta"])
def test_generates_what_the_merged_model_generates(spec: str) -> None:
    """Greedily, by beams, and by draws; with a cache of keys and values, whose lengths have plans of their own."""
    model = build("llama")
    adapter = tp.attach(model, spec)
    enliven(adapter)
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "output_logits": True}
    ways = ({"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True})

    def generated() -> list[Any]:
        torch.manual_seed(7)
        ids = [inputs("llama", batch=batch) for batch in (1, 2, 3)]
        return [
            model.generate(each, **options, **way, return_dict_in_generate=True)
            for each, way in zip(ids, ways, strict=True)
        ]

    ours = generated()
    adapter.merge()
    for one, truth in zip(ours, generated(), strict=True):
        assert torch.equal(one.sequences, truth.sequences)
        assert torch.allclose(torch.stack(one.logits), torch.stack(truth.logits), atol=1e-5)


# Derivatives


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own attention has no rule for a batch of it
@pytest.mark.parametrize("spec", ["lora", "lorta", "partial_lora"])
def test_transforms_of_torch_func(spec: str) -> None:
    """Gradients, an ensemble of adapters, a gradient for each row."""
    model, adapter = attached("llama", spec)
    x, start = inputs("llama"), f"{hooks.PREFIX}{spec}."
    factors = {start + name: parameter.detach() for name, parameter in adapter.named_parameters()}

    def loss(factors: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, factors, (x,), {"use_cache": False})[0].square().sum()

    truth, found = gradients(model, adapter, x), grad(loss)(factors, x)
    assert all(torch.allclose(found[start + name], truth[name], rtol=1e-9) for name in truth)
    doubled = {name: 2 * factor for name, factor in factors.items()}
    both = {name: torch.stack([factor, doubled[name]]) for name, factor in factors.items()}
    ensemble = vmap(loss, (0, None))(both, x)
    assert torch.allclose(ensemble, torch.stack([loss(factors, x), loss(doubled, x)]), rtol=1e-9)
    of_rows = vmap(grad(loss), (None, 0))(factors, x.unsqueeze(1))
    assert all(torch.allclose(of_rows[start + name].sum(0), truth[name], rtol=1e-9) for name in truth)


def test_second_derivatives_are_refused_or_right() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    adapter = tp.attach(model, tp.load_spec("lora", rank=2, matrices=["all-linear"]))
    randomise(adapter)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for sources in ([*adapter.parameters()], [x]):
        with pytest.raises(tp.AdapterError, match="cannot be differentiated again, found `create_graph=True`"):
            torch.autograd.grad(model(x).square().sum(), sources, create_graph=True)
        with pytest.raises(tp.AdapterError, match="takes one gradient at a time, found `is_grads_batched=True`"):
            torch.autograd.grad(model(x), sources, torch.randn(2, 4, 3).double(), is_grads_batched=True)
    factors = {f"{hooks.PREFIX}lora.{name}": p.detach() for name, p in adapter.named_parameters()}
    directions = {name: torch.randn_like(factor) for name, factor in factors.items()}

    def steepness(factors: dict[str, Tensor]) -> Tensor:
        found = grad(lambda each: functional_call(model, each, (x.detach(),)).square().sum())(factors)
        return sum(each.square().sum() for each in found.values())

    def at(step: float) -> Tensor:
        return steepness({name: factor + step * directions[name] for name, factor in factors.items()})

    slope = sum((each * directions[name]).sum() for name, each in grad(steepness)(factors).items())
    assert torch.allclose((at(1e-5) - at(-1e-5)) / 2e-5, slope, rtol=1e-5)


def test_backward_twice_through_one_graph() -> None:
    model, adapter = attached("llama", "lorta")
    x = inputs("llama")
    truth = gradients(model, adapter, x)
    model.zero_grad()
    loss = run(model, x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(torch.allclose(p.grad, 2 * truth[name], rtol=1e-12) for name, p in adapter.named_parameters())


@pytest.mark.parametrize(("spec", "needs_it"), [("lora", True), ("vera", False)])
def test_an_input_that_is_changed_after_the_forward_pass(spec: str, needs_it: bool) -> None:
    """Where the backward pass needs it, autograd says so; without gradients the next module sees the input as it then is."""
    model, adapter = attached("llama", spec)
    attention = model.model.layers[0].self_attn
    x = torch.randn(2, 3, 64, dtype=torch.float64, requires_grad=True) * 1
    y = attention.q_proj(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace") if needs_it else contextlib.nullcontext():
        y.sum().backward()
    with torch.no_grad():
        x = torch.randn(2, 3, 64, dtype=torch.float64)
        attention.q_proj(x)
        x.add_(1)
        truth = dense(attention.v_proj, adapter.delta("model.layers.0.self_attn.v_proj"), x)
        assert torch.allclose(attention.v_proj(x), truth, rtol=1e-12)


@pytest.mark.parametrize("kept", ["mm", "bmm", "addmm"])
@pytest.mark.parametrize("spec", ["lora", "lorta"])
def test_checkpointing_of_some_kernels(spec: str, kept: str) -> None:
    """It keeps their outputs, among them the base's, and gives them out again in the order in which they came."""
    model, adapter = attached("llama", spec)
    x = inputs("llama")
    truth = gradients(model, adapter, x)
    contexts = partial(create_selective_checkpoint_contexts, [getattr(torch.ops.aten, kept).default])
    model.train().enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": contexts})
    found = gradients(model, adapter, x)
    assert all(torch.allclose(found[name], truth[name], rtol=1e-10) for name in truth)


@pytest.mark.parametrize("name", ["both", "bonds between several", "masked columns"])
def test_checkpointing_drops_the_same_again(name: str) -> None:
    """Its first forward pass has no gradients, and so a plan of its own; masks must not depend on the plan."""
    model = build("llama", torch.float64)
    adapter = tp.attach(model, tp.load_spec(DROPPED[name]))
    randomise(adapter)
    model.train().enable_input_require_grads()
    x, found = inputs("llama"), []
    for reentrant in (None, True):
        if reentrant:
            model.activation_checkpointing_enable({"use_reentrant": True})
        torch.manual_seed(3)
        found.append(gradients(model, adapter, x))
    assert all(torch.allclose(found[0][name], found[1][name], rtol=1e-9) for name in found[0])


# Modules


def test_a_module_that_runs_twice() -> None:
    """The second time on what came of the first: both uses leave their gradients, of which the first runs last."""
    torch.manual_seed(0)
    one, two = nn.Linear(8, 8).double(), nn.Linear(8, 8).double()

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = one, two

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(torch.tanh(self.one(self.two(x)))))

    model, x = Tied(), torch.randn(5, 8, dtype=torch.float64)
    adapter = tp.attach(model, tp.load_spec("lora", rank=2, matrices=["all-linear"]))
    randomise(adapter)
    factors = list(adapter.parameters())
    found = torch.autograd.grad(model(x).square().sum(), factors)
    with adapter.disabled():  # by autograd's own record of W + dW
        changes = updates(adapter, named_factors(adapter))

        def linear(name: str, x: Tensor) -> Tensor:
            module = getattr(model, name)
            return dense(module, changes[name], x) + module.bias

        y = linear("two", linear("one", torch.tanh(linear("one", linear("two", x)))))
        truth = torch.autograd.grad(y.square().sum(), factors)
    assert torch.allclose(model(x), y, rtol=1e-12)
    assert all(torch.allclose(ours, its, rtol=1e-10) for ours, its in zip(found, truth, strict=True))


def test_modules_in_any_order_and_layers_left_out() -> None:
    model, adapter = attached("llama", "lorta")
    x, layers = inputs("llama"), model.model.layers
    truth = gradients(model, adapter, x)
    model.model.layers, model.config.num_hidden_layers = layers[1:], 1
    with_one = gradients(model, adapter, x)
    assert not same(with_one, truth)
    model.model.layers, model.config.num_hidden_layers = layers, 2
    assert same(gradients(model, adapter, x), truth)
    h = torch.randn(2, 3, 64, dtype=torch.float64)
    for order in (("v_proj", "q_proj", "k_proj"), ("k_proj",), ("q_proj", "q_proj", "v_proj")):
        for name in order:
            module, change = (
                getattr(layers[0].self_attn, name),
                adapter.delta(f"model.layers.0.self_attn.{name}"),
            )
            assert torch.allclose(module(h), dense(module, change, h), rtol=1e-12)


def test_hooks_of_others_and_a_forward_of_their_own() -> None:
    model, adapter = attached("llama", "lora")
    module = model.model.layers[0].self_attn.q_proj
    change, x = adapter.delta("model.layers.0.self_attn.q_proj"), torch.randn(2, 3, 64, dtype=torch.float64)
    whole = dense(module, change, x)
    seen: list[Tensor] = []
    ways: list[tuple[Callable[[], Any], Tensor]] = [
        (lambda: module.register_forward_hook(lambda *given: seen.append(given[2])), whole),
        (lambda: module.register_forward_hook(lambda *given: 2 * given[2]), 2 * whole),
        (lambda: module.register_forward_hook(lambda *given: 2 * given[2], prepend=True), 2 * whole),
        (lambda: module.register_forward_pre_hook(lambda module, args: (3 * args[0],)), 3 * whole),
        (lambda: module.register_full_backward_hook(lambda *given: seen.append(given[1][0])), whole),
    ]
    for register, truth in ways:
        handle = register()
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.sum().backward()
        assert torch.allclose(y, truth, rtol=1e-10)
        handle.remove()
    assert torch.equal(seen[0], whole) or torch.allclose(seen[0], whole, rtol=1e-12)
    assert torch.allclose(seen[1], (module.weight + change).sum(0).expand_as(x), rtol=1e-10)
    original = module.forward
    module.forward = lambda x: 2 * original(x)
    assert torch.allclose(module(x), 2 * whole, rtol=1e-10)


# Training by halves


@pytest.mark.parametrize("spec", ["lora", "lorta"])
def test_factors_that_are_frozen_for_a_while_and_weights_that_are_not(spec: str) -> None:
    model, adapter = attached("llama", spec)
    x = inputs("llama")
    truth = gradients(model, adapter, x)
    for name, parameter in adapter.named_parameters():
        parameter.requires_grad_(False)
        model.zero_grad()
        run(model, x).square().sum().backward()
        found = {other: p.grad for other, p in adapter.named_parameters() if p.grad is not None}
        assert same(found, {other: each for other, each in truth.items() if other != name})
        parameter.requires_grad_(True)
    weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_()
    assert same(gradients(model, adapter, x), truth)
    assert weight.grad.abs().sum() > 0


def test_what_the_spec_freezes_is_not_trained_in_silence() -> None:
    model, adapter = attached("llama", "vera")
    adapter.factors["A"].requires_grad_()
    with pytest.raises(tp.AdapterError, match="factor `A` is frozen by its spec, found `requires_grad`"):
        run(model, inputs("llama"))


@pytest.mark.parametrize("spec", ["lora", "lorta"])
def test_numbers_that_are_replaced_behind_a_submodule(spec: str) -> None:
    """As averages of weights are swapped in: no version counts up, and no forward of the whole model begins."""
    model, adapter = attached("llama", spec)
    module, x = model.model.layers[1].self_attn.q_proj, torch.randn(2, 3, 64, dtype=torch.float64)
    for _ in range(3):
        change = adapter.delta("model.layers.1.self_attn.q_proj")
        assert torch.allclose(module(x), dense(module, change, x), rtol=1e-12)
        for parameter in adapter.parameters():
            parameter.data = parameter.data * 1.5


@pytest.mark.parametrize("spec", ["partial_lora", "shira"])
def test_inference_before_training(spec: str) -> None:
    """What is made for a length in inference mode serves the training steps of that length."""
    model = build("llama")
    adapter = tp.attach(model, spec)
    randomise(adapter)
    x = inputs("llama")[:1, :3]
    with torch.inference_mode():
        run(model, x)
    assert all(each.abs().sum() > 0 for each in gradients(model, adapter, x).values())


def test_another_optimizer_and_another_dtype_in_the_middle() -> None:
    model, adapter = attached("llama", "lorta", torch.float32)
    x = inputs("llama")
    for dtype, optimizer in (
        (torch.float32, torch.optim.AdamW),
        (torch.bfloat16, torch.optim.SGD),
        (torch.float64, torch.optim.Adam),
    ):
        model.to(dtype)
        before = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
        found = gradients(model, adapter, x)
        assert all(each.dtype == dtype and each.abs().sum() > 0 for each in found.values())
        optimizer(adapter.parameters(), lr=0.1).step()
        assert not any(torch.equal(p, before[name]) for name, p in adapter.named_parameters())


def test_copies_in_the_middle_of_training_go_their_own_ways() -> None:
    model, adapter = attached("llama", "lorta")
    x = inputs("llama")
    loss = run(model, x).square().sum()
    twin, file = copy.deepcopy(model), io.BytesIO()  # between forward and backward
    loss.backward()
    torch.optim.SGD(adapter.parameters(), lr=1e-3).step()
    torch.save(model, file)
    file.seek(0)
    before = {name: parameter.detach().clone() for name, parameter in adapter.named_parameters()}
    for other in (twin, torch.load(file, weights_only=False)):
        (own,) = hooks.adapters(other)
        start = {name: parameter.detach().clone() for name, parameter in own.named_parameters()}
        optimizer = torch.optim.SGD(own.parameters(), lr=1e-3)
        truth = gradients(other, own, x)
        optimizer.step()
        for name, parameter in own.named_parameters():
            assert torch.allclose(parameter, start[name] - 1e-3 * truth[name], rtol=1e-12)
        assert same({name: p.detach() for name, p in adapter.named_parameters()}, before)
