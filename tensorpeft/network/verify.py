"""The invariants of a network, checked between the passes: planning and emission rely on them and do not ask again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate
from math import prod
from operator import mul

import numpy as np

from tensorpeft.language.errors import MAX_SHOWN, InternalError
from tensorpeft.language.spec import SIDES, SITE_MODES
from tensorpeft.model.shape import Key
from tensorpeft.network.network import Block, Group, Network, Operand, Term

Stored = Mapping[str, tuple[Block, set[Key]]]  # by name


def verify(network: Network) -> None:
    """Hold a network to its invariants. No mask is drawn for it.

    Raises:
        InternalError: it breaks some, with a sentence for each.
    """
    faults = [*_of_network(network), *(fault for block in network.blocks for fault in _of_block(block))]
    if faults := faults or [*_of_groups(network)]:  # these ask their blocks
        told = f"the network of `{network.spec.name}` on {network.model.name} contradicts itself"
        raise InternalError("\n    ".join([f"{told}:", *faults[:MAX_SHOWN]]))


def _of_network(network: Network) -> Iterator[str]:
    if network.spec.budget is not None:
        yield f"its budget of {network.spec.budget:,} is not resolved to ranks"
    yield from _twice((block.name for block in network.blocks), "tensor")
    yield from _twice((str(site) for site in network.sites), "site")
    yield from _twice((extra.path for extra in network.extras), "trained parameter")
    adapted = {site.path: site for site in network.sites}
    for extra in network.extras:
        both = (adapted[path] for path in extra.weights if path in adapted)
        yield from (f"`{extra.path}` is trained, and is the weight of {site}" for site in both)
    terms = [term for group in network.groups for term in group.terms]
    used = {operand.block.name for term in terms for operand in term.operands}
    yield from (f"tensor `{block.name}` is used at no site" for block in network.blocks if block.name not in used)


def _of_groups(network: Network) -> Iterator[str]:
    blocks = {block.name: (block, {*block.keys}) for block in network.blocks}
    for number, group in enumerate(network.groups):
        yield from (f"group {number} {fault}" for fault in _of_group(group, blocks))


def _twice(names: Iterable[str], what: str) -> Iterator[str]:
    found: set[str] = set()
    for name in names:
        if name in found:
            yield f"{what} `{name}` is there twice"
        found.add(name)


def _of_block(block: Block) -> Iterator[str]:
    named = f"tensor `{block.name}`"
    bound = [axis for axis in block.axes if axis.labels is not None]
    for axis in block.axes:
        if axis.size < 1 or (axis.labels is not None and axis.size != len(axis.labels)):
            yield f"{named} has an axis `{axis.mode}` of size {axis.size}, labelled {axis.labels}"
    keys = set(block.keys)
    if len(keys) != len(block.keys) or len(keys) != prod(axis.size for axis in bound):
        yield f"{named} has {len(keys)} keys of {len(block.keys)} on axes of {[axis.size for axis in bound]}"
    if block.kept is not None and block.entries is not None:
        yield f"{named} is packed by axes and by entries"
    for what, packed in (("kept indices", block.kept), ("kept entries", block.entries)):
        if packed is not None and packed.keys() != keys:
            yield f"{named} has {what} of other keys than its own"
    sizes = [axis.size for axis in block.free_axes]
    for key, axes in (block.kept or {}).items():
        held = [size if kept is None else len(kept) for size, kept in zip(sizes, axes, strict=False)]
        if len(axes) != len(sizes) or any(not 0 < n <= size for n, size in zip(held, sizes, strict=True)):
            yield f"{named} keeps {held} of {sizes} at {key}"
    for key, entries in (block.entries or {}).items():
        if not 0 < entries.count <= prod(sizes):
            yield f"{named} keeps {entries.count} entries of {prod(sizes)} at {key}"


def _of_group(group: Group, blocks: Stored) -> Iterator[str]:
    if len({(site.d_out, site.d_in, site.kind) for site in group.sites}) != 1:
        yield "has no sites, or sites of several shapes or kinds"
        return
    if group.at != "site":
        yield f"starts at its `{group.at}`, which the planner alone arranges"
    for term in group.terms:
        yield from (f"product {'.'.join(o.factor for o in term.operands)} {fault}" for fault in _of_term(group, term))
        for operand in term.operands:
            yield from (f"factor `{operand.factor}` {told}" for told in _of_operand(group, term, operand, blocks))


def _of_term(group: Group, term: Term) -> Iterator[str]:
    if term.sign not in (1, -1):
        yield f"has sign {term.sign}"
    carried = {mode for operand in term.operands for mode in operand.modes}
    if missing := {*term.sides, *carried} - term.sizes.keys():
        yield f"has no size for {sorted(missing)}"
        return
    site = group.sites[0]
    for name, modes, indices in ((SIDES[0], term.d_out, term.rows), (SIDES[1], term.d_in, term.columns)):
        if missing := {*modes} - carried:
            yield f"has no factor that carries {sorted(missing)} of {name}"
        whole = getattr(site, name)
        if term.size(modes) != (whole if indices is None else len(indices)):
            left = "all" if indices is None else len(indices)
            yield f"has {term.size(modes)} indices of {name} = {whole}, of which masks leave {left}"
        if indices is not None and not _ascends_within(indices, whole):
            yield f"has indices of {name} that do not ascend from 0 to {whole - 1}"
    if common := {*term.d_out} & {*term.d_in}:
        yield f"has {sorted(common)} on both sides"


def _ascends_within(indices: np.ndarray, size: int) -> bool:
    return bool(len(indices) and indices[0] >= 0 and indices[-1] < size and (indices[1:] > indices[:-1]).all())


def _of_operand(group: Group, term: Term, operand: Operand, blocks: Stored) -> Iterator[str]:
    block = operand.block
    if operand.is_base:
        sides = tuple(axis.size for axis in block.axes)
        if sides != (group.sites[0].d_out, group.sites[0].d_in) or operand.site_modes:
            yield f"is {sides}, bound to {operand.site_modes}"
    elif block.name not in blocks or blocks[block.name][0] is not block or block.factor != operand.factor:
        yield f"uses `{block.name}`, which is no tensor of it"
        return
    if operand.sizes != tuple(term.sizes.get(mode) for mode in operand.modes):
        yield f"has modes {operand.modes} of sizes {operand.sizes}, expected those of its product"
    if operand.site_modes != tuple(mode for mode in SITE_MODES if mode in operand.site_modes):
        yield f"has site modes {operand.site_modes}, expected some of {SITE_MODES} in order"
    elif operand.keys != tuple(tuple(getattr(site, mode) for mode in operand.site_modes) for site in group.sites):
        yield "has other keys than its sites"
    known = {()} if operand.is_base else blocks[block.name][1]
    if unknown := {*operand.keys} - known:
        yield f"has keys that `{block.name}` lacks, {sorted(unknown, key=str)[:3]}"
        return
    for key in {*operand.keys} if block.kept is not None else block.keys[:1]:
        yield from _of_take(operand, key)


def _of_take(operand: Operand, key: Key) -> Iterator[str]:
    """How what a key holds becomes the modes of an operand: axis by axis, each of one mode or of several."""
    block = operand.block
    sizes = tuple(axis.size for axis in block.free_axes)
    held = sizes if block.entries is not None else block.key_shape(key)
    if len(operand.take) != len(held):
        yield f"takes from {len(operand.take)} axes, and `{block.name}` has {len(held)}"
        return
    for axis, size, take in zip(block.free_axes, held, operand.take, strict=True):
        if take is not None and not (len(take) and take[0] >= 0 and max(take) < size):
            yield f"takes positions of `{axis.mode}` beyond the {size} that `{block.name}` holds at {key}"
    taken = [size if take is None else len(take) for size, take in zip(held, operand.take, strict=True)]
    along_axes, along_modes = ([*accumulate(numbers, mul, initial=1)] for numbers in (taken, operand.sizes))
    if along_axes[-1] != along_modes[-1] or not {*along_axes} <= {*along_modes}:
        yield f"takes {taken} of `{block.name}`, which do not divide into {operand.modes} of {list(operand.sizes)}"
