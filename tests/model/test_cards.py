"""Cards and configs, held against the classes of transformers on the meta device."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from tensorpeft.language.errors import ModelError, listing
from tensorpeft.model.cards import cards, model_shape
from tensorpeft.model.family import architecture, families, put
from tensorpeft.model.shape import ModelShape, Rows
from tests.model.configs import CONFIGS, GPT2, LLAMA, TEXT, without

MODELS = Path(__file__).parents[2] / "specs" / "models"
PUBLISHED = [  # of the keys of their config.json, and the parameters that the files hold
    (
        {
            "model_type": "falcon",  # 7b
            "hidden_size": 4544,
            "num_hidden_layers": 32,
            "num_attention_heads": 71,
            "vocab_size": 65024,
            "multi_query": True,
        },
        6_921_720_704,
    ),
    (
        {
            "model_type": "mixtral",  # 8x7B
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "intermediate_size": 14336,
            "num_local_experts": 8,
        },
        46_702_792_704,
    ),
    (
        {
            "model_type": "t5",  # base
            "d_model": 768,
            "num_layers": 12,
            "num_heads": 12,
            "d_kv": 64,
            "d_ff": 3072,
            "vocab_size": 32128,
        },
        222_903_552,
    ),
    ({"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880}, 559_214_592),
]
NOT_ON_CARDS = ("shared", "head.attention.out_proj", *(f"conv_layers.{n}.conv" for n in range(7)))  # or never used
CLASSES = [
    (name, table["stem"] + ending)
    for name, config in CONFIGS.items()
    for table, _ in [put(config)]
    for ending in table["classes"]
]


def build(config: dict, name: str) -> torch.nn.Module:
    """A class of transformers with the values of a config, without memory for its parameters."""
    values = transformers.AutoConfig.for_model(**without(config, "architectures"))
    class_name, _, pooler = name.partition("(")
    with torch.device("meta"):
        return getattr(transformers, class_name)(values, **({"add_pooling_layer": False} if pooler else {}))


def weights(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of each weight that acts as a matrix, from its shape; of experts that of one."""
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, last = name.rpartition(".")
        module, shape = model.get_submodule(path), tuple(parameter.shape)
        kind = type(module).__name__
        if kind.endswith("Experts") and len(shape) == 3:
            found[name] = shape[:0:-1] if module.is_transposed else shape[1:]
        elif last == "weight" and ("Embedding" in kind or kind == "Conv1D"):
            found[path] = shape[::-1]
        elif last == "weight" and getattr(module, "groups", 1) == 1 and len(shape) > 1 and "Norm" not in kind:
            found[path] = (shape[0], math.prod(shape[1:]))
    again = {path for path, _ in model.named_modules(remove_duplicate=False)} - {
        path for path, _ in model.named_modules()
    }
    unlisted = [path for path in found if path.endswith(NOT_ON_CARDS)]
    return without(found, *again, *unlisted)


