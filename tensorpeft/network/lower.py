"""Spec x model -> Network: which tensors are stored, and how each group of equal sites uses them.

In: a checked spec, a model's shape. Out: a network whose every operand fits its block.
Not here: the order of contraction (planning), numbers (initial), torch (runtime).
"""

from __future__ import annotations

from tensorpeft.language.spec import Spec
from tensorpeft.network.budget import fitted
from tensorpeft.network.checks import check_experts, check_names
from tensorpeft.network.extras import extras
from tensorpeft.network.layout import layout
from tensorpeft.network.network import Block, Group, Network
from tensorpeft.network.selection import Kind, kinds
from tensorpeft.network.shapes import ModelShape, Site
from tensorpeft.network.storage import Layouts, Placed, Storage, store, use
from tensorpeft.network.targets import choose
from tensorpeft.network.terms import base_weight, group


def lower(spec: Spec, model: ModelShape) -> Network:
    """The network that a spec stands for on a model. A budget has become ranks in its spec.

    Raises:
        SpecError: the target, a selector, a size, a mask, a ragged mode or the budget does not fit this model.
    """
    sites = choose(spec.target, model)
    trained = extras(spec, model, sites)
    if not spec.update.products:
        return Network(spec, model, (), (), trained)
    check_names(spec, sites)
    placed = kinds(spec, sites)
    check_experts(spec, placed)
    spec = fitted(spec, model, placed)
    layouts = {kind: layout(spec, model, kind) for kind in dict.fromkeys(kind for _, kind in placed)}
    storages = {name: store(spec, use(spec, name, layouts), placed, layouts) for name, _ in spec.factors}
    blocks = tuple(block for storage in storages.values() for block in storage.blocks)
    return Network(spec, model, blocks, _groups(spec, storages, placed, layouts), trained)


def _groups(spec: Spec, storages: dict[str, Storage], placed: Placed, layouts: Layouts) -> tuple[Group, ...]:
    """The sites at which the same blocks combine in the same way, group by group."""
    gathered: dict[tuple[object, ...], tuple[Kind, list[Site]]] = {}
    present = {kind: [s for s in storages.values() if kind in s.use.names] for kind in layouts}
    for site, kind in placed:
        blocks = tuple(storage.block(site).name for storage in present[kind])
        keys = tuple(storage.key(site) for storage in present[kind] if storage.masks)  # each keeps indices of its own
        gathered.setdefault((kind, blocks, keys, site.kind), (kind, []))[1].append(site)
    shapes: dict[tuple[int, int], Block] = {}
    groups = []
    for kind, members in gathered.values():
        base = shapes.setdefault((members[0].d_out, members[0].d_in), base_weight(members[0]))
        groups.append(group(spec, storages, kind, layouts[kind], tuple(members), base))
    return tuple(groups)
