"""Holds a plan to what it means. What is found here is a fault of the planner, never of its user."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from tensorpeft.language.errors import InternalError
from tensorpeft.network.network import Group, Term
from tensorpeft.planning.chain import SITE, Bundles, Chain, Link, operand_modes, site_sizes
from tensorpeft.planning.cost import Built, prologue_key
from tensorpeft.planning.orders import TOKEN, activation
from tensorpeft.planning.shared_inputs import InputSet, bundles_of, input_of
from tensorpeft.planning.steps import step_flops


def verify_sites(group: Group, bundles: Bundles) -> None:
    """The bundles of a group cover its sites, each once."""
    covered = sorted(site for sites in bundles for site in sites)
    _hold(covered == list(range(len(group.sites))), f"bundles cover the sites {covered} of {len(group.sites)}")


def verify_sets(sets: tuple[InputSet, ...], groups: Sequence[tuple[Group, Bundles]]) -> None:
    """The input sets have the bundles of all linear modules, and the sites of each read one tensor."""
    for number, (group, bundles) in enumerate(groups):
        expected = bundles if group.kind == "linear" else ()
        _hold(bundles_of(sets, number) == expected, f"the input sets have other bundles than group {number}")
    for each in sets:
        members = ((groups[bundle.group][0], site) for bundle in each.bundles for site in bundle.sites)
        read = {(group.at, *input_of(group.sites[site])) for group, site in members}
        _hold(len(read) == 1, f"an input set reads {len(read)} tensors")


def verify_chain(group: Group, term: Term, chain: Chain, tokens: int) -> None:
    """A chain has each operand of its product once, and leads from ``d_in`` to ``d_out``."""
    operands = sorted(i for link in chain.links for i in link.operands)
    _hold(operands == list(range(len(term.operands))), f"links have the operands {operands} of {len(term.operands)}")
    _hold(chain.sign == term.sign, f"a chain has sign {chain.sign}, its product {term.sign}")
    start = activation(term)
    end = (*start[: start.index(TOKEN) + 1], *term.d_out)
    met = [start, *(link.after for link in chain.links)]
    for link, before in zip(chain.links, met, strict=False):
        _hold(link.before == before, f"a link starts from {link.before}, behind one that ends at {before}")
        _verify_activation(term, link, tokens if group.kind == "linear" else None)
        _verify_steps(group, term, link)
    _hold(met[-1] == end, f"a chain ends at {met[-1]}, expected {end}")


def _verify_activation(term: Term, link: Link, tokens: int | None) -> None:
    """The activation loses what is contracted and gets what is new, for the FLOPs that are told (None: not of a product)."""
    _hold({*link.batch, *link.contracted} <= {*link.before}, f"a link contracts {link.modes} with {link.before}")
    after = ({*link.before} - {*link.contracted} | {*link.new}) - {SITE}
    _hold({*link.after} - {SITE} == after, f"a link leaves {link.after}, expected {sorted(after)}")
    if tokens is not None:
        sizes = {**term.sizes, TOKEN: tokens, "task": 1, SITE: 1}
        flops = prod(sizes[mode] for mode in {*link.before, *link.new}) * (2 if link.contracted else 1)
        _hold(link.flops == flops, f"a link has {link.flops:,} FLOPs, expected {flops:,}")


def _verify_steps(group: Group, term: Term, link: Link) -> None:
    """The steps contract each operand of a link once, to the link's modes; no mode is summed that is still needed."""
    operands = [term.operands[i] for i in link.operands]
    made = [operand.modes if link.at_site else operand_modes(group, operand) for operand in operands]
    live, sizes, output = set(range(len(made))), {**term.sizes, **site_sizes(group)}, (*link.site_modes, *link.modes)
    for step in link.steps:
        _hold({*step.inputs} <= live, f"a step contracts {step.inputs}, and there are {sorted(live)}")
        live -= {*step.inputs}
        left, right = (made[number] for number in step.inputs)
        _hold((step.left, step.right) == (left, right), f"{step} contracts tensors of modes {left} and {right}")
        needed = {*output}.union(*(made[number] for number in live))
        kept = {mode for mode in (*left, *right) if mode in needed}
        _hold({*step.result} == kept, f"{step} keeps {step.result}, expected {sorted(kept)}")
        flops = step_flops(left, right, step.result, sizes)
        _hold(step.flops == flops, f"{step} has {step.flops:,} FLOPs, expected {flops:,}")
        live.add(len(made))
        made.append(step.result)
    _hold(len(live) == 1, f"a link leaves {len(live)} tensors, expected one")
    _hold(sorted(made[-1]) == sorted(output), f"a link is built to {made[-1]}, expected {output}")


def verify_prologue(group: Group, chains: tuple[Chain, ...], flops: int, built: Built) -> None:
    """The FLOPs beforehand are those of the tensors that no group before has ``built``."""
    expected = 0
    for chain, term in zip(chains, group.terms, strict=True):
        for link in chain.links:
            key = prologue_key(term, link)
            expected += 0 if group.kind == "linear" and key in built else link.prologue_flops
            built.add(key)
    _hold(flops == expected, f"a group has {flops:,} FLOPs beforehand, expected {expected:,}")


def _hold(fact: bool, otherwise: str) -> None:
    if not fact:
        raise InternalError(f"a plan contradicts itself: {otherwise}")
