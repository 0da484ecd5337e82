"""Every family on a live model: the sites of its config, each of them called, each fused part the part that it is named for."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call

import tensorpeft as tp
from tensorpeft.language.errors import SpecError
from tensorpeft.language.spec import Target
from tensorpeft.network.architecture import families
from tensorpeft.network.extras import extras
from tensorpeft.network.families import model_shape
from tensorpeft.network.shapes import ModelShape, Site
from tensorpeft.network.targets import choose
from tensorpeft.runtime.scan import scan
from tests.models import randomise

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


def on_meta(case: Case) -> nn.Module:
    with torch.device("meta"):
        return case.build()


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


def test_every_family_is_tried():
    assert {getattr(transformers, case.name).config_class.model_type for case in CASES.values()} == set(families())


@pytest.mark.parametrize("name", CASES)
def test_a_model_has_the_shape_of_its_config(name):
    model = on_meta(CASES[name])
    live, read = scan(model), model_shape({**model.config.to_dict(), "architectures": [CASES[name].name]})
    on_card = {site for site in live.sites if not site.path.endswith(NOT_ON_CARDS)}
    assert on_card == {*read.sites}
    linear = [site for site in live.sites if site.is_linear and site in on_card]
    assert linear == [site for site in read.sites if site.is_linear]
    assert live.sizes == read.sizes
    assert (live.n_parameters, live.family) == (read.n_parameters, read.family)
    assert live.name == live.model_class == CASES[name].name


@pytest.mark.parametrize("name", CASES)
def test_a_config_tells_how_many_numbers_extras_have(name):
    model = on_meta(CASES[name])
    live, read = scan(model), model_shape({**model.config.to_dict(), "architectures": [CASES[name].name]})
    assert sum(parameter.count for parameter in live.parameters) == live.n_parameters
    for kind in ("norms", "head"):
        counts = [sum(each.count for each in shape.parameters if kind in each.kinds) for shape in (live, read)]
        assert counts[0] == counts[1]
    spec = tp.load_spec(FIRST_LAYER + "train: [biases]\n")
    assert outcome(spec, live) == outcome(spec, read)


def outcome(spec: tp.Spec, shape: ModelShape) -> int | None:
    """How many numbers a spec trains of the base; None if it is refused."""
    try:
        return sum(extra.count for extra in extras(spec, shape, choose(spec.target, shape)))
    except SpecError:
        return None


@pytest.mark.parametrize("name", CASES)
def test_every_role_is_in_every_layer(name):
    sites = [
        site
        for site in scan(on_meta(CASES[name])).sites
        if site.stack is not None and site.kind in ("linear", "parameter") and site.matrix != "reduction"
    ]
    found = sorted({(site.matrix, site.layer) for site in sites})
    assert found == sorted((role, n) for role, numbers in CASES[name].matrices.items() for n in numbers)


@pytest.mark.parametrize("name", CASES)
def test_every_site_lies_in_its_weight(name):
    model = on_meta(CASES[name])
    for site in scan(model).sites:
        weight = operator.attrgetter(site.parameter or "weight")(model.get_submodule(site.module))
        turned = site.transposed or site.kind == "embedding" or hasattr(model.get_submodule(site.module), "nf")
        d_out, d_in = weight.shape[-2:] if site.kind != "conv" else (weight.shape[0], math.prod(weight.shape[1:]))
        assert (site.module_d_out, site.d_in) == ((d_in, d_out) if turned else (d_out, d_in))
        assert site.row_indices().max() < site.module_d_out
        assert site.expert is None or site.expert < len(weight)


def watch(module: nn.Module, keep: Callable[[Tensor], Any]) -> None:
    """Hand the input of each call of a module on."""

    def hook(module: nn.Module, args: tuple[Tensor]) -> None:
        keep(args[0])

    module.register_forward_pre_hook(hook)


@pytest.mark.parametrize("name", CASES)
def test_which_sites_read_the_very_same_tensor(name):
    model = CASES[name].build().double().eval()
    sites = [site for site in scan(model).sites if site.kind == "linear" and site.stack is not None and site.layer == 0]
    tensors: dict[str, Tensor] = {}  # kept alive, so that no two can have one place
    for path in {site.module for site in sites}:
        watch(model.get_submodule(path), partial(tensors.setdefault, path))  # of several calls the first
    run(model)
    pairs = [(a, b) for a, b in combinations(sites, 2) if "falcon" not in name or {a.matrix, b.matrix} < {*ATTENTION}]
    together = {(a.matrix, b.matrix) for a, b in pairs if tensors[a.module] is tensors[b.module]}
    assert together == {(a.matrix, b.matrix) for a, b in pairs if a.reads and a.reads == b.reads}


EVERYTHING = (
    "tensorpeft: 1\ntarget: {matrices: ['*']}\nrank: {r: 2}\nfactors: {B: {init: zeros}}\n"
    "update: B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]\n"
)
UNREACHED = {  # what the first output does not depend on, or, of PEGASUS and Marian, is computed without gradients
    "bert, body": ("pooler.dense",),
    "mpnet": ("pooler.dense",),
    "esm": ("esm.contact_head.regression",),
    "siglip, text": ("head",),
    "siglip, vision": ("head.attention.in_proj_weight", "head.attention.out_proj", "head.mlp.fc1", "head.mlp.fc2"),
    "pegasus": ("model.encoder.embed_positions", "model.decoder.embed_positions"),
    "marian": ("model.encoder.embed_positions", "model.decoder.embed_positions"),
    "phimoe": ("model.layers.0.mlp.router",),
}


@pytest.mark.parametrize("name", CASES)
def test_every_site_of_every_kind_is_reached(name):
    """The output is that of the base with W + dW everywhere, and each site's own factors have a part in it."""
    model = CASES[name].build().double().eval()
    adapter = tp.attach(model, EVERYTHING)
    randomise(adapter, std=0.1)
    output = model(**inputs(model))[0]
    output.square().sum().backward()
    with torch.no_grad(), adapter.disabled():
        expected = functional_call(model, changed(model, adapter), (), inputs(model), tie_weights=False)[0]
    assert (output - expected).norm() < 1e-12 * expected.norm()
    assert {site.path for site in unmoved(adapter)} == {*UNREACHED.get(name, ())}


