"""Counts against what papers print, against formulas worked out by hand, and against each other."""

from __future__ import annotations

import re

import pytest

from tensorpeft.language.loader import load_spec
from tensorpeft.network.rank import lora_rank
from tensorpeft.pipeline import front, report, shape_of
from tensorpeft.reporting.counting import report_of
from tensorpeft.reporting.report import Report
from tests import published


def cost(method: str, model: object, **overrides: object) -> Report:
    return report(load_spec(method, **overrides), model=model)


@pytest.mark.parametrize("row", published.ROWS, ids=published.described)
def test_published_counts(row):
    assert published.counted(row) == row["count"]


def test_the_published_table_was_read():
    assert len(published.ROWS) == 42
    assert sum("plus" in row for row in published.ROWS) == 3


QUERY, KEY, OUT, MLP = (8192, 8192), (1024, 8192), (8192, 8192), (28672, 8192)  # Llama-3-70B: d_out, d_in
ALL_SEVEN = (QUERY, KEY, KEY, OUT, MLP, MLP, (8192, 28672))


def test_lora_on_grouped_queries():
    found = cost("lora", "llama-3-70b", rank=16, matrices=["all-linear"])
    assert found.trainable == 80 * 16 * sum(d_out + d_in for d_out, d_in in ALL_SEVEN)
    assert [(m.matrix, m.layers, m.d_out, m.d_in, m.trainable) for m in found.matrices] == [
        (role, 80, d_out, d_in, 80 * 16 * (d_out + d_in))
        for role, (d_out, d_in) in zip(("query", "key", "value", "out", "gate", "up", "down"), ALL_SEVEN, strict=True)
    ]
    assert found.shared == 0
    assert found.flops_per_token == 80 * 2 * 16 * sum(d_out + d_in for d_out, d_in in ALL_SEVEN)


def test_lorta_on_grouped_queries():
    """Eight rows for the key and value heads, 64 for those of query and out; everything else is shared by all."""
    found = cost("lorta", "llama-3-70b", rank=8)
    assert found.trainable == 8 * (4 + 80 + 64 + 8 + 128 + 8192)
    assert [m.trainable for m in found.matrices] == [8, 8, 8, 8]  # a row of the matrix factor
    assert found.shared == found.trainable - 4 * 8
    assert {m.name: m.sizes for m in found.modes}["head"] == (8, 64)


def test_vera_on_grouped_queries():
    """One frozen pair of the largest size; b as long as each matrix's own output."""
    found = cost("vera", "llama-3-70b", rank=256)
    assert found.trainable == 80 * (8192 + 1024 + 2 * 256)
    assert (found.frozen_seeded, found.frozen_stored) == (256 * (8192 + 8192), 0)
    assert found.lora_rank == 256
    assert {m.matrix: m.lora_rank for m in found.matrices} == {"query": 256, "value": 256}


def test_rank_bound_is_cut_off_by_the_smaller_side():
    found = cost("lora", "llama-3-70b", rank=2000, matrices=["query", "key"])
    assert {m.matrix: m.lora_rank for m in found.matrices} == {"query": 2000, "key": 1024}
    assert found.lora_rank == 2000


def test_masked_numbers_do_not_exist():
    found = cost("partial_lora", "roberta-base", mask={"B[d_out]": "keep(100)", "A[d_in]": "keep(0.25)"})
    assert {f.name: f.count for f in found.factors} == {"B": 24 * 100 * 8, "A": 24 * 192 * 8}
    assert all(f.masked for f in found.factors)
    assert [m.trainable for m in found.matrices] == [12 * 8 * (100 + 192)] * 2
    assert found.flops_per_token == 24 * 2 * 8 * (100 + 192)


def test_tasks_are_bound_per_row():
    found = cost("shared_a", "roberta-base")
    task = next(mode for mode in found.modes if mode.name == "task")
    assert (task.sizes, task.bound, task.trainable, task.frozen) == ((8,), "row", 1_179_648, 0)


