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
from tensorpeft.network.architecture import architecture, families, put
from tensorpeft.network.families import cards, model_shape
from tensorpeft.network.shapes import ModelShape, Rows


def without(config: dict, *keys: str) -> dict:
    return {key: value for key, value in config.items() if key not in keys}


MODELS = Path(__file__).parents[2] / "specs" / "models"
SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": 100}
LLAMA = {"model_type": "llama", **TEXT, "num_key_value_heads": 2}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 100, "n_positions": 64}
RELATIVE = {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 8, "norm_rel_ebd": "layer_norm"}
DISTILBERT = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "vocab_size": 100}
T5 = {"d_model": 32, "num_layers": 3, "num_heads": 4, "d_kv": 6, "d_ff": 48, "vocab_size": 100}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_source_positions": 20,
    "vocab_size": 100,
    "pad_token_id": 0,
}
EXPERTS = {"num_key_value_heads": 2, "num_experts": 5, "moe_intermediate_size": 24}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    **TEXT,
    "num_key_value_heads": 4,
    "n_routed_experts": 5,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "q_lora_rank": 10,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
CLIP_TEXT = {**TEXT, "model_type": "clip_text_model"}
CLIP_VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "image_size": 20,
    "patch_size": 8,
}
BART = {**without(WHISPER, "max_source_positions"), "max_position_embeddings": 64}
SIGLIP_VISION = without(CLIP_VISION, "model_type")
SWIN = {
    "embed_dim": 8,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 2, 2, 4],
    "image_size": 64,
    "patch_size": 2,
    "window_size": 4,
}
SOUND = {
    **SMALL,
    "vocab_size": 30,
    "conv_dim": [8, 8, 8, 8, 8, 8, 12],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}
