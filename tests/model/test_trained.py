"""Which parameters `train:` means, and what is said when it means none."""

from __future__ import annotations

import json

import pytest
from torch import nn

from tensorpeft.language.errors import SpecError
from tensorpeft.language.loader import load_spec
from tensorpeft.model.cards import model_shape
from tensorpeft.model.shape import ModelShape, Parameter
from tensorpeft.network.lower import lower
from tensorpeft.scanning.scan import scan
from tests.models import build

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "architectures": ["BertForSequenceClassification"],
}


def spec(*entries: str, matrices: str = "query, value"):
    return load_spec(
        f"tensorpeft: 1\ntarget: {{matrices: [{matrices}]}}\nstructure: matrix\nrank: 2\ntrain: [{', '.join(entries)}]\n"
    )


def count(shape: ModelShape, *entries: str, **options) -> int:
    return sum(parameter.count for parameter in lower(spec(*entries, **options), shape).extras)


def test_the_norms_of_a_published_setting():
    """LoReTTA (arXiv:2402.11417) counts the 65 RMSNorms of Llama-2 7B beside its cores."""
    assert count(model_shape("llama-2-7b"), "norms") == 65 * 4096


def test_each_word_on_a_card():
    shape = model_shape(BERT)
    assert count(shape, "norms") == 2 * 32 * 7
    assert count(shape, "head") == 2 * 33
    assert count(shape, "biases") == 2 * 3 * 32
    assert count(shape, "biases", matrices="all-linear") == 3 * (5 * 32 + 48)


def test_a_fused_module_has_one_bias():
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 100, "n_positions": 64}
    assert count(model_shape(gpt2), "biases", matrices="query") == 3 * 96


def test_what_two_entries_mean_is_trained_once():
    assert count(model_shape(BERT), "head", "classifier", "classifier.bias") == 2 * 33


def test_a_tied_head_is_the_embedding():
    shape = model_shape({**BERT, "architectures": ["BertForMaskedLM"]})
    transform, norm, bias = 32 * 33, 2 * 32, 100
    assert count(shape, "head") == 100 * 32 + transform + norm + bias


@pytest.mark.parametrize(
    ("entry", "paths"),
    [
        ("b.0.norm.weight", ["b.0.norm.weight"]),
        ("norm.weight", ["b.0.norm.weight", "b.1.norm.weight"]),
        ("norm", ["b.0.norm.weight", "b.1.norm.weight"]),
        ("b.1", ["b.1.norm.weight", "b.1.fc.bias"]),
        ("*.bias", ["b.1.fc.bias", "head.bias"]),
        ("hea?.*", ["head.bias"]),
        ("b.*.norm", ["b.0.norm.weight", "b.1.norm.weight"]),
    ],
)
def test_an_entry(entry, paths):
    names = ("b.0.norm.weight", "b.1.norm.weight", "b.1.fc.bias", "head.bias")
    shape = model_shape(BERT)
    shape = ModelShape("Plain", shape.sites, shape.sizes, 4, parameters=tuple(Parameter(name, 1) for name in names))
    assert [extra.path for extra in lower(spec(f"'{entry}'"), shape).extras] == paths


def test_entries_that_mean_nothing_are_told_at_once():
    llama = {**BERT, "model_type": "llama", "num_key_value_heads": 2, "architectures": ["LlamaModel"]}
    with pytest.raises(SpecError) as caught:
        lower(spec("biases", "head", "nroms", "embed_tokns"), model_shape(llama))
    shown = [line for line in str(caught.value).splitlines() if not line.startswith("    ")]
    assert shown == [
        "<spec>:5:9: `biases` means nothing here: no module of the target has a bias",
        "<spec>:5:17: `head` means nothing here: llama has no layer that is known to be its head",
        "<spec>:5:23: `nroms` is no parameter of llama, as far as its config tells; did you mean `norms`?",
        "<spec>:5:30: `embed_tokns` is no parameter of llama, as far as its config tells; did you mean `embed_tokens`?",
    ]


# A parameter that is a site's weight


def scanned(model: nn.Module, **options) -> str:
    """What is said of a spec on a live model, without the lines that show its text."""
    text = "tensorpeft: 1\nstructure: matrix\nrank: 2\n"
    text += "\n".join(f"{key}: {json.dumps(value)}" for key, value in options.items())
    with pytest.raises(SpecError) as caught:
        lower(load_spec(text), scan(model))
    return "\n".join(line for line in str(caught.value).splitlines() if not line.startswith("    "))


def test_a_parameter_is_trained_or_adapted_and_not_both():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    said = scanned(model, target={"matrices": ["0"]}, train=["0.weight", "2.bias", "*"])
    end = "which `target` adapts; expected it under `train` or under `target` alone"
    assert said == (
        f"<spec>:5:9: `0.weight` trains `0.weight`, the weight of linear of layer 0 (0), {end}\n"
        f"<spec>:5:31: `*` trains `0.weight`, the weight of linear of layer 0 (0), {end}"
    )


def test_a_part_of_a_fused_weight_counts():
    model = build("gpt2")
    said = scanned(model, target={"matrices": ["value"]}, train=["h.1.attn.c_attn.weight"])
    assert "`h.1.attn.c_attn.weight`, the weight of value of layer 1 (h.1.attn.c_attn), which `target` adapts" in said
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 100, "n_positions": 64}
    with pytest.raises(SpecError, match=r"the weight of query of layer 0 \(transformer\.h\.0\.attn\.c_attn\)"):
        lower(spec("c_attn.weight", matrices="query"), model_shape(gpt2))


def test_an_expert_in_a_parameter_counts():
    model = build("mixtral")
    said = scanned(model, target={"matrices": ["experts.down"]}, train=["layers.0.mlp.experts.down_proj"])
    assert "layer 0, expert 0 (model.layers.0.mlp.experts.down_proj), which `target` adapts" in said


def test_a_tied_weight_is_the_same_parameter():
    model = build("llama")
    assert lower(load_spec("lora", target={"matrices": ["lm_head"]}, train=["embed_tokens"]), scan(model)).extras
    model.lm_head.weight = model.model.embed_tokens.weight
    said = scanned(model, target={"matrices": ["lm_head"]}, train=["embed_tokens"])
    assert "`embed_tokens` trains `model.embed_tokens.weight`, the weight of lm_head of layer 0 (lm_head)" in said


def test_a_bias_of_a_site_is_no_weight_of_it():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
    text = "tensorpeft: 1\nstructure: matrix\nrank: 2\ntarget: {matrices: ['0']}\ntrain: "
    for entry in ("biases, 2.weight", "0.bias, '*.bias', 2.weight"):
        found = [extra.path for extra in lower(load_spec(f"{text}[{entry}]"), scan(model)).extras]
        assert "0.bias" in found
        assert "2.weight" in found
