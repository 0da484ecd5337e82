"""A small model of every family, and an input for each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tensorpeft.model.cards import model_shape
from tensorpeft.model.shape import ModelShape
from tensorpeft.scanning.scan import scan

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**TEXT, "num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "bos_token_id": 0, "eos_token_id": 0}
RELATIVE = {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 8, "norm_rel_ebd": "layer_norm"}
T5 = {"d_model": 32, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "d_kv": 6, "d_ff": 48, "vocab_size": 100}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 72,
    "num_mel_bins": 8,
    "max_source_positions": 6,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
VISION = {
    **SMALL,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "image_size": 16,
    "patch_size": 8,
}
CLIP = {"text_config": TEXT, "vision_config": VISION, "projection_dim": 24}


BART = {
    **{key: value for key, value in WHISPER.items() if key != "max_source_positions"},
    "max_position_embeddings": 16,
}
EXPERTS = {**GROUPED, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "experts_implementation": "eager"}
DEEPSEEK = {
    **TEXT,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "q_lora_rank": 10,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "experts_implementation": "eager",
}
GPT_NEO = {"hidden_size": 32, "num_layers": 2, "num_heads": 4}
DINO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
SOUND = {
    **SMALL,
    "vocab_size": 30,
    "conv_dim": [8, 8, 8, 8, 8, 8, 12],
    "conv_stride": [2, 2, 2, 1, 1, 1, 1],
    "conv_kernel": [3, 3, 3, 3, 3, 2, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
}


def layers(number: int, roles: tuple[str, ...], stack: str = "", first: int = 0) -> dict[str, range]:
    return {f"{stack}{role}": range(first, number) for role in roles}


ATTENTION = ("query", "key", "value", "out")
MLP = layers(2, (*ATTENTION, "fc1", "fc2"))
GATED = layers(2, (*ATTENTION, "gate", "up", "down"))
UNGATED = layers(2, (*ATTENTION, "up", "down"))
MIXTURE = (*ATTENTION, "experts.gate", "experts.up", "experts.down", "router")
DEEPSEEK_ROLES = {
    **layers(3, (*ATTENTION, "query_down", "kv_down")),
    **layers(1, ("gate", "up", "down")),
    **layers(
        3, ("experts.gate", "experts.up", "experts.down", "router", "shared.gate", "shared.up", "shared.down"), first=1
    ),
}


def encoder_decoder(mlp: tuple[str, ...]) -> dict[str, range]:
    """Two layers of an encoder, and three of a decoder that attends to it."""
    encoder, decoder = layers(2, ATTENTION + mlp, "encoder."), layers(3, ATTENTION + mlp, "decoder.")
    return encoder | decoder | layers(3, ATTENTION, "decoder.cross.")


@dataclass(frozen=True)
class Case:
    """A class of transformers, the options of a small model of it, and in which layers each matrix is."""

    name: str
    options: dict[str, Any]
    matrices: dict[str, range]

    def build(self) -> nn.Module:
        model_class = getattr(transformers, self.name)
        torch.manual_seed(0)
        return model_class(model_class.config_class(**self.options))


CASES = {
    "llama": Case("LlamaForCausalLM", GROUPED, GATED),
    "llama, body": Case("LlamaModel", GROUPED, GATED),
    "mistral": Case("MistralForCausalLM", {**TEXT, "num_key_value_heads": 1, "head_dim": 16}, GATED),
    "qwen2": Case("Qwen2ForCausalLM", GROUPED, GATED),
    "qwen3": Case("Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}, GATED),
    "gemma": Case("GemmaForCausalLM", {**GROUPED, "head_dim": 16}, GATED),
    "gemma2": Case("Gemma2ForCausalLM", {**GROUPED, "head_dim": 16}, GATED),
    "mixtral": Case(
        "MixtralForCausalLM",
        {**GROUPED, "num_local_experts": 4, "experts_implementation": "eager"},
        layers(2, MIXTURE),
    ),
    "phi": Case("PhiForCausalLM", GROUPED, MLP),
    "phi3": Case("Phi3ForCausalLM", GROUPED, GATED),
    "gpt2": Case("GPT2LMHeadModel", GPT, MLP),
    "gptj": Case("GPTJForCausalLM", {**GPT, "rotary_dim": 4}, MLP),
    "gpt_neox": Case("GPTNeoXForCausalLM", TEXT, MLP),
    "opt": Case("OPTForCausalLM", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 16}, MLP),
    "bloom": Case("BloomForCausalLM", {**TEXT, "n_layer": 2, "n_head": 4}, MLP),
    "falcon, multi-query": Case("FalconForCausalLM", TEXT, MLP),
    "falcon, every head": Case("FalconForCausalLM", {**TEXT, "multi_query": False, "bias": True}, MLP),
    "falcon, grouped": Case("FalconForCausalLM", {**TEXT, "new_decoder_architecture": True, "num_kv_heads": 2}, MLP),
    "bert": Case("BertForMaskedLM", TEXT, MLP),
    "bert, body": Case("BertModel", TEXT, MLP),
    "roberta": Case("RobertaForSequenceClassification", TEXT, MLP),
    "deberta-v2": Case("DebertaV2Model", {**TEXT, **RELATIVE}, MLP | layers(2, ("pos_key", "pos_query"))),
    "deberta-v2, shared": Case("DebertaV2ForSequenceClassification", {**TEXT, **RELATIVE, "share_att_key": True}, MLP),
    "distilbert": Case(
        "DistilBertForMaskedLM", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 100}, MLP
    ),
    "electra": Case("ElectraForPreTraining", {**TEXT, "embedding_size": 16}, MLP),
    "albert": Case("AlbertForMaskedLM", {**TEXT, "embedding_size": 16}, layers(1, tuple(MLP))),
    "esm": Case("EsmForMaskedLM", {**TEXT, "position_embedding_type": "rotary", "mask_token_id": 3}, MLP),
    "vit": Case("ViTForImageClassification", {**SMALL, "image_size": 16, "patch_size": 8}, MLP),
    "t5": Case("T5ForConditionalGeneration", T5, encoder_decoder(("fc1", "fc2"))),
    "t5, gated": Case("T5Model", {**T5, "feed_forward_proj": "gated-gelu"}, encoder_decoder(("gate", "up", "down"))),
    "whisper": Case("WhisperForConditionalGeneration", WHISPER, encoder_decoder(("fc1", "fc2"))),
    "clip": Case("CLIPModel", CLIP, layers(2, tuple(MLP), "text.") | layers(3, tuple(MLP), "vision.")),
    "gemma3": Case("Gemma3ForCausalLM", {**GROUPED, "head_dim": 16}, GATED),
    "olmo": Case("OlmoForCausalLM", GROUPED, GATED),
    "olmo2": Case("Olmo2ForCausalLM", GROUPED, GATED),
    "stablelm": Case("StableLmForCausalLM", GROUPED, GATED),
    "starcoder2": Case("Starcoder2ForCausalLM", GROUPED, MLP),
    "cohere": Case("CohereForCausalLM", GROUPED, GATED),
    "granite": Case("GraniteForCausalLM", GROUPED, GATED),
    "glm": Case("GlmForCausalLM", {**GROUPED, "head_dim": 16}, GATED),
    "glm4": Case("Glm4ForCausalLM", {**GROUPED, "head_dim": 16}, GATED),
    "smollm3": Case("SmolLM3ForCausalLM", GROUPED, GATED),
    "olmo3": Case("Olmo3ForCausalLM", GROUPED, GATED),
    "cohere2": Case("Cohere2ForCausalLM", GROUPED, GATED),
    "nemotron": Case("NemotronForCausalLM", GROUPED, UNGATED),
    "exaone4": Case("Exaone4ForCausalLM", GROUPED, GATED),
    "arcee": Case("ArceeForCausalLM", GROUPED, UNGATED),
    "apertus": Case("ApertusForCausalLM", GROUPED, UNGATED),
    "helium": Case("HeliumForCausalLM", {**GROUPED, "head_dim": 8}, GATED),
    "ernie4_5": Case("Ernie4_5ForCausalLM", {**GROUPED, "head_dim": 16}, GATED),
    "seed_oss": Case("SeedOssForCausalLM", {**GROUPED, "head_dim": 16}, GATED),
    "ministral": Case("MinistralForCausalLM", {**GROUPED, "head_dim": 16}, GATED),
    "hunyuan_v1_dense": Case("HunYuanDenseV1ForCausalLM", {**GROUPED, "head_dim": 8}, GATED),
    "mpt": Case("MptForCausalLM", {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 100}, MLP),
    "gpt_bigcode": Case("GPTBigCodeForCausalLM", GPT, MLP),
    "gpt_bigcode, every head": Case("GPTBigCodeForCausalLM", {**GPT, "multi_query": False}, MLP),
    "gpt_neo": Case(
        "GPTNeoForCausalLM",
        {
            **GPT_NEO,
            "attention_types": [[["global", "local"], 1]],
            "vocab_size": 100,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        MLP,
    ),
    "qwen2_moe": Case(
        "Qwen2MoeForCausalLM",
        {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 40},
        layers(2, (*MIXTURE, "shared.gate", "shared.up", "shared.down", "shared.switch")),
    ),
    "qwen3_moe": Case("Qwen3MoeForCausalLM", {**EXPERTS, "num_experts": 4, "head_dim": 16}, layers(2, MIXTURE)),
    "olmoe": Case("OlmoeForCausalLM", {**EXPERTS, "num_experts": 4}, layers(2, MIXTURE)),
    "phimoe": Case("PhimoeForCausalLM", {**EXPERTS, "num_local_experts": 4}, layers(2, MIXTURE)),
    "gpt_oss": Case("GptOssForCausalLM", {**EXPERTS, "num_local_experts": 4, "head_dim": 16}, layers(2, MIXTURE)),
    "deepseek_v3": Case("DeepseekV3ForCausalLM", DEEPSEEK, DEEPSEEK_ROLES),
    "deepseek_v2": Case("DeepseekV2ForCausalLM", {**DEEPSEEK, "head_dim": 4}, DEEPSEEK_ROLES),
    "glm4_moe": Case(
        "Glm4MoeForCausalLM",
        {**DEEPSEEK, "head_dim": 8, "n_shared_experts": 1, "use_qk_norm": True},
        {role: there for role, there in DEEPSEEK_ROLES.items() if role not in ("query_down", "kv_down")},
    ),
    "xlm-roberta": Case("XLMRobertaForSequenceClassification", TEXT, MLP),
    "camembert": Case("CamembertForMaskedLM", TEXT, MLP),
    "mpnet": Case("MPNetModel", TEXT, MLP),
    "mt5": Case("MT5ForConditionalGeneration", T5, encoder_decoder(("gate", "up", "down"))),
    "bart": Case("BartForConditionalGeneration", BART, encoder_decoder(("fc1", "fc2"))),
    "mbart": Case("MBartForConditionalGeneration", BART, encoder_decoder(("fc1", "fc2"))),
    "pegasus": Case("PegasusForConditionalGeneration", BART, encoder_decoder(("fc1", "fc2"))),
    "marian": Case("MarianMTModel", {**BART, "decoder_vocab_size": 100}, encoder_decoder(("fc1", "fc2"))),
    "deit": Case("DeiTForImageClassification", {**SMALL, "image_size": 16, "patch_size": 8}, MLP),
    "beit": Case("BeitForImageClassification", {**SMALL, "image_size": 16, "patch_size": 8}, MLP),
    "dinov2": Case("Dinov2ForImageClassification", DINO, MLP),
    "siglip": Case(
        "SiglipModel",
        {**CLIP, "text_config": {**TEXT, "projection_size": 48}},
        layers(2, tuple(MLP), "text.") | layers(3, tuple(MLP), "vision."),
    ),
    "clip, text": Case("CLIPTextModelWithProjection", {**TEXT, "projection_dim": 24}, MLP),
    "clip, vision": Case("CLIPVisionModel", VISION, layers(3, tuple(MLP))),
    "siglip, text": Case("SiglipTextModel", {**TEXT, "projection_size": 32}, MLP),
    "siglip, vision": Case("SiglipVisionModel", VISION, layers(3, tuple(MLP))),
    "swin": Case(
        "SwinForImageClassification",
        {"embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "image_size": 16, "patch_size": 2, "window_size": 4},
        layers(2, tuple(MLP), "stage0.") | layers(1, tuple(MLP), "stage1."),
    ),
    "modernbert": Case("ModernBertForMaskedLM", TEXT, GATED),
    "wav2vec2": Case("Wav2Vec2ForCTC", SOUND, MLP),
    "hubert": Case("HubertModel", {**SOUND, "feat_extract_norm": "layer"}, MLP),
    "mamba, falcon": Case(
        "FalconMambaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 100},
        layers(2, ("in_proj", "x_proj", "dt_proj", "out_proj")),
    ),
    "mamba": Case(
        "MambaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 100},
        layers(2, ("in_proj", "x_proj", "dt_proj", "out_proj")),
    ),
}


NOT_ON_CARDS = (*(f"head.attention.{name}" for name in ("in_proj_weight", "out_proj")), ".conv")
FIRST_LAYER = "tensorpeft: 1\ntarget: {matrices: [all-linear], layers: [0]}\nstructure: matrix\nrank: 2\n"


@cache
def on_meta(name: str) -> nn.Module:
    """The model of a case without numbers: for those who only look at it."""
    with torch.device("meta"):
        return CASES[name].build()


@cache
def live(name: str) -> nn.Module:
    """The model of a case in float64: for those who leave it as it was."""
    return CASES[name].build().double().eval()


@cache
def scanned(name: str) -> ModelShape:
    return scan(on_meta(name))


@cache
def of_config(name: str) -> ModelShape:
    """The shape that the config of a case tells."""
    return model_shape({**on_meta(name).config.to_dict(), "architectures": [CASES[name].name]})


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """What the forward of a small model takes: token ids (2, 7), images (2, 3, 16, 16), spectra (2, 8, 12) or sounds (2, 200)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (2, 7), generator=generator)
    image = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)
    match model.config.model_type:
        case "vit" | "deit" | "beit" | "dinov2" | "swin" | "clip_vision_model" | "siglip_vision_model":
            return {"pixel_values": image}
        case "clip" | "siglip":
            return {"input_ids": ids, "pixel_values": image}
        case "t5" | "mt5" | "bart" | "mbart" | "pegasus" | "marian":
            return {"input_ids": ids, "decoder_input_ids": ids[:, :5]}
        case "whisper":
            sound = torch.randn(2, 8, 12, generator=generator, dtype=torch.float64)
            return {"input_features": sound, "decoder_input_ids": ids}
        case "wav2vec2" | "hubert":
            return {"input_values": torch.randn(2, 200, generator=generator, dtype=torch.float64)}
        case _:
            return {"input_ids": ids}


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    """The model's first output: scores, or the last hidden state."""
    return model(**inputs(model))[0]
