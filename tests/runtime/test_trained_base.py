"""What is trained of the base beside dW: within ``disabled()``, in a file, and when somebody puts others there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import tensorpeft as tp
from tests.runtime import small
from tests.runtime.small import LORA, close, move, or_refused, spec

NORMS = spec(LORA, "0", train="norms")


def trained(merged: bool = False) -> tuple[nn.Sequential, tp.Adapter, Tensor]:
    """A model whose norm is trained too, and the output with that."""
    model = small.net()
    adapter = move(model, tp.attach(model, NORMS))
    base = small.net()
    changes = {
        "0.weight": small.change(adapter, base[0].weight),
        "1.weight": model[1].weight - base[1].weight,
        "1.bias": model[1].bias - base[1].bias,
    }
    truth = small.with_changes(base, changes).detach()
    if merged:
        adapter.merge()
    return model, adapter, truth


def base_output() -> Tensor:
    return small.net()(small.x())


both = pytest.mark.parametrize("merged", [False, True], ids=["free", "merged"])


# Contexts count their depth


@both
def test_disabled_within_disabled(merged):
    model, adapter, truth = trained(merged)
    with adapter.disabled():
        with adapter.disabled():
            assert torch.equal(model(small.x()), base_output())
        assert torch.equal(model(small.x()), base_output())
        assert not adapter.enabled
    assert close(model(small.x()), truth)


@both
@pytest.mark.parametrize("first", [0, 1])
def test_contexts_that_overlap(first, merged):
    """As those of two requests do; the last that is left enables the adapter."""
    model, adapter, truth = trained(merged)
    contexts = [adapter.disabled(), adapter.disabled()]
    for context in contexts:
        context.__enter__()
    for context in (contexts[first], contexts[1 - first]):
        assert torch.equal(model(small.x()), base_output())
        context.__exit__(None, None, None)
    assert close(model(small.x()), truth)
    assert (adapter.merged is not None) == merged


@both
def test_a_context_that_is_never_left_is_closed_with_its_generator(merged):
    model, adapter, truth = trained(merged)

    def batches():
        with adapter.disabled():
            yield model(small.x())
            yield model(small.x())

    generator = batches()
    assert torch.equal(next(generator), base_output())
    generator.close()
    assert close(model(small.x()), truth)


@both
def test_what_is_saved_within_disabled_is_what_is_trained(merged, tmp_path):
    model, adapter, truth = trained(merged)
    content = adapter.save(tmp_path / "outside").read_bytes()
    with adapter.disabled(), adapter.disabled():
        assert adapter.save(tmp_path / "inside").read_bytes() == content
        assert torch.equal(model(small.x()), base_output())
    fresh = small.net()
    tp.load(fresh, tmp_path / "inside")
    assert close(fresh(small.x()), truth)


def test_reset_within_disabled():
    model, adapter, _ = trained()
    with adapter.disabled():
        adapter.reset_parameters()
        assert torch.equal(model(small.x()), base_output())
    assert torch.equal(model(small.x()), base_output())
    adapter.detach()
    assert small.traces(model) == small.traces(small.net())


@both
def test_detached_within_disabled(merged):
    model, adapter, _ = trained(merged)
    with adapter.disabled():
        adapter.detach()
        assert torch.equal(model(small.x()), base_output())
    assert small.traces(model) == small.traces(small.net())


@both
def test_merged_or_unmerged_within_disabled(merged):
    """It is refused, or done for the time after."""
    model, adapter, truth = trained(merged)
    with adapter.disabled():
        or_refused(adapter.unmerge if merged else adapter.merge)
        assert torch.equal(model(small.x()), base_output())
    assert close(model(small.x()), truth)
    adapter.detach()
    assert small.traces(model) == small.traces(small.net())


# The statistics of a normalisation go with its parameters


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 6)).double()


def test_statistics_of_a_normalisation(tmp_path):
    base = normalised().eval()(small.x())
    model = normalised()
    before = small.traces(model)
    adapter = move(model, tp.attach(model, spec(LORA, "0", train="norms")))
    for _ in range(3):
        model(2 * small.x() + 1)
    model.eval()
    moved = model(small.x())
    with adapter.disabled():
        assert torch.equal(model(small.x()), base)
    assert torch.equal(model(small.x()), moved)
    adapter.save(tmp_path)
    fresh = normalised().eval()
    tp.load(fresh, tmp_path)
    assert close(fresh(small.x()), moved)
    adapter.detach()
    model.train()
    assert small.traces(model) == before


# One parameter has one owner


@pytest.mark.parametrize("train", ["0.weight", "'0.*'", "norms, 0.weight", "'*.weight'"])
def test_what_is_a_site_cannot_be_trained_as_well(train):
    with pytest.raises(tp.SpecError) as caught:
        tp.attach(small.net(), spec(LORA, "0", train=train))
    assert small.is_sentence(caught.value)
    assert "0.weight" in str(caught.value).splitlines()[0]


@pytest.mark.parametrize("module", [nn.Embedding(9, 6), nn.Conv1d(6, 6, 3)], ids=["embedding", "convolution"])
def test_nor_can_that_of_another_kind(module):
    with pytest.raises(tp.SpecError) as caught:
        tp.attach(nn.Sequential(module), spec(LORA, "0", train="0.weight"))
    assert small.is_sentence(caught.value)


def test_one_adapter_trains_what_another_one_adapts(tmp_path):
    """It is refused, or W is what the one trains, to which the other adds."""
    model = small.net()
    first = move(model, tp.attach(model, spec(LORA, "2", train="0.weight", name="first")))
    second = or_refused(lambda: tp.attach(model, spec(LORA, "0", name="second")))
    if second is None:
        return
    move(model, second, seed=4)
    weight = model[0].weight.detach().clone()
    expected = model(small.x())
    second.merge()
    assert close(model(small.x()), expected)
    first.save(tmp_path)
    fresh = small.net()
    tp.load(fresh, tmp_path)
    assert torch.equal(fresh[0].weight, weight)


# Others replace what is trained or adapted. It is followed, or noticed at the next forward, merge and save.


def other_weights() -> dict[str, Tensor]:
    torch.manual_seed(9)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)).double().state_dict()


def reassigned(model: nn.Module) -> None:
    own = {name: tensor for name, tensor in model.state_dict().items() if small.PREFIX in name}
    model.load_state_dict(other_weights() | {"1.weight": torch.arange(8).double()} | own, assign=True)


def set_anew(model: nn.Module) -> None:
    model[1].weight = nn.Parameter(torch.arange(8).double())


def replaced(model: nn.Module) -> None:
    model[1] = nn.LayerNorm(8).double()


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "load_state_dict, assign": reassigned,
    "another parameter": set_anew,
    "another module": replaced,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_trained_is_replaced(change, tmp_path):
    model, adapter, _ = trained()
    delta = small.change(adapter, model[0].weight).detach()
    CHANGES[change](model)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if small.PREFIX not in name}
    weights["0.weight"] += delta
    found = or_refused(lambda: model(small.x()))
    if found is None:
        assert or_refused(lambda: adapter.save(tmp_path)) is None
        return
    assert close(found, torch.func.functional_call(small.net(), weights, (small.x(),)))
    assert any(parameter is model[1].weight for parameter in adapter.parameters())
    adapter.save(tmp_path)
    fresh = small.net()
    tp.load(fresh, tmp_path)
    assert torch.equal(fresh[1].weight, model[1].weight)


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_noticed_by_save_before_any_forward(change, tmp_path):
    model, adapter, _ = trained()
    CHANGES[change](model)
    if or_refused(lambda: adapter.save(tmp_path)) is not None:
        fresh = small.net()
        tp.load(fresh, tmp_path)
        assert torch.equal(fresh[1].weight, model[1].weight)


def another_weight(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(other_weights()["0.weight"])


def another_module(model: nn.Module) -> None:
    model[0] = nn.Linear(6, 8).double()


def another_part(model: nn.Module) -> None:
    for number in (0, 2):
        model[number] = nn.Linear(6, 8).double() if number == 0 else nn.Linear(8, 6).double()


SITES = {
    "load_state_dict, assign": reassigned,
    "a weight": another_weight,
    "a module": another_module,
    "all": another_part,
}


@pytest.mark.parametrize("change", SITES)
@pytest.mark.parametrize("first", ["forward", "merge"])
def test_a_site_is_replaced(first, change):
    """The update goes on to what is there now, or the next forward and merge say that they cannot."""
    model = small.net()
    adapter = move(model, tp.attach(model, spec(LORA, "0")))
    SITES[change](model)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if small.PREFIX not in name}
    expected = torch.func.functional_call(
        small.net(), base | {"0.weight": base["0.weight"] + small.change(adapter, base["0.weight"])}, (small.x(),)
    )
    if first == "forward":
        found = or_refused(lambda: model(small.x()))
        assert found is None or close(found, expected)
    elif or_refused(lambda: (adapter.merge(),)) is not None:
        assert close(model(small.x()), expected)
        adapter.unmerge()
        assert torch.equal(model[0].weight, base["0.weight"])


@pytest.mark.parametrize("first", ["forward", "merge"])
def test_a_site_of_another_size_takes_its_place(first):
    model = small.net()
    adapter = move(model, tp.attach(model, spec(LORA, "0")))
    model[0], model[1], model[2] = nn.Linear(6, 9).double(), nn.LayerNorm(9).double(), nn.Linear(9, 6).double()
    with pytest.raises(tp.AdapterError) as caught:
        model(small.x()) if first == "forward" else adapter.merge()
    assert small.is_sentence(caught.value)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4
    )
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize(
    "of",
    [spec(LORA, "embed_tokens"), spec(LORA, "query", train="model.embed_tokens.weight")],
    ids=["a site", "trained"],
)
def test_an_embedding_is_resized(of, tmp_path):
    """transformers replaces its weight, and the module of the head."""
    model = llama()
    adapter = move(model, tp.attach(model, of))
    ids = torch.tensor([[3, 1, 11]])
    with torch.no_grad():
        before = model(ids, use_cache=False)[0]
        model.resize_token_embeddings(14, mean_resizing=False)
        found = or_refused(lambda: model(ids, use_cache=False)[0])
    if found is None:
        assert or_refused(lambda: adapter.save(Path(tmp_path))) is None
    else:
        assert close(found[..., :12], before)
        is_trained = adapter.spec.train != ()
        assert model.model.embed_tokens.weight.requires_grad == is_trained
        assert any(p is model.model.embed_tokens.weight for p in adapter.parameters()) == is_trained