def covered(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of each weight that sites lie in; the parts of a fused one must fill it, and so must its experts."""
    found: dict[str, tuple[int, int]] = {}
    for site in shape.sites:
        d_out, _ = found.get(site.path, (0, site.d_in))
        found[site.path] = (d_out + site.d_out, site.d_in)
    experts = Counter(site.path for site in shape.sites if site.expert is not None)
    count = {path: len({site.expert for site in shape.sites if site.path == path}) for path in experts}
    return {path: (d_out // count.get(path, 1), d_in) for path, (d_out, d_in) in found.items()}


@pytest.mark.parametrize("card", cards())
def test_a_card_is_the_model_it_names(card):
    config = yaml.safe_load((MODELS / f"{card}.yaml").read_text())
    model, shape = build(config, config["architectures"][0]), model_shape(card)
    assert shape.n_parameters == sum(p.numel() for p in model.parameters())
    assert covered(shape) == weights(model)
    assert (shape.name, shape.model_class) == (card, config["architectures"][0])


@pytest.mark.parametrize(("name", "model_class"), CLASSES)
def test_a_family_counts_every_class_and_option(name, model_class):
    config = CONFIGS[name]
    model = build(config, model_class)
    shape = model_shape({**model.config.to_dict(), "architectures": [model_class]})
    assert shape.n_parameters == sum(p.numel() for p in model.parameters())
    assert covered(shape) == weights(model)


def test_published_totals():
    totals = {card: model_shape(card).n_parameters for card in ("llama-7b", "llama-2-7b", "vit-base", "vit-large")}
    assert totals == {
        "llama-7b": 6_738_415_616,
        "llama-2-7b": 6_738_415_616,
        "vit-base": 85_798_656,
        "vit-large": 303_301_632,
    }


@pytest.mark.parametrize(("config", "total"), PUBLISHED, ids=[config["model_type"] for config, _ in PUBLISHED])
def test_the_total_of_a_published_config(config, total):
    assert model_shape(config).n_parameters == total


def test_every_family_is_tried():
    assert {config["model_type"] for config in CONFIGS.values()} == set(families())


def test_sizes_are_published_and_switches_are_not():
    assert dict(model_shape("llama-3-70b").sizes) == {
        "width": 8192,
        "layers": 80,
        "heads": 64,
        "kv_heads": 8,
        "head_dim": 128,
        "mlp": 28672,
        "vocab": 128256,
    }


def test_heads_split_the_output_of_queries_keys_and_values_and_the_input_of_out():
    shape = model_shape({**LLAMA, "head_dim": 16})
    split = {s.matrix: (s.heads, s.head_side, s.d_out, s.d_in) for s in shape.sites if s.layer == 0}
    assert split == {
        "query": (4, "d_out", 64, 32),
        "key": (2, "d_out", 32, 32),
        "value": (2, "d_out", 32, 32),
        "out": (4, "d_in", 32, 64),
        "gate": (None, None, 48, 32),
        "up": (None, None, 48, 32),
        "down": (None, None, 32, 48),
        "embed_tokens": (None, None, 32, 100),
        "lm_head": (None, None, 100, 32),
    }


def test_the_parts_of_a_fused_module():
    sites = {site.key: site for site in model_shape(GPT2).sites}
    parts = [sites[role, 1] for role in ("query", "key", "value")]
    assert {site.module for site in parts} == {"transformer.h.1.attn.c_attn"}
    assert [site.rows for site in parts] == [Rows(0, 32, 96), Rows(32, 32, 96), Rows(64, 32, 96)]


def test_sites_go_matrix_by_matrix_and_layer_by_layer():
    keys = [site.key for site in model_shape(LLAMA).sites]
    roles = ["query", "key", "value", "out", "gate", "up", "down"]
    assert keys == [*((role, layer) for role in roles for layer in range(3)), ("embed_tokens", 0), ("lm_head", 0)]


def test_an_older_name_of_a_module_is_found():
    stack, layer, (matrix,) = architecture(CONFIGS["vit"]).find("vit.encoder.layer.2.attention.attention.query")
    assert (stack, layer, matrix.role) == ("vit.encoder.layer", 2, "query")
    assert architecture(CONFIGS["vit"]).find("vit.encoder.layer.2.attention.query") is None


def test_a_config_file_and_its_folder(tmp_path):
    folder = tmp_path / "my-llama"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    shape = model_shape(folder)
    assert shape == model_shape(str(folder / "config.json")) == model_shape(folder / "config.json")
    assert (shape.name, shape.sites) == ("my-llama", model_shape(LLAMA).sites)


def test_a_file_that_transformers_saves(tmp_path):
    values = transformers.AutoConfig.for_model("bert", **TEXT, id2label={0: "a", 1: "b", 2: "c"})
    values.architectures = ["BertForSequenceClassification"]
    values.save_pretrained(tmp_path)
    shape = model_shape(tmp_path)
    assert shape.model_class == "BertForSequenceClassification"
    with torch.device("meta"):
        model = transformers.BertForSequenceClassification(values)
    assert shape.n_parameters == sum(p.numel() for p in model.parameters())


def test_a_class_that_the_table_lacks_is_counted_as_the_first():
    shape = model_shape({**LLAMA, "architectures": ["LlamaForRhymes"]})
    assert shape.model_class == "LlamaForCausalLM"
    assert shape.n_parameters == model_shape(LLAMA).n_parameters


FAMILIES = listing(families(), 40)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, f"the config has no `model_type`, expected one of {FAMILIES}"),
        (
            {"model_type": "lama"},
            f"model type `lama` is not known, expected one of {FAMILIES}; did you mean `llama`?",
        ),
        ({"model_type": ["x"]}, f"model type `['x']` is not known, expected one of {FAMILIES}"),
        (without(LLAMA, "hidden_size"), "the config has no `hidden_size`"),
        (
            {**without(LLAMA, "hidden_size"), "hiden_size": 32},
            "the config has no `hidden_size`; did you mean `hiden_size`?",
        ),
        ({**LLAMA, "vocab_size": None}, "the config has no `vocab_size`"),
        ({**LLAMA, "hidden_size": "wide"}, "`hidden_size` is 'wide', expected a whole number of at most 1000000000"),
        ({**LLAMA, "hidden_size": 32.5}, "`hidden_size` is 32.5, expected a whole number of at most 1000000000"),
        (
            {**LLAMA, "hidden_size": 10**60},
            f"`hidden_size` is 1{'0' * 39}..., expected a whole number of at most 1000000000",
        ),
        ({**LLAMA, "num_attention_heads": 0}, "`heads` comes to 0, expected 1 to 1000000000"),
        ({**LLAMA, "num_key_value_heads": -2}, "`kv_heads` comes to -2, expected 1 to 1000000000"),
        ({**LLAMA, "num_hidden_layers": 10**9}, "`layers` comes to 1000000000, expected 1 to 10000"),
        (
            {**LLAMA, "num_attention_heads": 5},
            "`head_dim` is width / heads, which is no whole number for heads 5 and width 32",
        ),
        (
            {**GPT2, "add_cross_attention": True},
            "`add_cross_attention` adds parameters that the table of `gpt2` does not count",
        ),
        (
            {**CONFIGS["albert"], "max_position_embeddings": 64, "type_vocab_size": 2, "inner_group_num": 2},
            "`inner_group_num` adds parameters that the table of `albert` does not count",
        ),
        ({**CONFIGS["t5"], "num_decoder_layers": 10**9}, "`decoder_layers` comes to 1000000000, expected 1 to 10000"),
        (
            {**CONFIGS["clip"], "text_config": {}},
            "the config has no `text_config_hidden_size`; did you mean `text_config`?",
        ),
        (
            {**CONFIGS["vit"], "image_size": [224, 160], "patch_size": 16},
            "`image_size` is [224, 160], expected a whole number of at most 1000000000",
        ),
    ],
)
def test_a_config_that_makes_no_sense(config, message):
    with pytest.raises(ModelError) as caught:
        model_shape(config)
    assert str(caught.value) == f"config: {message}"


def test_an_unknown_card():
    with pytest.raises(ModelError) as caught:
        model_shape("llama-2-8b")
    assert str(caught.value) == (
        "`llama-2-8b` is neither a model card nor a config file; the cards are "
        + ", ".join(f"`{card}`" for card in cards())
        + "; did you mean `llama-3-8b`?"
    )


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "../specs/models/gpt2", ""])
def test_a_name_that_is_no_card(name):
    with pytest.raises(ModelError, match="is neither a model card nor a config file"):
        model_shape(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "this is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[1]", "expected a JSON object of at most 4 MiB"),
        ('{"model_type": "llama"}', "the config has no `hidden_size`"),
    ],
)
def test_a_file_that_is_no_config(tmp_path, text, message):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ModelError) as caught:
        model_shape(file)
    assert str(caught.value) == f"{file}: {message}"


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00", b"[" * 200_000, b'{"a": ' + b"9" * 5000 + b"}", b" " * (5 * 2**20)]
)
def test_a_file_that_is_hostile(tmp_path, content):
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ModelError):
        model_shape(file)


def test_a_shape_prints_what_it_has():
    assert str(model_shape("gpt2")) == (
        "model gpt2: 124,439,808 parameters of GPT2LMHeadModel, family gpt2\n"
        "  sizes width=768, layers=12, heads=12, head_dim=64, mlp=3072, vocab=50257, positions=1024\n"
        "  query 768 x 768: 12 sites like transformer.h.0.attn.c_attn\n"
        "  key 768 x 768: 12 sites like transformer.h.0.attn.c_attn\n"
        "  value 768 x 768: 12 sites like transformer.h.0.attn.c_attn\n"
        "  out 768 x 768: 12 sites like transformer.h.0.attn.c_proj\n"
        "  fc1 3072 x 768: 12 sites like transformer.h.0.mlp.c_fc\n"
        "  fc2 768 x 3072: 12 sites like transformer.h.0.mlp.c_proj\n"
        "  wte 768 x 50257, embedding: 1 site like transformer.wte\n"
        "  wpe 768 x 1024, embedding: 1 site like transformer.wpe\n"
        "  lm_head 50257 x 768: 1 site like lm_head\n"
        "  biases: 102,144 parameters\n"
        "  head: 38,597,376 parameters\n"
        "  norms: 38,400 parameters"
    )