def changed(model: nn.Module, adapter: tp.Adapter) -> dict[str, Tensor]:
    """By its name each weight that has sites, with the update added."""
    found = {}
    for site in {site.path: site for site in adapter.sites}.values():
        name = f"{site.module}.{site.parameter or 'weight'}".removeprefix(".")
        weight = model.get_parameter(name)
        turned = site.transposed or site.kind == "embedding" or hasattr(model.get_submodule(site.module), "nf")
        delta = adapter.delta(site.path)
        found[name] = weight + (delta.mT if turned else delta.reshape(weight.shape))
    return found


def unmoved(adapter: tp.Adapter) -> Iterator[Site]:
    """The sites whose own B has no gradient."""
    for group in adapter.network.groups:
        operand = group.terms[0].operands[0]
        gradient, axes = adapter.factors[operand.block.name].grad, operand.block.axes
        for key, site in zip(operand.keys, group.sites, strict=True):
            bound = [axis for axis in axes if axis.labels is not None]
            labels = [key] if bound[0].mode == "site" else key
            at = tuple(axis.labels.index(label) for axis, label in zip(bound, labels, strict=True))
            if gradient is None or not gradient[at].any():
                yield site


@pytest.mark.parametrize("name", CASES)
def test_the_hooks_add_what_a_merge_adds(name):
    """So every site is in a module that the model calls; modules whose weight it reads itself would differ."""
    model = CASES[name].build().double().eval()
    base, state = run(model), {key: value.clone() for key, value in model.state_dict().items()}
    adapter = tp.attach(model, FIRST_LAYER)
    randomise(adapter, std=0.1)
    linear = [site for site in scan(model).sites if site.is_linear and site.stack is not None and site.layer == 0]
    assert {site.key for site in adapter.sites} == {site.key for site in linear}
    hooked = run(model)
    adapter.merge()
    merged = run(model)
    adapter.unmerge()
    adapter.detach()
    assert (hooked - merged).norm() < 1e-6 * merged.norm()  # some norms round to float32
    assert (hooked - base).norm() > 1e-3 * base.norm()
    assert torch.equal(run(model), base)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def attended(
    model: nn.Module, sites: dict[str, Site], rows: np.ndarray, change: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:  # shape: (batch, tokens, d_in of `out`), both
    """What a layer's attention hands to its output projection, before and after a change of some of the fused outputs."""

    def changed(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output[..., rows] = change(output[..., rows])

    caught: list[Tensor] = []
    fused, out = (model.get_submodule(sites[role].module) for role in ("query", "out"))
    with out.register_forward_pre_hook(lambda module, args: caught.append(args[0])):
        run(model)
        with fused.register_forward_hook(changed):
            run(model)
    return caught[0], caught[1]


@pytest.fixture(
    scope="module", params=[name for name in CASES if name.startswith(("gpt2", "gpt_neox", "bloom", "falcon", "phi3"))]
)
def fused(request) -> tuple[nn.Module, dict[str, Site]]:
    """A causal model with a fused module, and the sites of its second layer."""
    model = CASES[request.param].build().double().eval()
    return model, {site.matrix: site for site in scan(model).sites if site.layer == 1}


@pytest.mark.parametrize(("part", "reached"), [("query", [2]), ("key", [2, 3, 4, 5, 6]), ("value", [2, 3, 4, 5, 6])])
def test_which_tokens_see_a_change_of_one(fused, part, reached):
    """Of a query its own alone, of a key and a value every later one too."""
    model, sites = fused
    third, ramp = torch.arange(7).eq(2)[:, None], torch.arange(1, sites[part].d_out + 1)
    before, after = attended(model, sites, sites[part].row_indices(), lambda x: x + third * ramp)
    assert (after - before).abs().amax((0, 2)).gt(1e-9).nonzero().flatten().tolist() == reached


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_attention_is_linear_in_the_values_alone(fused, part):
    model, sites = fused
    before, after = attended(model, sites, sites[part].row_indices(), lambda x: 2 * x)
    assert torch.allclose(after, 2 * before, rtol=1e-9, atol=0) == (part == "value")


@pytest.mark.parametrize("part", ["query", "value"])
def test_the_rows_of_a_fused_part_go_by_heads(fused, part):
    """A change of the last head is seen by the heads of ``out`` that read it, and by no others."""
    model, sites = fused
    n_heads = sites[part].heads
    rows = sites[part].row_indices().reshape(n_heads, -1)[-1]
    before, after = attended(model, sites, rows, lambda x: x + torch.arange(1, len(rows) + 1))
    reached = (after - before).reshape(14, n_heads, -1).abs().amax((0, 2)).gt(1e-9)
    assert reached.tolist() == [False] * (n_heads - 1) + [True]


def test_the_parts_of_a_fused_mlp():
    """Phi 3 computes down(up * act(gate)): without `up` nothing is left, without `gate` neither; the activation is gate's."""
    model = CASES["phi3"].build().double().eval()
    sites = {site.matrix: site for site in scan(model).sites if site.layer == 1}
    module = model.get_submodule(sites["up"].module)
    x = torch.randn(3, 32, dtype=torch.float64)
    gate, up = (x @ module.weight[sites[part].row_indices()].t() for part in ("gate", "up"))
    expected = model.get_submodule(sites["down"].module)(up * nn.functional.silu(gate))
    assert torch.allclose(model.get_submodule("model.layers.1.mlp")(x), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "entry", "matrices"),
    [
        ("t5", "query", ["encoder.query", "decoder.query", "decoder.cross.query"]),
        ("t5", "decoder.query", ["decoder.query"]),
        ("t5", "cross.query", ["decoder.cross.query"]),
        ("t5", "EncDecAttention.q", ["decoder.cross.query"]),
        ("t5", "decoder.cross.*", [f"decoder.cross.{role}" for role in ATTENTION]),
        ("whisper", "fc1", ["encoder.fc1", "decoder.fc1"]),
        ("whisper", "q_proj", ["encoder.query", "decoder.query", "decoder.cross.query"]),
        ("clip", "value", ["text.value", "vision.value"]),
        ("clip", "vision.*", list(layers(3, tuple(MLP), "vision."))),
    ],
)
def test_an_entry_means_every_stack_or_one(name, entry, matrices):
    numbers = CASES[name].matrices
    sites = choose(Target((entry,)), scan(on_meta(CASES[name])))
    assert [site.key for site in sites] == [(matrix, n) for matrix in matrices for n in numbers[matrix]]


def test_an_entry_that_no_stack_has():
    with pytest.raises(SpecError) as caught:
        choose(Target(("gate",)), scan(on_meta(CASES["clip"])))
    labels = ", ".join(f"`{name}`" for name in CASES["clip"].matrices)
    assert str(caught.value) == f"`gate` matches nothing in CLIPModel, which has {labels} and 6 more"


def test_layers_of_the_longer_stack_alone():
    sites = choose(Target(("query",), layers=(2,)), scan(on_meta(CASES["t5"])))
    assert [site.key for site in sites] == [("decoder.query", 2), ("decoder.cross.query", 2)]
