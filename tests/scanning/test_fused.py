"""Fused weights of models without a table: each part is what the attention makes of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import tensorpeft as tp
from tensorpeft.model.roles import fused_layouts
from tensorpeft.model.shape import Site
from tensorpeft.scanning.scan import scan
from tests.models import randomise

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "pad_token_id": 0}
IDS = torch.arange(3, 17).reshape(2, 7)
MODELS = {
    "MptModel": {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 100},
    "PersimmonModel": {**SMALL, "vocab_size": 100, "pad_token_id": 0},
    "CodeGenModel": {**GPT, "rotary_dim": 4},
    "OpenAIGPTModel": GPT,
    "VitDetModel": {**SMALL, "image_size": 16, "patch_size": 4},
}


def build(name: str) -> tuple[nn.Module, dict[str, Site]]:
    """A model, and the sites of its second layer."""
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**MODELS[name])).double().eval()
    return model, {site.matrix: site for site in scan(model).sites if site.layer == 1}


def run(model: nn.Module) -> Tensor:
    images = torch.linspace(-1, 1, 2 * 3 * 16 * 16, dtype=torch.float64).reshape(2, 3, 16, 16).sin()
    return model(images if "Vit" in type(model).__name__ else IDS)[0]


@torch.no_grad()
def attended(model: nn.Module, sites: dict[str, Site], rows: Tensor, change) -> tuple[Tensor, Tensor]:
    """What a layer's attention hands to its output projection, before and after a change of some outputs. (tokens, width)"""

    def changed(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output[..., rows] = change(output[..., rows].flatten(0, -2)).reshape(output[..., rows].shape)

    caught: list[Tensor] = []
    fused, out = (model.get_submodule(sites[role].module) for role in ("query", "out"))
    with out.register_forward_pre_hook(lambda module, args: caught.append(args[0].flatten(0, -2))):
        run(model)
        with fused.register_forward_hook(changed):
            run(model)
    return caught[0], caught[1]


@pytest.mark.parametrize("name", MODELS)
def test_each_part_does_what_it_is_called_for(name):
    """Attention is linear in values alone; of a token's query it is that token that sees a change, of its key others too."""
    model, sites = build(name)
    seen = {}
    for part in ("query", "key", "value"):
        site = sites[part]
        rows = torch.as_tensor(site.row_indices())
        assert (site.d_out, site.heads, site.head_side) == (32, 4, "d_out")
        before, doubled = attended(model, sites, rows, lambda x: 2 * x)
        assert torch.allclose(doubled, 2 * before, rtol=1e-9, atol=0) == (part == "value")
        bump = torch.arange(len(doubled)).eq(2)[:, None] * torch.arange(1, 33)
        _, bumped = attended(model, sites, rows, lambda x, bump=bump: x + bump)
        seen[part] = (bumped - before).abs().amax(1).gt(1e-9).sum().item()
        _, turned = attended(model, sites, rows.reshape(4, 8)[-1], lambda x: x + torch.arange(8) ** 2)
        assert (turned - before).unflatten(1, (4, 8))[:, :3].abs().max() < 1e-12  # other heads
    assert seen["query"] == 1 < seen["key"] <= seen["value"]


def test_an_update_of_a_part_is_in_its_rows_alone():
    model, sites = build("PersimmonModel")
    base = run(model)
    adapter = tp.attach(model, tp.load_spec("lora", matrices=["query", "value"], rank=2))
    randomise(adapter)
    update = adapter.delta(sites["query"].module)
    other = torch.as_tensor(sites["key"].row_indices())
    assert not update[other].any()
    assert update.any(1).sum() == 64
    with torch.no_grad():
        hooked = run(model)
        adapter.merge()
        assert torch.allclose(run(model), hooked, rtol=1e-9, atol=1e-12)
    adapter.detach()
    assert torch.equal(run(model), base)
    assert not torch.allclose(hooked, base, rtol=1e-3)


def test_the_classes_of_the_table_are_those_of_transformers():
    sources = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    there = {
        name for path in sources for name in re.findall(r"^class (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {name for layout in fused_layouts() for names in layout["of"].values() for name in names} <= there


def test_a_class_of_somebody_else_s_is_not_cut():
    """Its name tells nothing: elsewhere than in transformers the parts may lie otherwise."""

    class VitDetAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    sites = scan(nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attn": VitDetAttention()})])})).sites
    assert [site.matrix for site in sites] == ["qkv", "out"]
