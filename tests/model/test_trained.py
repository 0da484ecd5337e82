"""Which parameters `train:` means, and what is said when it means none."""

from __future__ import annotations

import pytest

from tensorpeft.language.errors import SpecError
from tensorpeft.language.loader import load_spec
from tensorpeft.model.cards import model_shape
from tensorpeft.model.shape import ModelShape, Parameter
from tensorpeft.network.lower import lower

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
