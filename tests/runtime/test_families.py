"""Every family on a live model: the sites of its config, each of them called, each fused part the part that it is named for."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.hooks import RemovableHandle

import tensorpeft as tp
from tensorpeft.language.errors import SpecError
from tensorpeft.language.spec import Target
from tensorpeft.model.family import families
from tensorpeft.model.shape import ModelShape, Site
from tensorpeft.model.target import choose
from tensorpeft.model.trained import extras
from tests.models import randomise
from tests.runtime.families import (
    ATTENTION,
    CASES,
    FIRST_LAYER,
    MLP,
    NOT_ON_CARDS,
    inputs,
    layers,
    live,
    of_config,
    on_meta,
    run,
    scanned,
)


def test_every_family_is_tried():
    assert {getattr(transformers, case.name).config_class.model_type for case in CASES.values()} == set(families())


@pytest.mark.parametrize("name", CASES)
def test_a_model_has_the_shape_of_its_config(name):
    shape, read = scanned(name), of_config(name)
    on_card = {site for site in shape.sites if not site.path.endswith(NOT_ON_CARDS)}
    assert on_card == {*read.sites}
    linear = [site for site in shape.sites if site.is_linear and site in on_card]
    assert linear == [site for site in read.sites if site.is_linear]
    assert shape.sizes == read.sizes
    assert (shape.n_parameters, shape.family) == (read.n_parameters, read.family)
    assert shape.name == shape.model_class == CASES[name].name


@pytest.mark.parametrize("name", CASES)
def test_a_config_tells_how_many_numbers_extras_have(name):
    shape, read = scanned(name), of_config(name)
    assert sum(parameter.count for parameter in shape.parameters) == shape.n_parameters
    for kind in ("norms", "head"):
        counts = [sum(each.count for each in one.parameters if kind in each.kinds) for one in (shape, read)]
        assert counts[0] == counts[1]
    for entry in ("biases", "bias"):  # of the target, and of the whole model
        spec = tp.load_spec(FIRST_LAYER + f"train: [{entry}]\n")
        assert outcome(spec, shape) == outcome(spec, read)


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
        for site in scanned(name).sites
        if site.stack is not None and site.kind in ("linear", "parameter") and site.matrix != "reduction"
    ]
    found = sorted({(site.matrix, site.layer) for site in sites})
    assert found == sorted((role, n) for role, numbers in CASES[name].matrices.items() for n in numbers)


@pytest.mark.parametrize("name", CASES)
def test_every_site_lies_in_its_weight(name):
    model = on_meta(name)
    for site in scanned(name).sites:
        weight = operator.attrgetter(site.parameter or "weight")(model.get_submodule(site.module))
        turned = site.transposed or site.kind == "embedding" or hasattr(model.get_submodule(site.module), "nf")
        d_out, d_in = weight.shape[-2:] if site.kind != "conv" else (weight.shape[0], math.prod(weight.shape[1:]))
        assert (site.module_d_out, site.d_in) == ((d_in, d_out) if turned else (d_out, d_in))
        assert site.row_indices().max() < site.module_d_out
        assert site.expert is None or site.expert < len(weight)


def watch(module: nn.Module, keep: Callable[[Tensor], Any]) -> RemovableHandle:
    """Hand the input of each call of a module on, within a context."""

    def hook(module: nn.Module, args: tuple[Tensor]) -> None:
        keep(args[0])

    return module.register_forward_pre_hook(hook)


@pytest.mark.parametrize("name", CASES)
def test_which_sites_read_the_very_same_tensor(name):
    model = live(name)
    sites = [
        site for site in scanned(name).sites if site.kind == "linear" and site.stack is not None and site.layer == 0
    ]
    tensors: dict[str, Tensor] = {}  # kept alive, so that no two can have one place
    with ExitStack() as watched:
        for path in {site.module for site in sites}:  # of several calls the first
            watched.enter_context(watch(model.get_submodule(path), partial(tensors.setdefault, path)))
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
    model = live(name)
    adapter = tp.attach(model, EVERYTHING)
    randomise(adapter, std=0.1)
    output = model(**inputs(model))[0]
    output.square().sum().backward()
    with torch.no_grad(), adapter.disabled():
        expected = functional_call(model, changed(model, adapter), (), inputs(model), tie_weights=False)[0]
    assert (output - expected).norm() < 1e-12 * expected.norm()
    adapter.detach()
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
    model = live(name)
    base, state = run(model), {key: value.clone() for key, value in model.state_dict().items()}
    adapter = tp.attach(model, FIRST_LAYER)
    randomise(adapter, std=0.1)
    linear = [s for s in scanned(name).sites if s.is_linear and s.stack is not None and s.layer == 0]
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


FUSED = ("gpt2", "gpt_neox", "gpt_bigcode", "bloom", "falcon", "mpt", "phi3")


@pytest.fixture(scope="module", params=[name for name in CASES if name.startswith(FUSED)])
def fused(request) -> tuple[nn.Module, dict[str, Site]]:
    """A causal model with a fused module, and the sites of its second layer."""
    return live(request.param), {site.matrix: site for site in scanned(request.param).sites if site.layer == 1}


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
    model = live("phi3")
    sites = {site.matrix: site for site in scanned("phi3").sites if site.layer == 1}
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
    sites = choose(Target((entry,)), scanned(name))
    assert [site.key for site in sites] == [(matrix, n) for matrix in matrices for n in numbers[matrix]]


def test_an_entry_that_no_stack_has():
    with pytest.raises(SpecError) as caught:
        choose(Target(("gate",)), scanned("clip"))
    labels = ", ".join(f"`{name}`" for name in CASES["clip"].matrices)
    assert str(caught.value) == f"`gate` matches nothing in CLIPModel, which has {labels} and 6 more"


def test_layers_of_the_longer_stack_alone():
    sites = choose(Target(("query",), layers=(2,)), scanned("t5"))
    assert [site.key for site in sites] == [("decoder.query", 2), ("decoder.cross.query", 2)]