CONFIGS = {
    "llama": LLAMA,
    "llama, all options": {
        **LLAMA,
        "head_dim": 16,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", **TEXT, "num_key_value_heads": 2},
    "qwen2": {"model_type": "qwen2", **TEXT, "num_key_value_heads": 2},
    "gpt2": GPT2,
    "gpt2, all options": {**GPT2, "n_inner": 72, "tie_word_embeddings": False, "num_labels": 5},
    "bert": {"model_type": "bert", **TEXT},
    "bert, untied": {"model_type": "bert", **TEXT, "tie_word_embeddings": False, "num_labels": 5},
    "roberta": {"model_type": "roberta", **TEXT},
    "roberta, untied": {"model_type": "roberta", **TEXT, "tie_word_embeddings": False},
    "deberta": {"model_type": "deberta-v2", **TEXT},
    "deberta v3": {
        "model_type": "deberta-v2",
        **TEXT,
        **RELATIVE,
        "share_att_key": True,
        "position_biased_input": False,
        "type_vocab_size": 0,
    },
    "deberta, own projections": {"model_type": "deberta-v2", **TEXT, **RELATIVE, "tie_word_embeddings": False},
    "deberta, all distances": {
        "model_type": "deberta-v2",
        **TEXT,
        "relative_attention": True,
        "conv_kernel_size": 3,
        "type_vocab_size": 2,
    },
    "vit": {"model_type": "vit", **SMALL},
    "vit, all options": {
        "model_type": "vit",
        **SMALL,
        "image_size": 43,
        "patch_size": 8,
        "num_channels": 1,
        "qkv_bias": False,
        "num_labels": 7,
        "pooler_output_size": 24,
    },
    "qwen3": {"model_type": "qwen3", **TEXT, "num_key_value_heads": 2, "head_dim": 16},
    "gemma": {"model_type": "gemma", **TEXT, "num_key_value_heads": 1},
    "gemma2": {"model_type": "gemma2", **TEXT, "num_key_value_heads": 2, "head_dim": 16},
    "mixtral": {"model_type": "mixtral", **TEXT, "num_key_value_heads": 2, "num_local_experts": 5},
    "phi": {"model_type": "phi", **TEXT, "num_key_value_heads": 2},
    "phi, norms of heads": {"model_type": "phi", **TEXT, "qk_layernorm": True, "tie_word_embeddings": True},
    "phi3": {"model_type": "phi3", **TEXT, "num_key_value_heads": 2, "pad_token_id": 0},
    "gpt_neox": {"model_type": "gpt_neox", **TEXT},
    "gpt_neox, no biases": {"model_type": "gpt_neox", **TEXT, "attention_bias": False, "tie_word_embeddings": True},
    "gptj": {"model_type": "gptj", "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4, "vocab_size": 100},
    "opt": {"model_type": "opt", **TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "opt, narrow embeddings": {
        "model_type": "opt",
        **TEXT,
        "ffn_dim": 48,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
        "enable_bias": False,
        "tie_word_embeddings": False,
    },
    "opt, plain norms": {
        "model_type": "opt",
        **TEXT,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "layer_norm_elementwise_affine": False,
    },
    "bloom": {"model_type": "bloom", "hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 100},
    "falcon, multi-query": {"model_type": "falcon", **TEXT},
    "falcon, every head": {
        "model_type": "falcon",
        **TEXT,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
        "ffn_hidden_size": 72,
        "tie_word_embeddings": False,
    },
    "falcon, grouped": {"model_type": "falcon", **TEXT, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, one norm": {
        "model_type": "falcon",
        **TEXT,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "num_ln_in_parallel_attn": 1,
    },
    "esm": {"model_type": "esm", **TEXT, "position_embedding_type": "rotary", "mask_token_id": 3, "pad_token_id": 1},
    "esm, all options": {
        "model_type": "esm",
        **TEXT,
        "emb_layer_norm_before": True,
        "tie_word_embeddings": False,
        "mask_token_id": 3,
        "pad_token_id": 1,
    },
    "distilbert": {"model_type": "distilbert", **DISTILBERT},
    "distilbert, untied": {"model_type": "distilbert", **DISTILBERT, "tie_word_embeddings": False, "num_labels": 5},
    "electra": {"model_type": "electra", **TEXT, "embedding_size": 16},
    "electra, wide embeddings": {
        "model_type": "electra",
        **TEXT,
        "embedding_size": 32,
        "tie_word_embeddings": False,
    },
    "albert": {"model_type": "albert", **TEXT, "embedding_size": 16},
    "albert, two groups": {
        "model_type": "albert",
        **TEXT,
        "embedding_size": 16,
        "num_hidden_groups": 2,
        "tie_word_embeddings": False,
    },
    "mamba": {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 3, "state_size": 4, "vocab_size": 100},
    "falcon_mamba": {
        "model_type": "falcon_mamba",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "state_size": 4,
        "vocab_size": 100,
    },
    "mamba, all options": {
        "model_type": "mamba",
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "state_size": 4,
        "vocab_size": 100,
        "expand": 3,
        "conv_kernel": 2,
        "time_step_rank": 5,
        "use_bias": True,
        "use_conv_bias": False,
        "tie_word_embeddings": False,
    },
    "t5": {"model_type": "t5", **T5},
    "t5, gated": {
        "model_type": "t5",
        **T5,
        "num_decoder_layers": 2,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 8,
        "tie_word_embeddings": False,
    },
    "whisper": {"model_type": "whisper", **WHISPER},
    "whisper, untied": {
        "model_type": "whisper",
        **WHISPER,
        "decoder_layers": 3,
        "decoder_attention_heads": 8,
        "decoder_ffn_dim": 72,
        "num_mel_bins": 16,
        "tie_word_embeddings": False,
    },
    "gemma3_text": {"model_type": "gemma3_text", **TEXT, "num_key_value_heads": 2, "head_dim": 16},
    "olmo": {"model_type": "olmo", **TEXT, "num_key_value_heads": 2},
    "olmo2": {"model_type": "olmo2", **TEXT, "num_key_value_heads": 2},
    "stablelm": {"model_type": "stablelm", **TEXT, "num_key_value_heads": 2},
    "stablelm, all options": {
        "model_type": "stablelm",
        **TEXT,
        "num_key_value_heads": 2,
        "use_qkv_bias": True,
        "qk_layernorm": True,
        "use_parallel_residual": True,
    },
    "starcoder2": {"model_type": "starcoder2", **TEXT, "num_key_value_heads": 2},
    "starcoder2, no biases": {"model_type": "starcoder2", **TEXT, "num_key_value_heads": 2, "use_bias": False},
    "cohere": {"model_type": "cohere", **TEXT, "num_key_value_heads": 2},
    "cohere, norms of heads": {"model_type": "cohere", **TEXT, "num_key_value_heads": 2, "use_qk_norm": True},
    "granite": {"model_type": "granite", **TEXT, "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "glm": {"model_type": "glm", **TEXT, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0},
    "glm4": {"model_type": "glm4", **TEXT, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0},
    "smollm3": {"model_type": "smollm3", **TEXT, "num_key_value_heads": 2, "pad_token_id": 0},
    "gpt_neo": {
        "model_type": "gpt_neo",
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "vocab_size": 100,
    },
    "qwen2_moe": {"model_type": "qwen2_moe", **TEXT, **EXPERTS, "shared_expert_intermediate_size": 40},
    "qwen3_moe": {"model_type": "qwen3_moe", **TEXT, **EXPERTS, "head_dim": 16},
    "olmoe": {"model_type": "olmoe", **TEXT, "num_key_value_heads": 2, "num_experts": 5, "attention_bias": True},
    "phimoe": {"model_type": "phimoe", **TEXT, "num_key_value_heads": 2, "num_local_experts": 5, "lm_head_bias": True},
    "gpt_oss": {"model_type": "gpt_oss", **TEXT, "num_key_value_heads": 2, "num_local_experts": 5, "head_dim": 16},
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3, wide queries": {**DEEPSEEK, "q_lora_rank": None, "first_k_dense_replace": 0, "n_shared_experts": 2},
    "xlm-roberta": {"model_type": "xlm-roberta", **TEXT},
    "camembert": {"model_type": "camembert", **TEXT},
    "mpnet": {"model_type": "mpnet", **TEXT},
    "mt5": {"model_type": "mt5", **T5},
    "bart": {"model_type": "bart", **BART},
    "mbart": {"model_type": "mbart", **BART},
    "pegasus": {"model_type": "pegasus", **BART},
    "marian": {"model_type": "marian", **BART, "decoder_vocab_size": 100},
    "deit": {"model_type": "deit", **SMALL, "image_size": 32, "patch_size": 8},
    "beit": {"model_type": "beit", **SMALL, "image_size": 32, "patch_size": 8},
    "beit, all options": {
        "model_type": "beit",
        **SMALL,
        "image_size": 32,
        "patch_size": 8,
        "use_relative_position_bias": True,
        "use_absolute_position_embeddings": True,
        "use_mask_token": True,
    },
    "dinov2": {
        "model_type": "dinov2",
        **without(SMALL, "intermediate_size"),
        "image_size": 32,
        "patch_size": 8,
    },
    "siglip": {"model_type": "siglip", "text_config": without(CLIP_TEXT, "model_type"), "vision_config": SIGLIP_VISION},
    "clip_text_model": {**CLIP_TEXT, "projection_dim": 24},
    "clip_vision_model": {**CLIP_VISION, "projection_dim": 24},
    "siglip_text_model": {**CLIP_TEXT, "model_type": "siglip_text_model", "projection_size": 24},
    "siglip_vision_model": {**CLIP_VISION, "model_type": "siglip_vision_model"},
    "siglip_vision_model, no head": {**CLIP_VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
    "swin": {"model_type": "swin", **SWIN},
    "swin, two stages": {"model_type": "swin", **SWIN, "depths": [2, 3], "num_heads": [2, 4], "qkv_bias": False},
    "modernbert": {"model_type": "modernbert", **TEXT, "pad_token_id": 0},
    "modernbert, all options": {
        "model_type": "modernbert",
        **TEXT,
        "pad_token_id": 0,
        "attention_bias": True,
        "mlp_bias": True,
        "norm_bias": True,
        "classifier_bias": True,
        "tie_word_embeddings": False,
    },
    "wav2vec2": {"model_type": "wav2vec2", **SOUND},
    "wav2vec2, all options": {"model_type": "wav2vec2", **SOUND, "conv_bias": True, "feat_extract_norm": "layer"},
    "hubert": {"model_type": "hubert", **SOUND},
    "clip": {"model_type": "clip", "text_config": CLIP_TEXT, "vision_config": CLIP_VISION, "projection_dim": 24},
}
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
