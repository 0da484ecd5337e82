"""A plan is held to its network: every plan passes (the shipped ones in ``test_golden``), and what is wrong in one is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import tensorpeft as tp
from tensorpeft.language.errors import InternalError
from tensorpeft.model.cards import model_shape
from tensorpeft.pipeline import front
from tensorpeft.planning.plan import Plan, plan
from tensorpeft.planning.regime import Regime
from tensorpeft.planning.shared_inputs import Bundle, InputSet
from tests.planning.test_plan import network_of
from tests.structures import CASES

LLAMA = model_shape("llama-2-7b")
GROUP = "tensorpeft: 1\ntarget: {matrices: [query, value]}\nrank: {r: 4, s: 4}\n" + (
    "update: B[matrix, layer, d_out, r] * C[layer, r, s] * D[matrix, s] * A[layer, s, d_in]\nfactors: {B: {init: zeros}}"
)


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_the_plan_of_every_structure_holds(name: str, architecture: str) -> None:
    network = network_of(name, architecture)
    for regime in (Regime(), Regime(4, gradients=False)):
        plan(network, regime).verify()
    plan(network, Regime(64), alone=False).verify()


@pytest.mark.parametrize("name", ["lora", "dora", "glora", "lorta", "ia3", "partial_lora"])
def test_the_plans_of_large_models_hold(name: str) -> None:
    front(name, LLAMA).verify()


def mutated(change: Callable[[Any], Any], *path: str | int) -> Plan:
    """A plan in which one value, found by attributes and positions, is another."""

    def changed(value: Any, rest: tuple[str | int, ...]) -> Any:
        if not rest:
            return change(value)
        at, *others = rest
        if isinstance(at, str):
            return replace(value, **{at: changed(getattr(value, at), tuple(others))})
        return (*value[:at], changed(value[at], tuple(others)), *value[at + 1 :])

    return changed(front(tp.load_spec(GROUP), LLAMA, Regime(4096)), path)


def last_of_several(planned: Plan) -> tuple[str | int, ...]:
    """Where a link is that takes steps to build."""
    for number, link in enumerate(planned.groups[0].chains[0].links):
        if len(link.steps) > 1:
            return "groups", 0, "chains", 0, "links", number
    raise AssertionError("every link is a factor by itself")


LINK = last_of_several(front(tp.load_spec(GROUP), LLAMA, Regime(4096)))
CHAIN = LINK[:-2]
MUTATIONS: dict[str, tuple[Callable[[Any], Any], tuple[str | int, ...], str]] = {
    "a step less": (lambda steps: steps[1:], (*LINK, "steps"), "contracts"),
    "no last step": (lambda steps: steps[:-1], (*LINK, "steps"), "leaves 2 tensors"),
    "another tensor": (lambda inputs: (inputs[0], inputs[0]), (*LINK, "steps", 0, "inputs"), "contracts"),
    "one that is used up": (lambda step: replace(step, inputs=(0, 1)), (*LINK, "steps", 1), "contracts"),
    "another mode": (lambda modes: ("d_out", *modes), (*LINK, "steps", 0, "left"), "contracts tensors of modes"),
    "a mode summed too early": (lambda modes: modes[1:], (*LINK, "steps", 0, "result"), "keeps"),
    "FLOPs of a step": (lambda flops: flops + 1, (*LINK, "steps", 0, "flops"), "FLOPs, expected"),
    "FLOPs of a link": (lambda flops: 2 * flops, (*LINK, "flops"), "FLOPs, expected"),
    "modes of a link": (lambda modes: (*modes, "r"), (*LINK, "new"), "a link"),
    "operands twice": (lambda links: (*links, links[-1]), (*CHAIN, "links"), "links have the operands"),
    "links turned round": (lambda links: links[::-1], (*CHAIN, "links"), "a link starts from"),
    "an end that is not d_out": (
        lambda links: (*links[:-1], replace(links[-1], after=links[-1].after[:-1])),
        (*CHAIN, "links"),
        "leaves",
    ),
    "the other sign": (lambda sign: -sign, (*CHAIN, "sign"), "sign"),
    "a site twice": (lambda bundles: (bundles[0], *bundles), ("groups", 0, "bundles"), "bundles cover the sites"),
    "a site missing": (lambda bundles: bundles[1:], ("groups", 0, "bundles"), "bundles cover the sites"),
    "FLOPs beforehand": (lambda flops: flops - 1, ("groups", 0, "prologue_flops"), "FLOPs beforehand"),
    "a set missing": (lambda sets: sets[1:], ("sets",), "other bundles than group 0"),
    "sites of two layers in a set": (
        lambda sets: (InputSet((Bundle(0, (*sets[0].bundles[0].sites, *sets[1].bundles[0].sites)),)), *sets[2:]),
        ("sets",),
        "bundles",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_wrong_is_caught(name: str) -> None:
    change, path, message = MUTATIONS[name]
    with pytest.raises(InternalError) as caught:
        mutated(change, *path).verify()
    assert message in str(caught.value)


def test_a_set_of_sites_that_read_different_tensors_is_caught() -> None:
    planned = front("lora", LLAMA)
    one, other, *rest = planned.groups[0].bundles
    mixed = ((one[0], other[1]), (other[0], one[1]), *rest)
    wrong = replace(
        planned,
        groups=(replace(planned.groups[0], bundles=mixed),),
        sets=tuple(InputSet((Bundle(0, sites),)) for sites in mixed),
    )
    with pytest.raises(InternalError, match="an input set reads 2 tensors"):
        wrong.verify()
