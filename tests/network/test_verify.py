"""What every network keeps to: that of each spec does, and each mutation of one is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tensorpeft.language.errors import InternalError, SpecError, TensorpeftError
from tensorpeft.language.loader import load_spec
from tensorpeft.language.shipped import method_paths
from tensorpeft.model.cards import model_shape
from tensorpeft.model.shape import Parameter
from tensorpeft.network.lower import lower
from tensorpeft.network.network import Axis, Block, Entries, Group, Network, Operand, Term
from tensorpeft.network.verify import verify
from tests.network.test_site_classes import LLAMA

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 100, "n_positions": 64}
MODELS = {"llama": LLAMA, "gpt2": model_shape(GPT2)}


def network_of(name: str, model: str) -> Network | None:
    """None where the spec does not fit the model."""
    try:
        return lower(load_spec(name), MODELS[model])
    except SpecError:
        return None


@pytest.mark.parametrize("model", MODELS)
def test_the_network_of_every_spec_is_sound(model: str) -> None:
    networks = [network for name in method_paths() if (network := network_of(name, model))]
    assert len(networks) >= len(method_paths()) - 6
    for network in networks:
        verify(network)


def test_no_mask_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "tensorpeft: 1\ntarget: all-linear\nupdate: D[matrix, layer, d_out, d_in]\nfactors: {D: {init: zeros}}\n"
    network = lower(load_spec(text + "mask: {'D[d_out, d_in]': keep(40)}"), LLAMA)
    monkeypatch.setattr(Entries, "positions", property(lambda self: pytest.fail("a mask was drawn")))
    verify(network)


# Mutations

TEXT = """
tensorpeft: 1
target: {matrices: [query, value]}
update: B[matrix, layer, head, head_dim, r] * A[layer, r, d_in] + W[d_out, d_in] * v[layer, d_in]
rank: {r: 6}
factors: {B: {init: zeros}, v: {init: zeros}}
mask: {'A[r]': keep(4)}
"""
NETWORK = lower(load_spec(TEXT), LLAMA)
BY_ENTRIES = lower(load_spec(TEXT.replace("'A[r]': keep(4)", "'A[r, d_in]': keep(40)")), LLAMA)


def with_block(network: Network, name: str, **changes: object) -> Network:
    """A block changed everywhere: where it is stored and where it is used."""
    old = next(block for block in network.blocks if block.name == name)
    new = replace(old, **changes)

    def operand(each: Operand) -> Operand:
        return replace(each, block=new) if each.block is old else each

    groups = (
        replace(g, terms=tuple(replace(t, operands=tuple(map(operand, t.operands))) for t in g.terms))
        for g in network.groups
    )
    blocks = tuple(new if block is old else block for block in network.blocks)
    return replace(network, blocks=blocks, groups=tuple(groups))


def with_group(**changes: object) -> Network:
    return replace(NETWORK, groups=(replace(NETWORK.groups[0], **changes), *NETWORK.groups[1:]))


def with_term(number: int = 0, **changes: object) -> Network:
    terms = list(NETWORK.groups[0].terms)
    terms[number] = replace(terms[number], **changes)
    return with_group(terms=tuple(terms))


def with_operand(factor: str, **changes: object) -> Network:
    number, term = next(
        (n, t) for n, t in enumerate(NETWORK.groups[0].terms) if any(o.factor == factor for o in t.operands)
    )
    operands = (replace(each, **changes) if each.factor == factor else each for each in term.operands)
    return with_term(number, operands=tuple(operands))


def block(name: str, network: Network = NETWORK) -> Block:
    return next(each for each in network.blocks if each.name == name)


def operand(factor: str) -> Operand:
    return next(o for term in NETWORK.groups[0].terms for o in term.operands if o.factor == factor)


FIRST: Group = NETWORK.groups[0]
TERM: Term = FIRST.terms[0]
QUERY = FIRST.sites[0]
KEPT = block("A").kept
BA, WV = "group 0 product B.A", "group 0 product W.v"

MUTATIONS: dict[str, tuple[Callable[[], Network], str]] = {
    "budget": (
        lambda: replace(NETWORK, spec=replace(NETWORK.spec, budget=20_000)),
        "its budget of 20,000 is not resolved to ranks",
    ),
    "blocks of one name": (lambda: replace(NETWORK, blocks=(*NETWORK.blocks, block("v"))), "tensor `v` is there twice"),
    "a site twice": (
        lambda: replace(NETWORK, groups=(*NETWORK.groups, FIRST)),
        f"site `{QUERY}` is there twice",
    ),
    "an extra twice": (
        lambda: replace(NETWORK, extras=(Parameter("norm.weight", 8), Parameter("norm.weight", 8))),
        "trained parameter `norm.weight` is there twice",
    ),
    "an extra that is a site's weight": (
        lambda: replace(NETWORK, extras=(Parameter(f"{QUERY.path}.weight", 8),)),
        f"`{QUERY.path}.weight` is trained, and is the weight of {QUERY}",
    ),
    "an extra that is tied to a site's weight": (
        lambda: replace(NETWORK, extras=(Parameter("other.weight", 8, others=(f"{QUERY.path}.weight",)),)),
        f"`other.weight` is trained, and is the weight of {QUERY}",
    ),
    "an axis and its labels": (
        lambda: with_block(NETWORK, "v", axes=(Axis("layer", 9, block("v").axes[0].labels), *block("v").axes[1:])),
        "tensor `v` has an axis `layer` of size 9, labelled (0, 1, 2)",
    ),
    "keys and axes": (
        lambda: with_block(NETWORK, "v", keys=block("v").keys[:2]),
        "tensor `v` has 2 keys of 2 on axes of [3]",
    ),
    "kept for other keys": (
        lambda: with_block(NETWORK, "A", kept={(9,): KEPT[0,]}),
        "tensor `A` has kept indices of other keys than its own",
    ),
    "kept on other axes": (
        lambda: with_block(NETWORK, "A", kept={key: axes[:1] for key, axes in KEPT.items()}),
        "tensor `A` keeps [4] of [6, 64] at (0,)",
    ),
    "kept beyond the axis": (
        lambda: with_block(NETWORK, "A", kept={key: (np.arange(7), None) for key in KEPT}),
        "tensor `A` keeps [7, 64] of [6, 64] at (0,)",
    ),
    "entries beyond the grid": (
        lambda: with_block(BY_ENTRIES, "A", entries={key: Entries(999, np.empty) for key in KEPT}),
        "tensor `A` keeps 999 entries of 384 at (0,)",
    ),
    "packed twice": (
        lambda: with_block(NETWORK, "A", entries={key: Entries(8, np.empty) for key in KEPT}),
        "tensor `A` is packed by axes and by entries",
    ),
    "an unused block": (
        lambda: replace(NETWORK, blocks=(*NETWORK.blocks, replace(block("v"), name="u", factor="u"))),
        "tensor `u` is used at no site",
    ),
    "no sites": (lambda: with_group(sites=()), "group 0 has no sites, or sites of several shapes or kinds"),
    "sites of two shapes": (
        lambda: with_group(sites=(QUERY, replace(QUERY, layer=9, d_in=5))),
        "group 0 has no sites, or sites of several shapes or kinds",
    ),
    "turned round by the planner": (
        lambda: with_group(at="output"),
        "group 0 starts at its `output`, which the planner alone arranges",
    ),
    "sign": (lambda: with_term(sign=2), f"{BA} has sign 2"),
    "a mode without a size": (
        lambda: with_term(sizes={mode: size for mode, size in TERM.sizes.items() if mode != "head"}),
        f"{BA} has no size for ['head']",
    ),
    "a side that no factor carries": (
        lambda: with_term(d_in=("x",), sizes={**TERM.sizes, "x": QUERY.d_in}),
        f"{BA} has no factor that carries ['x'] of d_in",
    ),
    "a side of another size": (
        lambda: with_term(d_out=("head_dim",)),
        f"{BA} has 8 indices of d_out = 64, of which masks leave all",
    ),
    "rows of another number": (
        lambda: with_term(rows=np.arange(5)),
        f"{BA} has 64 indices of d_out = 64, of which masks leave 5",
    ),
    "rows out of order": (
        lambda: with_term(rows=np.arange(64)[::-1].copy()),
        f"{BA} has indices of d_out that do not ascend from 0 to 63",
    ),
    "columns outside": (
        lambda: with_term(columns=np.arange(64) + 1),
        f"{BA} has indices of d_in that do not ascend from 0 to 63",
    ),
    "one mode on both sides": (
        lambda: with_term(1, d_out=("d_in",), d_in=("d_in",)),
        f"{WV} has ['d_in'] on both sides",
    ),
    "the base weight's shape": (
        lambda: with_operand("W", block=replace(operand("W").block, axes=(Axis("d_out", 3), Axis("d_in", 64)))),
        "group 0 factor `W` is (3, 64), bound to ()",
    ),
    "a block of another network": (
        lambda: with_operand("v", block=replace(block("v"))),
        "group 0 factor `v` uses `v`, which is no tensor of it",
    ),
    "the block of another factor": (
        lambda: with_operand("v", block=block("A")),
        "group 0 factor `v` uses `A`, which is no tensor of it",
    ),
    "sizes of an operand": (
        lambda: with_operand("v", sizes=(7,)),
        "group 0 factor `v` has modes ('d_in',) of sizes (7,), expected those of its product",
    ),
    "site modes out of order": (
        lambda: with_operand("B", site_modes=("layer", "matrix")),
        "group 0 factor `B` has site modes ('layer', 'matrix'), expected some of ('matrix', 'layer', 'expert') in order",
    ),
    "keys of other sites": (
        lambda: with_operand("v", keys=((1,),)),
        "group 0 factor `v` has other keys than its sites",
    ),
    "keys that the block lacks": (
        lambda: with_operand("v", keys=((7,), *operand("v").keys[1:])),
        "group 0 factor `v` has keys that `v` lacks, [(7,)]",
    ),
    "take of other axes": (
        lambda: with_operand("v", take=(None, None)),
        "group 0 factor `v` takes from 2 axes, and `v` has 1",
    ),
    "take beyond what is held": (
        lambda: with_operand("A", take=((0, 1, 2, 4), None)),
        "group 0 factor `A` takes positions of `r` beyond the 4 that `A` holds at (0,)",
    ),
    "take of another number": (
        lambda: with_operand("v", take=(range(9),)),
        "group 0 factor `v` takes [9] of `v`, which do not divide into ('d_in',) of [64]",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_told(name: str) -> None:
    mutate, sentence = MUTATIONS[name]
    verify(NETWORK)
    with pytest.raises(InternalError) as caught:
        verify(mutate())
    title, *faults = str(caught.value).splitlines()
    assert title == "the network of `adapter` on llama contradicts itself:"
    assert f"    {sentence}" in faults


def test_it_is_no_error_of_the_user() -> None:
    assert not issubclass(InternalError, TensorpeftError)


# Equality


def test_networks_are_values() -> None:
    again = lower(load_spec(TEXT), LLAMA)
    assert again == NETWORK
    assert again is not NETWORK
    assert hash(again) == hash(NETWORK)
    assert {again: 1}[NETWORK] == 1


@pytest.mark.parametrize("rule", ["'A[r]': keep(4)", "'A[r, d_in]': keep(40)"])
def test_what_masks_keep_is_a_part_of_the_value(rule: str) -> None:
    """Two files of scores of one name, or two checkpoints, may have other indices for one spec."""
    text = TEXT.replace("'A[r]': keep(4)", rule)
    one, same = lower(load_spec(text), LLAMA), lower(load_spec(text), LLAMA)
    assert one == same
    other = lower(load_spec(text, seed=1), LLAMA)
    assert replace(other, spec=one.spec) != one
    assert any(a.mask_digest != b.mask_digest for a, b in zip(one.blocks, other.blocks, strict=True))
    assert [a.shape for a in one.blocks] == [b.shape for b in other.blocks]
