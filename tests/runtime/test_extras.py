"""Parameters of the base that are trained beside dW: whose they are, what is kept of them, and how they come back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import tensorpeft as tp
from tensorpeft.language.errors import AdapterError, SpecError
from tests.models import build, randomise

SPEC = (
    "tensorpeft: 1\nname: {name}\ntarget: {{matrices: [query, value]}}\nstructure: matrix\nrank: 2\ntrain: [{train}]\n"
)
BITFIT = "tensorpeft: 1\nname: bitfit\ntarget: all-linear\ntrain: [biases]\n"


def spec(*train: str, name: str = "mine") -> str:
    return SPEC.format(name=name, train=", ".join(train))


def bert() -> nn.Module:
    return build("bert", torch.float64)


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(12).view(2, 6))[0]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def train(model: nn.Module, adapter: tp.Adapter, steps: int = 2) -> None:
    """Steps of gradient descent, after which every trained number has moved."""
    randomise(adapter, std=0.1)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(steps):
        model(input_ids=torch.arange(12).view(2, 6))[0].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_what_is_trained_is_what_the_spec_says():
    model = bert()
    adapter = tp.attach(model, spec("norms", "biases"))
    thawed = {
        name for name, parameter in model.named_parameters() if parameter.requires_grad and "tensorpeft" not in name
    }
    biases = ("query.bias", "value.bias")
    assert thawed == {name for name, _ in model.named_parameters() if "LayerNorm" in name or name.endswith(biases)}
    assert sum(p.numel() for p in adapter.trained_base.parameters()) == sum(
        extra.count for extra in adapter.network.extras
    )
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(p.numel() for p in adapter.parameters())


def test_the_adapter_s_parameters_are_the_model_s_own():
    model = bert()
    adapter = tp.attach(model, spec("norms"))
    assert adapter.trained_base["embeddings.LayerNorm.weight"] is model.embeddings.LayerNorm.weight
    train(model, adapter)
    assert model.embeddings.LayerNorm.weight.sub(1).abs().min() > 0


def test_gradients_are_those_of_the_base_trained_by_hand():
    model, twin = bert(), bert()
    adapter = tp.attach(model, spec("embeddings.LayerNorm.weight"))
    twin.embeddings.LayerNorm.weight.requires_grad_(True)
    for each in (model, twin):
        each(input_ids=torch.arange(12).view(2, 6))[0].square().sum().backward()
    assert torch.equal(adapter.trained_base["embeddings.LayerNorm.weight"].grad, twin.embeddings.LayerNorm.weight.grad)


def test_disabled_and_detach_give_the_base_back():
    model = bert()
    before, output = state(model), run(model)
    adapter = tp.attach(model, spec("norms", "biases"))
    assert torch.equal(run(model), output)
    train(model, adapter)
    trained = run(model)
    assert not torch.allclose(trained, output)
    with adapter.disabled():
        assert torch.equal(run(model), output)
    assert torch.equal(run(model), trained)
    adapter.merge()
    with adapter.disabled():
        assert torch.equal(run(model), output)
    adapter.detach()
    assert torch.equal(run(model), output)
    assert same(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_forward_may_be_disabled_between_forward_and_backward():
    model = bert()
    adapter = tp.attach(model, spec("norms"))
    randomise(adapter, std=0.1)
    loss = model(input_ids=torch.arange(12).view(2, 6))[0].square().sum()
    with adapter.disabled():
        run(model)
    loss.backward()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_what_is_kept_after_a_merge():
    model = bert()
    adapter = tp.attach(model, spec("norms", "biases"))
    train(model, adapter)
    trained = run(model)
    adapter.merge()
    adapter.detach(keep_merged=True)
    assert (run(model) - trained).abs().max() < 1e-9
    with torch.no_grad():
        adapter.trained_base["embeddings.LayerNorm.weight"].zero_()  # its own by now
    assert (run(model) - trained).abs().max() < 1e-9


@pytest.mark.parametrize("text", [spec("norms", "encoder.layer.0.output.dense"), BITFIT], ids=["beside", "alone"])
def test_save_and_load(text, tmp_path):
    model = bert()
    adapter = tp.attach(model, text)
    train(model, adapter)
    adapter.save(tmp_path)
    fresh = bert()
    before, output = state(fresh), run(fresh)
    loaded = tp.load(fresh, tmp_path)
    assert torch.equal(run(fresh), run(model))
    loaded.detach()
    assert torch.equal(run(fresh), output)
    assert same(fresh, before)
    assert (tmp_path / "adapter.safetensors").read_bytes() == (loaded.save(tmp_path)).read_bytes()


def test_a_spec_of_extras_alone():
    """BitFit (Ben Zaken et al., arXiv:2106.10199): the biases, and nothing else."""
    model = bert()
    adapter = tp.attach(model, BITFIT)
    assert adapter.sites == ()
    train(model, adapter)
    moved = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == {n for n, _ in model.named_parameters() if n.endswith("bias") and "LayerNorm" not in n}


def test_a_parameter_has_one_adapter():
    model = bert()
    first = tp.attach(model, spec("norms", name="first"))
    before = state(model)
    with pytest.raises(AdapterError) as caught:
        tp.attach(model, spec("embeddings.LayerNorm", name="second"))
    assert str(caught.value) == (
        "`embeddings.LayerNorm.weight` is trained by adapter `first` already; detach that one first"
    )
    assert same(model, before)
    assert [parameter.requires_grad for parameter in first.parameters()] == [True] * len([*first.parameters()])
    second = tp.attach(model, spec("biases", name="second"))
    train(model, second)
    first.detach()
    thawed = {name for name, p in model.named_parameters() if p.requires_grad and "tensorpeft" not in name}
    assert thawed == {name for name, _ in model.named_parameters() if name.endswith(("query.bias", "value.bias"))}
    second.detach()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_was_frozen_before_is_frozen_after():
    model = bert().requires_grad_(False)
    tp.attach(model, spec("norms")).detach()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_state_dict_has_them_once():
    model = bert()
    names = {*model.state_dict()}
    adapter = tp.attach(model, spec("norms"))
    assert {name for name in model.state_dict() if not name.startswith("tensorpeft_")} == names
    assert not any("extras" in name for name in model.state_dict())
    model.load_state_dict(model.state_dict())
    train(model, adapter)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_has_parameters_of_its_own(copied):
    model = bert()
    adapter = tp.attach(model, spec("norms"))
    train(model, adapter)
    output = run(model)
    twin = copied(model)
    theirs = twin.tensorpeft_mine
    assert theirs.trained_base["embeddings.LayerNorm.weight"] is twin.embeddings.LayerNorm.weight
    train(twin, theirs)
    theirs.detach()
    assert torch.equal(run(model), output)
    assert torch.equal(run(twin), run(bert()))


def test_reset_gives_the_base_s_values():
    model = bert()
    output = run(model)
    adapter = tp.attach(model, spec("norms"))
    train(model, adapter)
    adapter.reset_parameters()
    assert torch.equal(run(model), output)


def test_a_change_of_dtype_reaches_what_is_kept():
    model = bert()
    adapter = tp.attach(model, spec("norms"))
    train(model, adapter)
    model.float()
    adapter.detach()
    assert torch.equal(run(model), run(bert().float()))


def test_a_pattern_that_means_nothing_is_told_where_it_stands():
    model = bert()
    with pytest.raises(SpecError) as caught:
        tp.attach(model, spec("embeddings.LayerNrom"))
    assert str(caught.value).splitlines()[0] == (
        "<spec>:6:9: `embeddings.LayerNrom` is no parameter of BertModel; did you mean `embeddings.LayerNorm`?"
    )
