"""What an adapter lives through: disabling, merging, copies, casts, checkpointing, compilation, detaching."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tensorpeft as tp
from tensorpeft.runtime import hooks
from tests.models import ARCHITECTURES, build, inputs, randomise, run
from tests.runtime.test_oracle import IDS, SPECS

WITHOUT_TASKS = [spec for spec in SPECS if "tasks" not in SPECS[spec]]


def attached(architecture: str, spec: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tp.Adapter]:
    model = build(architecture, dtype)
    adapter = tp.attach(model, tp.load_spec(spec, **SPECS[spec]))
    randomise(adapter)
    return model, adapter


def output(model: nn.Module, adapter: tp.Adapter, x: Tensor) -> Tensor:
    with adapter.tasks(IDS) if adapter.spec.tasks else contextlib.nullcontext():
        return run(model, x)


def gradients(model: nn.Module, adapter: tp.Adapter, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    with adapter.tasks(IDS) if adapter.spec.tasks else contextlib.nullcontext():
        run(model, x).square().sum().backward()
    return {name: p.grad.clone() for name, p in adapter.named_parameters()}


def same(found: dict[str, Tensor], truth: dict[str, Tensor]) -> bool:
    return found.keys() == truth.keys() and all(torch.equal(found[name], truth[name]) for name in truth)


def state(model: nn.Module) -> dict[str, object]:
    """Everything of a model that an adapter could leave a trace in."""
    seen: dict[str, object] = {}
    for path, module in model.named_modules():
        hooked = {n: list(v) for n, v in vars(module).items() if n.endswith("hooks") or "hooks_with_kwargs" in n}
        seen[path] = (type(module), hooked, list(module._modules), sorted(vars(module)))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        seen[f"tensor {name}"] = (tensor.data_ptr(), tensor.requires_grad, tensor.detach().clone().numpy().tobytes())
    return seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("spec", SPECS)
def test_starts_at_the_base_and_detaches_without_a_trace(architecture: str, spec: str) -> None:
    model, x = build(architecture), inputs(architecture)
    model.train()
    before, keys = state(model), list(model.state_dict())
    model.eval()
    base = run(model, x)
    model.train()
    adapter = tp.attach(model, tp.load_spec(spec, **SPECS[spec]))
    model.eval()
    assert torch.equal(output(model, adapter, x), base)
    randomise(adapter)
    assert not torch.allclose(output(model, adapter, x), base, rtol=1e-3)
    assert [key for key in model.state_dict() if not key.startswith(hooks.PREFIX)] == keys
    assert not any(p.requires_grad for n, p in model.named_parameters() if not n.startswith(hooks.PREFIX))
    gradients(model, adapter, x)
    adapter.detach()
    model.train()
    assert state(model) == before
    with pytest.raises(tp.AdapterError, match="is not attached to a model"):
        adapter.detach()


def test_attach_that_fails_halfway_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    before = state(model)
    original, calls = hooks.ModuleForward.join, []

    def failing(self: hooks.ModuleForward, *args: Any) -> None:
        calls.append(self)
        if len(calls) == 3:
            raise RuntimeError("no more modules")
        original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(hooks.ModuleForward, "join", failing)
        with pytest.raises(RuntimeError, match="no more modules"):
            tp.attach(model, "lora")
    assert len(calls) == 3
    assert state(model) == before
    tp.attach(model, "lora")


@pytest.mark.parametrize("spec", ["lora", "lorta", "vera", "partial_lora"])
def test_trains_its_own_factors_only(spec: str) -> None:
    model = build("llama")
    adapter = tp.attach(model, tp.load_spec(spec, **SPECS[spec]))
    x, target = inputs("llama"), torch.randn(3, 7, 50, generator=torch.Generator().manual_seed(0))
    frozen = {
        n: p.detach().clone() for n, p in (*model.named_parameters(), *adapter.named_buffers()) if not p.requires_grad
    }
    trained = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    losses = []
    for _ in range(15):
        loss = (run(model, x) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.98 * losses[0]
    now = dict((*model.named_parameters(), *adapter.named_buffers()))
    assert all(torch.equal(now[name], values) for name, values in frozen.items())
    assert all(not torch.equal(p, trained[n]) for n, p in adapter.named_parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("spec", WITHOUT_TASKS)
def test_merged_equals_factored_and_unmerging_restores_the_bits(architecture: str, spec: str) -> None:
    model, adapter = attached(architecture, spec)
    x, weights = inputs(architecture), {n: p.detach().clone() for n, p in model.named_parameters()}
    factored = run(model, x)
    with adapter.disabled():
        base = run(model, x)
    adapter.merge()
    merged = run(model, x)
    assert torch.allclose(merged, factored, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(merged, base, rtol=1e-3)
    with adapter.disabled():
        assert torch.equal(run(model, x), base)
    assert torch.equal(run(model, x), merged)
    adapter.unmerge()
    assert torch.equal(run(model, x), factored)
    assert same(dict(model.named_parameters()), weights)


def test_merged_task_equals_rows_of_that_task() -> None:
    model, adapter = attached("bert", "shared_a")
    x = inputs("bert")
    with adapter.tasks(torch.tensor([1, 1, 1])):
        rows = run(model, x)
    adapter.merge(task=1)
    assert torch.allclose(run(model, x), rows, rtol=1e-10)


def test_merge_in_low_precision_restores_the_bits_too() -> None:
    model, adapter = attached("llama", "lora", torch.bfloat16)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(5):
        adapter.merge()
        adapter.unmerge()
    assert same(dict(model.named_parameters()), weights)


def test_merge_refuses_what_is_not_finite_and_leaves_the_base() -> None:
    model, adapter = attached("llama", "lora")
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        adapter.factors["A"][1, 1, 0, 0] = float("nan")
    with pytest.raises(tp.AdapterError) as error:
        adapter.merge()
    assert str(error.value) == (
        "the update of `model.layers.1.self_attn.v_proj` has values that are not finite; nothing was merged"
    )
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if not n.startswith(hooks.PREFIX))


def test_detach_keeping_the_merge() -> None:
    model, adapter = attached("gpt2", "lora")
    x = inputs("gpt2")
    factored = run(model, x)
    adapter.merge()
    adapter.detach(keep_merged=True)
    assert torch.allclose(run(model, x), factored, rtol=1e-10)
    assert not hooks.adapters(model)


def test_two_adapters_add_up() -> None:
    model, x = build("llama", torch.float64), inputs("llama")
    before = state(model)
    base = run(model, x)
    first = tp.attach(model, "lora")
    second = tp.attach(model, tp.load_spec("lorta"), name="other")
    randomise(first)
    randomise(second, seed=5)
    both = run(model, x)
    with first.disabled():
        second_alone = run(model, x)
    with second.disabled():
        first_alone = run(model, x)
    with first.disabled(), second.disabled():
        assert torch.equal(run(model, x), base)
    assert len({t.sum().item() for t in (base, both, first_alone, second_alone)}) == 4
    first.merge()
    second.merge()
    assert torch.allclose(run(model, x), both, rtol=1e-6, atol=1e-7)
    first.unmerge()  # in any order: a weight is its own bits and the sum of what is merged into it
    assert torch.allclose(run(model, x), both, rtol=1e-6, atol=1e-7)
    with first.disabled():
        assert torch.allclose(run(model, x), second_alone, rtol=1e-6, atol=1e-7)
    second.unmerge()
    assert torch.equal(run(model, x), both)
    first.detach()
    assert torch.equal(run(model, x), second_alone)
    assert not any(p.requires_grad for n, p in model.named_parameters() if not n.startswith(hooks.PREFIX))
    second.detach()
    assert state(model) == before


def test_an_adapter_of_the_same_name_is_refused() -> None:
    model, _ = attached("llama", "lora")
    before = state(model)
    with pytest.raises(tp.AdapterError) as error:
        tp.attach(model, "lora")
    assert str(error.value) == "the model already has an adapter `lora`; give this one another name with `name=`"
    assert state(model) == before


@pytest.mark.parametrize("spec", SPECS)
def test_copies_share_nothing(spec: str) -> None:
    model, adapter = attached("llama", spec)
    x = inputs("llama")
    truth, grads = output(model, adapter, x), gradients(model, adapter, x)  # a prologue with a graph is cached now
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(pickled, weights_only=False)):
        (other,) = hooks.adapters(twin)
        assert other is not adapter
        assert torch.equal(output(twin, other, x), truth)
        assert same(gradients(twin, other, x), grads)
        randomise(other, seed=9)
        assert not torch.equal(output(twin, other, x), truth)
        assert torch.equal(output(model, adapter, x), truth)
        other.detach()


@pytest.mark.parametrize("spec", SPECS)
def test_sharing_survives_a_cast(spec: str) -> None:
    model, adapter = attached("llama", spec, torch.float32)
    x, names = inputs("llama"), [name for name, _ in adapter.named_parameters()]
    truth = output(model, adapter, x)
    model.to(torch.bfloat16)
    assert [name for name, _ in adapter.named_parameters()] == names
    assert all(p.dtype == torch.bfloat16 for p in adapter.parameters())
    assert (output(model, adapter, x).float() - truth).norm() < 0.1 * truth.norm()
    model.to(torch.float64)
    assert output(model, adapter, x).dtype == torch.float64
    model.to("meta")
    assert all(p.is_meta for p in adapter.parameters())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(spec: str, reentrant: bool) -> None:
    model, adapter = attached("llama", spec, torch.float32)
    model.train()
    x = inputs("llama")
    truth = gradients(model, adapter, x)
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(model, adapter, x)
    if reentrant:  # each segment walks the prologue by itself, so sums over sites are taken in another order
        assert all(torch.allclose(found[name], truth[name], rtol=1e-4, atol=1e-6) for name in truth)
    else:
        assert same(found, truth)


@pytest.mark.parametrize("spec", SPECS)
def test_gradients_accumulate(spec: str) -> None:
    model, adapter = attached("llama", spec)
    x = inputs("llama")
    truth = gradients(model, adapter, x)
    model.zero_grad(set_to_none=True)
    for _ in range(2):
        output(model, adapter, x).square().sum().backward()
    assert all(torch.allclose(p.grad, 2 * truth[n], rtol=1e-12) for n, p in adapter.named_parameters())
    model.zero_grad(set_to_none=True)
    (output(model, adapter, x).square().sum() + output(model, adapter, x).square().sum()).backward()
    assert all(torch.allclose(p.grad, 2 * truth[n], rtol=1e-12) for n, p in adapter.named_parameters())


def test_sees_factors_changed_behind_its_back() -> None:
    """Through ``.data`` no version counts up: a forward of the model must not trust what it computed before."""
    model, adapter = attached("llama", "lora")
    x = inputs("llama")
    first = run(model, x)
    for parameter in adapter.parameters():
        parameter.data.mul_(2)
    assert not torch.equal(run(model, x), first)


def test_a_submodule_called_by_itself() -> None:
    model, adapter = attached("llama", "lorta")
    site, x = model.model.layers[1].self_attn.q_proj, torch.randn(2, 5, 64, dtype=torch.float64)
    run(model, inputs("llama"))
    for _ in range(2):
        dense = nn.functional.linear(x, site.weight + adapter.delta("model.layers.1.self_attn.q_proj"))
        assert torch.allclose(site(x), dense, rtol=1e-12)
        randomise(adapter, seed=11)


def test_inference_mode_then_training() -> None:
    model, adapter = attached("llama", "lorta")
    x = inputs("llama")
    truth = run(model, x).detach()
    with torch.inference_mode():
        assert torch.equal(run(model, x), truth)
        assert model.model.layers[0].self_attn.q_proj(torch.ones(1, 64, dtype=torch.float64)).isfinite().all()
    with torch.no_grad():
        assert torch.equal(run(model, x), truth)
    assert all(g.abs().sum() > 0 for g in gradients(model, adapter, x).values())


@pytest.mark.parametrize("spec", SPECS)
def test_autocast(spec: str) -> None:
    model, adapter = attached("llama", spec, torch.float32)
    x = inputs("llama")
    truth, grads = output(model, adapter, x), gradients(model, adapter, x)
    with torch.autocast("cpu", torch.bfloat16):
        half, found = output(model, adapter, x), gradients(model, adapter, x)
    assert half.dtype == torch.bfloat16
    assert (half.float() - truth).norm() < 0.05 * truth.norm()
    assert all(found[n].dtype == torch.float32 and (found[n] - grads[n]).norm() < 0.1 * grads[n].norm() for n in grads)


@pytest.mark.parametrize("spec", SPECS)
def test_compiles_into_one_graph(spec: str) -> None:
    torch._dynamo.reset()
    model, adapter = attached("llama", spec, torch.float32)
    x = inputs("llama")
    truth, grads = output(model, adapter, x), gradients(model, adapter, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad(set_to_none=True)
    found = output(compiled, adapter, x)
    found.square().sum().backward()
    assert torch.allclose(found, truth, rtol=1e-4, atol=1e-5)
    assert all(torch.allclose(p.grad, grads[n], rtol=1e-3, atol=1e-4) for n, p in adapter.named_parameters())
    randomise(adapter, seed=4)
    assert torch.allclose(output(compiled, adapter, x), output(model, adapter, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["training", "forward", "put"])
def test_a_factor_that_torch_has_a_name_for(name: str) -> None:
    text = f"tensorpeft: 1\ntarget: {{matrices: [query]}}\nrank: {{r: 2}}\nfactors: {{{name}: {{init: zeros}}}}\n"
    with pytest.raises(tp.SpecError, match=f"the factor name `{name}` is taken") as caught:
        tp.attach(build("llama"), tp.load_spec(f"{text}update: {name}[matrix, layer, d_out, r] * A[layer, r, d_in]"))
    assert caught.value.problems[0].span.position == (5, 9)


def test_tasks_are_refused_where_they_do_not_fit() -> None:
    model, adapter = attached("bert", "shared_a")
    x = inputs("bert")
    with pytest.raises(tp.AdapterError, match=r"call the model within `adapter.tasks\(ids\)`"):
        run(model, x)
    with (
        adapter.tasks(torch.tensor([0, 1])),
        pytest.raises(tp.AdapterError, match="was given 2 ids, but query of layer 0"),
    ):
        run(model, x)
    with (
        pytest.raises(tp.AdapterError, match=r"found ids from 0 to 3, expected 0 to 2"),
        adapter.tasks(torch.tensor([0, 3])),
    ):
        pass
    with pytest.raises(tp.AdapterError, match="has 3 tasks, found task None, expected 0 to 2"):
        adapter.delta("encoder.layer.0.attention.self.query")
    model, adapter = attached("bert", "lora")
    with pytest.raises(tp.AdapterError, match="has no task mode"), adapter.tasks(torch.tensor([0])):
        pass


def test_delta_of_an_unknown_place() -> None:
    _, adapter = attached("llama", "lora")
    with pytest.raises(tp.AdapterError) as error:
        adapter.delta("model.layers.0.self_attn.q_porj")
    assert str(error.value) == (
        "adapter `lora` has no site at `model.layers.0.self_attn.q_porj`; did you mean `model.layers.0.self_attn.q_proj`?"
    )


def test_a_bare_sequential() -> None:
    """Its forward calls every submodule, of which the adapter is one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    x, before = torch.randn(5, 6, dtype=torch.float64), state(model)
    base = model(x)
    adapter = tp.attach(model, tp.load_spec("lora", rank=2, matrices=["all-linear"]))
    assert torch.equal(model(x), base)
    randomise(adapter)
    factored = model(x)
    adapter.merge()
    assert torch.allclose(model(x), factored, rtol=1e-12)
    assert not torch.allclose(factored, base)
    adapter.detach()
    assert state(model) == before