def test_sites_that_fill_no_grid_still_carry_their_modes():
    """One matrix in every layer and another in one layer: a block has a single axis for its 33 sites."""
    spec = load_spec("lora", matrices=["layers.{layer}.self_attn.q_proj", "layers.0.self_attn.o_proj"])
    found = report(spec, model="llama-2-7b")
    assert [m.layers for m in found.matrices] == [32, 1]
    assert {f.modes[0] for f in found.factors} == {"site"}
    assert [m.name for m in found.modes] == ["matrix", "layer", "d_out", "d_in", "r"]
    assert found.modes[0].sizes == (2,)
    assert found.modes[1].sizes == (32,)
    assert found.modes[1].trainable == found.trainable == 33 * 8 * (4096 + 4096)


def test_bytes_and_percent():
    found = cost("shared_a", "roberta-base")
    assert found.stored == 1_179_648 + 147_456
    assert found.bytes == {
        "checkpoint": 4 * 1_327_104,
        "factors": 4 * 1_327_104,
        "gradients": 4 * 1_179_648,
        "optimizer": 2 * 4 * 1_179_648,
        "kept_per_token": 2 * 24 * 8,  # A is frozen, so nothing needs x again
    }
    assert found.base == 124_645_632
    assert found.percent == pytest.approx(100 * 1_179_648 / 124_645_632)


@pytest.mark.parametrize("model", ["llama-3-8b", "gpt2", "vit-base", "deberta-v3-base"])
@pytest.mark.parametrize("method", ["lora", "lorta", "vera", "partial_lora", "shared_a"])
def test_parts_add_up_to_totals(method, model):
    plan = front(load_spec(method, matrices=["query", "value", "out"]), shape_of(model))
    found = report_of(plan)
    kinds = {"trained": found.trainable, "frozen, stored": found.frozen_stored, "frozen, seeded": found.frozen_seeded}
    for kind, total in kinds.items():
        assert sum(f.count for f in found.factors if f.kind == kind) == total
    assert sum(m.trainable for m in found.matrices) + found.shared == found.trainable
    assert sum(m.sites for m in found.matrices) == len(plan.network.sites)
    assert found.lora_rank == lora_rank(plan.network)
    for mode in found.modes:
        carriers = [f for f in found.factors if mode.name in f.modes]
        assert sum(f.count for f in carriers if f.trainable) == mode.trainable
        assert sum(f.count for f in carriers if not f.trainable) == mode.frozen


def test_every_factor_of_a_cp_carries_one_mode():
    found = cost("lorta", "llama-2-7b", rank=4)
    per_mode = {mode.name: mode.trainable for mode in found.modes}
    assert per_mode.pop("r") == found.trainable
    assert per_mode == {"matrix": 4 * 4, "layer": 32 * 4, "head": 32 * 4, "head_dim": 128 * 4, "width": 4096 * 4}


def test_parts_of_a_side_are_open_and_fused_sites_are_bound():
    text = """\
tensorpeft: 1
name: split
target: {matrices: [query, value]}
modes: [d_in = i1 * i2, slot = layer * matrix]
rank: {r: 4}
update: B[slot, d_out, r] * P[i1, r] * Q[i2, r]
factors: {B: {init: zeros}, P: {init: normal(0.1)}, Q: {init: normal(0.1)}}
"""
    found = report(text, model="vit-base")
    assert {mode.name: mode.bound for mode in found.modes} == {
        "layer": "attach",
        "matrix": "attach",
        "d_out": "data",
        "i1": "data",
        "i2": "data",
        "r": "sum",
    }
    assert found.trainable == 24 * 768 * 4 + (24 + 32) * 4


def test_what_an_optimizer_and_dropout_are_told():
    text = """\
tensorpeft: 1
name: told
target: {matrices: [query]}
rank: {r: 4}
update: B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]
factors: {B: {init: zeros, lr: 16}}
dropout: {x: 0.1, r: 0.05}
"""
    found = report(text, model="vit-base")
    assert {f.name: f.lr for f in found.factors} == {"B": 16, "A": 1}
    assert [f.told for f in found.factors] == ["trained, learning rate x 16", "trained"]
    assert found.title.splitlines()[1].endswith(", dropout of x = 0.1, dropout of r = 0.05")
    assert found.to_data()["dropout"] == {"x": 0.1, "r": 0.05}
    assert found.to_data()["ranks"] == {"r": "4"}


