"""Models of which a family knows a part, and what is no model to adapt."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import tensorpeft as tp
from tensorpeft.language.errors import ModelError
from tensorpeft.language.spec import Target
from tensorpeft.model.target import choose
from tensorpeft.scanning.scan import scan

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": 100, "pad_token_id": 0}


def speaks_and(vision: dict) -> nn.Module:
    text = transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    config = transformers.Idefics3Config(
        text_config=text, vision_config={**SMALL, **vision, "image_size": 16, "patch_size": 4}
    )
    with torch.device("meta"):
        return transformers.Idefics3ForConditionalGeneration(config)


def test_a_known_model_beside_an_unknown_one_of_other_sides():
    """Idefics3 has no table, its text model is a Llama, and its vision model has layers of the same paths."""
    shape = scan(speaks_and({"hidden_size": 48, "num_attention_heads": 6}))
    found = choose(Target(("query", "down", "fc1"), layers=(1,)), shape)
    assert [(site.matrix, site.d_out, site.heads) for site in found] == [
        ("text_model.query", 32, 4),
        ("text_model.down", 32, None),
        ("vision_model.encoder.query", 48, 6),
        ("fc1", 48, None),
    ]
    assert [site.stack for site in choose(Target(("text_model.query",), layers=(0,)), shape)] == [
        "model.text_model.layers"
    ]


def test_a_module_that_is_called_like_a_role_of_the_part():
    class Codec(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc1 = transformers.BertModel(transformers.BertConfig(**TEXT)), nn.Linear(32, 5)

    with torch.device("meta"):
        sites = scan(Codec()).sites
    assert {site.matrix for site in sites if site.module.endswith("intermediate.dense")} == {"body.fc1"}
    assert {site.matrix for site in sites if site.module == "fc1"} == {"fc1"}


def test_a_config_that_tells_no_number_for_all_layers():
    class Config:
        @property
        def num_attention_heads(self):
            raise KeyError("it differs from layer to layer")

    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({name: nn.Linear(8, 8) for name in "qkvo"})])})
    model.config = Config()
    assert {(site.matrix, site.heads) for site in scan(model).sites} == {
        (r, None) for r in ("query", "key", "value", "out")
    }


def test_an_attention_of_one_s_own_tells_its_heads():
    class Attention(nn.ModuleDict):
        def __init__(self, heads):
            super().__init__(
                {"wq": nn.Linear(16, 16), "wk": nn.Linear(16, 8), "wv": nn.Linear(16, 8), "wo": nn.Linear(16, 16)}
            )
            self.n_heads, self.n_kv_heads = heads, heads // 2

    sites = scan(nn.ModuleDict({"layers": nn.ModuleList([Attention(4), Attention(8)])})).sites
    assert {(site.matrix, site.layer): site.heads for site in sites} == {
        (role, layer): heads // (2 if role in ("key", "value") else 1)
        for role in ("query", "key", "value", "out")
        for layer, heads in enumerate((4, 8))
    }


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("gpt2", "expected a torch model, found 'gpt2' of type `str`"),
        (nn.Linear, "expected a torch model, found <class 'torch.nn.modules.linear.Linear'> of type `type`"),
        (nn.Sequential(nn.LazyLinear(3)), "`0` (LazyLinear) has no weight yet; call the model once, then adapt it"),
    ],
)
def test_what_is_no_model(model, message):
    with pytest.raises(ModelError) as caught:
        tp.attach(model, "lora")
    assert str(caught.value) == message


def test_a_scripted_module_cannot_be_adapted():
    scripted = torch.jit.trace(nn.Linear(3, 3), torch.zeros(1, 3), check_trace=False)
    with pytest.raises(ModelError) as caught:
        tp.attach(scripted, "lora")
    assert str(caught.value) == "the model is one of TorchScript, which cannot be adapted; compile it afterwards"
    assert [site.module for site in scan(nn.ModuleDict({"body": nn.Linear(3, 3), "head": scripted})).sites] == ["body"]


def test_a_weight_without_numbers_is_no_site():
    nothing = nn.Linear(3, 1)
    nothing.weight, nothing.out_features = nn.Parameter(torch.zeros(0, 3)), 0
    assert [site.module for site in scan(nn.Sequential(nothing, nn.Linear(3, 3))).sites] == ["1"]


def test_a_config_of_transformers_is_a_model_to_report_on():
    config = transformers.LlamaConfig(**TEXT)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    assert tp.report("lora", config).trainable == tp.report("lora", model).trainable
    assert "<table" in tp.report("lora", config)._repr_html_()


def test_a_forward_on_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 3))
    tp.attach(model, "tensorpeft: 1\ntarget: all-linear\nstructure: matrix\nrank: 2\n")
    assert model(torch.zeros(2, 4, device="meta")).shape == (2, 3)


@pytest.mark.parametrize("spec", [5, None, {"name": "lora"}])
def test_what_is_no_spec(spec):
    with pytest.raises(tp.SpecError) as caught:
        tp.load_spec(spec)
    assert str(caught.value) == (
        f"expected a catalogue name, a path or YAML text, found {spec!r} of type `{type(spec).__name__}`"
    )
