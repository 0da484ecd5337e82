"""Several adapters on one base, attached through the same module or through others: each weight is W plus what they add to it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn

import tensorpeft as tp
from tests.runtime import small
from tests.runtime.small import close, move, spec

UPDATES = {"lora": small.LORA, "ia3": small.IA3, "dora": small.DORA}
Root = Callable[
    [nn.Module], tuple[nn.Module, str]
]  # of the whole model: a module in it, and the path of the site from there
ROOTS: dict[str, Root] = {
    "the model": lambda model: (model, "0.0"),
    "its part": lambda model: (model[0], "0"),
}


def whole() -> nn.Sequential:
    return nn.Sequential(small.net())


def attach(model: nn.Module, root: str, update: str, name: str, train: str = "", seed: int = 2) -> tp.Adapter:
    module, path = ROOTS[root](model)
    return move(module, tp.attach(module, spec(UPDATES[update], path, train=train, name=name)), seed)


def pair(model: nn.Module, roots: tuple[str, str], updates: tuple[str, str] = ("lora", "lora")) -> list[tp.Adapter]:
    return [attach(model, roots[n], updates[n], "ab"[n], seed=n) for n in (0, 1)]


def expected(*adapters: tp.Adapter) -> Tensor:
    """The output with the updates of some adapters on the first linear module."""
    model = whole()
    weight = model[0][0].weight
    return small.with_changes(model, {"0.0.weight": sum((small.change(a, weight) for a in adapters), 0 * weight)})


both_roots = pytest.mark.parametrize("roots", list(itertools.product(ROOTS, ROOTS)), ids="+".join)
both_updates = pytest.mark.parametrize("updates", list(itertools.product(UPDATES, UPDATES)), ids="+".join)


@both_roots
@both_updates
def test_two_adapters_add_up(updates, roots):
    model = whole()
    a, b = pair(model, roots, updates)
    assert close(model(small.x()), expected(a, b))
    with a.disabled():
        assert close(model(small.x()), expected(b))
    with b.disabled():
        assert close(model(small.x()), expected(a))
    for adapter in (a, b):
        adapter.merge()
        assert close(model(small.x()), expected(a, b))


@both_roots
@both_updates
def test_an_adapter_that_is_attached_while_another_is_merged(updates, roots):
    """What it multiplies by, and whose rows it measures, is W: not what the other made of it."""
    model = whole()
    a = attach(model, roots[0], updates[0], "a", seed=0)
    a.merge()
    module, path = ROOTS[roots[1]](model)
    b = tp.attach(module, spec(UPDATES[updates[1]], path, name="b"))
    assert close(model(small.x()), expected(a))
    move(module, b)
    assert close(model(small.x()), expected(a, b))
    a.unmerge()
    assert close(model(small.x()), expected(a, b))
    a.detach()
    assert close(model(small.x()), expected(b))


@both_roots
def test_each_trains_its_own(roots):
    model = whole()
    a, b = pair(model, roots)
    model(small.x()).square().sum().backward()
    for adapter in (a, b):
        assert all(p.requires_grad and p.grad.abs().sum() > 0 for p in adapter.factors.parameters())
    own = {id(parameter) for adapter in (a, b) for parameter in adapter.parameters()}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == own


def orders() -> list[tuple[str, ...]]:
    """All orders in which two adapters can be merged and unmerged."""
    steps = ("a.merge", "b.merge", "a.unmerge", "b.unmerge")
    found = itertools.permutations(steps)
    return [o for o in found if o.index("a.merge") < o.index("a.unmerge") and o.index("b.merge") < o.index("b.unmerge")]


@both_roots
@pytest.mark.parametrize("order", orders(), ids=" ".join)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_merges_in_any_order(dtype, order, roots):
    model = whole().to(dtype)
    bits = small.traces(model)["tensor 0.0.weight"][1]
    adapters = dict(zip("ab", pair(model, roots), strict=True))
    for step in order:
        name, _, what = step.partition(".")
        getattr(adapters[name], what)()
        if dtype == torch.float64:
            assert close(model(small.x()), expected(*adapters.values()))
    assert small.traces(model)["tensor 0.0.weight"][1] == bits


@both_roots
@pytest.mark.parametrize("last", ["unmerge", "detach", "detach kept"])
@pytest.mark.parametrize("first", ["a", "b"])
def test_a_merge_that_is_kept_stays(first, last, roots):
    """Whoever merged before or after it, and takes that back or keeps it too."""
    model = whole()
    a, b = pair(model, roots)
    kept, other = (a, b) if first == "a" else (b, a)
    truth, alone = expected(a, b), expected(kept)
    a.merge()
    b.merge()
    kept.detach(keep_merged=True)
    assert close(model(small.x()), truth)
    if last == "unmerge":
        other.unmerge()
        assert close(model(small.x()), truth)
        with other.disabled():
            assert close(model(small.x()), alone)
    other.detach(keep_merged=last == "detach kept")
    assert close(model(small.x()), truth if last == "detach kept" else alone)


@both_roots
def test_a_merge_is_kept_while_the_other_is_disabled(roots):
    model = whole()
    a, b = pair(model, roots)
    truth, alone = expected(a, b), expected(a)
    a.merge()
    b.merge()
    with b.disabled():
        a.detach(keep_merged=True)
        assert close(model(small.x()), alone)
    assert close(model(small.x()), truth)


@both_roots
@pytest.mark.parametrize("ahead", ["a", "b"])
@pytest.mark.parametrize("merged", ["", "a", "b", "ab"])
def test_detached_in_any_order_they_leave_no_trace(merged, ahead, roots):
    model = whole()
    model[0][2].bias.requires_grad_(False)
    before = small.traces(model)
    a, b = pair(model, roots)
    model(small.x())
    for name in merged:
        {"a": a, "b": b}[name].merge()
    for adapter in (a, b) if ahead == "a" else (b, a):
        adapter.detach()
    assert small.traces(model) == before


@both_roots
def test_what_one_trains_of_the_base_no_other_freezes_or_trains(roots):
    model = whole()
    a = attach(model, roots[0], "lora", "a", train="norms")
    output = model(small.x())
    module, path = ROOTS[roots[1]](model)
    with pytest.raises(tp.AdapterError, match="is trained by adapter `a` already") as caught:
        tp.attach(module, spec(small.LORA, path, train="norms", name="b"))
    assert small.is_sentence(caught.value)
    assert torch.equal(model(small.x()), output)
    b = tp.attach(module, spec(small.LORA, path, train="biases", name="b"))
    assert model[0][1].weight.requires_grad
    assert model[0][0].bias.requires_grad
    a.detach()
    assert not model[0][1].weight.requires_grad
    assert model[0][0].bias.requires_grad
    b.detach()
    assert small.traces(model) == small.traces(whole())


def test_a_module_below_is_used_by_itself():
    model = whole()
    a, b = pair(model, ("the model", "its part"))
    model(small.x())
    move(model, a, seed=7)
    assert close(model[0](small.x()), expected(a, b))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("target", ["0", "base_layer"])
def test_over_a_model_that_peft_adapts(target, update):
    """Where an adapter is not refused there, its update is added to W and PEFT's."""
    base = small.net()
    torch.manual_seed(4)
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(small.net(), config).double()
    lora = model.base_model.model[0]
    theirs = lora.get_delta_weight("default").detach()
    adapter = small.or_refused(lambda: tp.attach(model, spec(UPDATES[update], target)))
    if adapter is None:
        return
    move(model, adapter)
    own = small.change(adapter, base[0].weight)
    assert close(model(small.x()), small.with_changes(base, {"0.weight": theirs + own}))