def test_what_is_trained_of_the_base_is_counted_apart():
    """LoReTTA trains the 65 RMSNorms of Llama-2 7B beside its cores."""
    alone, beside = (report(load_spec("loretta_rep", train=train), model="llama-2-7b") for train in (None, ["norms"]))
    assert (beside.trainable, beside.extra) == (alone.trainable, 65 * 4096)
    assert beside.stored == alone.stored + beside.extra
    assert beside.bytes["gradients"] == 4 * (beside.trainable + beside.extra)
    assert beside.bytes["factors"] == alone.bytes["factors"]


def test_a_spec_without_an_update_trains_the_base_alone():
    """BitFit (arXiv:2106.10199) with norms, on BERT base: the biases of six modules a layer, and 25 norms."""
    found = report("tensorpeft: 1\ntarget: all-linear\ntrain: [biases, norms]\n", model="bert-base")
    assert (found.trainable, found.extra) == (0, 12 * (5 * 768 + 3072) + 25 * 2 * 768)


def test_every_bias_is_counted():
    """Those of linear modules, of norms, and of the pooler."""
    assert report("bitfit", model="bert-base").extra == 12 * (5 * 768 + 3072) + 25 * 768 + 768


CHOSEN = """\
tensorpeft: 1
name: chosen
target: {matrices: [query, value]}
rank: {r: {"*": 8, layers 0-3: 16, value layers 11: 2}}
alpha: 8
scale: {"*": alpha / r, value: 3}
update: B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]
factors: {B: {init: zeros}}
"""


def test_a_rank_and_a_scale_that_differ_from_site_to_site():
    found = report(CHOSEN, model="vit-base")
    entries = [(m.matrix, m.layers, m.at, m.chosen, m.lora_rank, m.trainable) for m in found.matrices]
    size = 2 * 768  # of both sides
    assert entries == [
        ("query", 4, "0-3", {"r": 16, "scale": 8 / 16}, 16, 4 * 16 * size),
        ("query", 8, "4-11", {"r": 8, "scale": 8 / 8}, 8, 8 * 8 * size),
        ("value", 4, "0-3", {"r": 16, "scale": 3}, 16, 4 * 16 * size),
        ("value", 7, "4-10", {"r": 8, "scale": 3}, 8, 7 * 8 * size),
        ("value", 1, "11", {"r": 2, "scale": 3}, 2, 2 * size),
    ]
    assert found.ranks == {"r": "{*: 8, layers 0-3: 16, value layers 11: 2}"}
    assert found.trainable == sum(m.trainable for m in found.matrices)
    shown = found.to_text()
    assert re.search(r"^matrix +layers +which +r +scale +d_out x d_in", shown, re.MULTILINE)
    assert re.search(r"^query +4 +0-3 +16 +0.5 +768 x 768 ", shown, re.MULTILINE)


def test_several_updates_and_the_base_weight():
    """IA3 trains vectors of its own for two kinds of matrices; W is neither stored nor counted."""
    text = """\
tensorpeft: 1
name: ia3
target: {matrices: [key, value, down]}
update:
  key, value: W[d_out, d_in] * u[matrix, layer, d_out]
  down: W[d_out, d_in] * v[matrix, layer, d_in]
factors: {u: {init: zeros}, v: {init: zeros}}
"""
    found = report(text, model="llama-2-7b")
    assert found.trainable == 614_400
    assert {f.name for f in found.factors} == {"u", "v"}
    assert found.title.splitlines()[1:] == [
        "dW of key, value = W[d_out, d_in] * u[matrix, layer, d_out]",
        "dW of down = W[d_out, d_in] * v[matrix, layer, d_in]",
    ]
    assert [(m.matrix, m.trainable) for m in found.matrices] == [
        ("key", 32 * 4096),
        ("value", 32 * 4096),
        ("down", 32 * 11008),
    ]
