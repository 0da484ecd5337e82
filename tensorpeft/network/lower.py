"""Spec x model -> Network: which tensors are stored, and how each group of equal sites uses them.

A model of several stacks has a network for each of them that the target touches: no factor is shared between them.

In: a checked spec, a model's shape. Out: a network whose every operand fits its block.
Not here: the order of contraction (planning), numbers (initial), torch (runtime).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tensorpeft.language.errors import fail
from tensorpeft.language.spec import Spec
from tensorpeft.model.shape import ModelShape, Site
from tensorpeft.model.target import choose
from tensorpeft.model.trained import extras
from tensorpeft.network.blocks import Storage, store
from tensorpeft.network.budget import fitted
from tensorpeft.network.checks import checked_stacks
from tensorpeft.network.mask_packing import masking
from tensorpeft.network.mode_sizes import layout
from tensorpeft.network.network import Block, Group, Network
from tensorpeft.network.operands import group
from tensorpeft.network.scores import Scores
from tensorpeft.network.sharing import Layouts, Placed, first_reference, sharing_of
from tensorpeft.network.site_classes import SiteClass


def lower(spec: Spec, model: ModelShape, saved: Mapping[str, np.ndarray] | None = None) -> Network:
    """The network that a spec stands for on a model. A budget has become ranks in its spec.

    ``saved`` are the indices that masks keep of some blocks, by their names, as a checkpoint has them.

    Raises:
        SpecError: the target, a selector, a size, a mask, a ragged mode or the budget does not fit this model.
    """
    sites = choose(spec.target, model)
    trained = extras(spec, model, sites)
    if not spec.update.products:
        return Network(spec, model, (), (), trained)
    stacks = checked_stacks(spec, sites)
    scores = Scores(spec, readable=saved is None)
    spec = fitted(spec, model, tuple(stacks.values()), scores)
    blocks: list[Block] = []
    groups: list[Group] = []
    for name, placed in stacks.items():
        stored, used = _network(spec, model, name, placed, scores, saved)
        blocks += stored
        groups += used
    _refuse_namesakes(spec, blocks)
    return Network(spec, model, tuple(blocks), tuple(groups), trained)


def _refuse_namesakes(spec: Spec, blocks: Sequence[Block]) -> None:
    """No two tensors are of one name: that of a ragged factor ends with sizes."""
    owner: dict[str, str] = {}
    for block in blocks:
        other = owner.setdefault(block.name, block.factor)
        if other != block.factor:
            message = f"a tensor of `{other}` is called `{block.name}` too, since its sizes differ"
            raise fail(f"{message}; expected another name", first_reference(spec, block.factor).span)


def _network(
    spec: Spec, model: ModelShape, stack: str, placed: Placed, scores: Scores, saved: Mapping[str, np.ndarray] | None
) -> tuple[list[Block], tuple[Group, ...]]:
    """The blocks and the groups of one stack."""
    layouts = {each: layout(spec, model, each) for each in dict.fromkeys(site_class for _, site_class in placed)}
    first: dict[object, SiteClass] = {}  # of those whose arithmetic comes to the same
    same = {each: first.setdefault((each.products, found.meaning), each) for each, found in layouts.items()}
    placed = [(site, same[site_class]) for site, site_class in placed]
    layouts = {each: layouts[each] for each in first.values()}
    storages = {}
    for name, _ in spec.factors:
        each = sharing_of(spec, name, layouts)
        storages[name] = store(spec, each, placed, layouts, masking(spec, each, layouts, scores, saved), stack)
    blocks = [block for storage in storages.values() for block in storage.blocks]
    return blocks, _groups(spec, storages, placed, layouts)


def _groups(spec: Spec, storages: dict[str, Storage], placed: Placed, layouts: Layouts) -> tuple[Group, ...]:
    """The sites at which the same blocks combine in the same way, group by group."""
    gathered: dict[tuple[object, ...], tuple[SiteClass, list[Site]]] = {}
    present = {site_class: [s for s in storages.values() if site_class in s.sharing.names] for site_class in layouts}
    for site, site_class in placed:
        blocks = tuple(storage.block(site).name for storage in present[site_class])
        keys = tuple(storage.key(site) for storage in present[site_class] if storage.cuts)
        gathered.setdefault((site_class, blocks, keys, site.kind), (site_class, []))[1].append(site)
    return tuple(group(spec, storages, each, layouts[each], tuple(members)) for each, members in gathered.values())
