"""The stored tensors of a factor, and which part of them each site uses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

import numpy as np

from tensorpeft.language.errors import fail
from tensorpeft.language.keywords import LAYER
from tensorpeft.language.spec import MaskRule, Spec
from tensorpeft.language.syntax import Spectral
from tensorpeft.model.shape import Key, Site
from tensorpeft.network.initialisers import origins
from tensorpeft.network.mask_packing import FactorMasks, KeptIndices
from tensorpeft.network.network import Axis, Block
from tensorpeft.network.sharing import FreeSizes, Layouts, Placed, Sharing, Users, serving_indices, users_of
from tensorpeft.network.site_classes import SiteClass
from tensorpeft.network.spectral import refuse_excess, unfolding


@dataclass(frozen=True)
class Storage:
    """The blocks of one factor, and which of them a site uses."""

    sharing: Sharing
    policies: tuple[str, ...]  # of the free modes
    masking: FactorMasks | None
    blocks: tuple[Block, ...]
    of_site: dict[Key, tuple[Key, Block]]
    masked_axes: dict[tuple[str, Key], tuple[np.ndarray | None, ...]]  # by block and key

    def key(self, site: Site) -> Key:
        return self.of_site[site.key][0]

    def block(self, site: Site) -> Block:
        return self.of_site[site.key][1]

    def stored(self, site: Site, axis: int) -> np.ndarray | None:  # shape: (stored,)
        """The indices of a free axis that a site's key holds; None: all of them."""
        key, block = self.of_site[site.key]
        return None if block.kept is None else block.kept[key][axis]

    def kept(self, site: Site, axis: int) -> np.ndarray | None:  # shape: (kept,)
        """The indices of a free axis that masks leave at a site; None: all of them."""
        key, block = self.of_site[site.key]
        return self.masked_axes[block.name, key][axis] if self.masking else None

    def serving(self, site: Site, axis: int, size: int) -> np.ndarray:  # shape: (size,)
        """For each index of a mode of this size the index of the axis that serves it."""
        return serving_indices(self.policies[axis], size, self.block(site).free_axes[axis].size)

    @property
    def cuts(self) -> bool:
        """Whether masks leave other indices of its modes for each key."""
        return self.masking is not None and any(len(axes) == 1 for _, axes in self.masking.rules)

    def rule(self, axis: int) -> MaskRule:
        """The rule that masks an axis by itself."""
        assert self.masking is not None
        return next(rule for rule, axes in self.masking.rules if axes == (axis,))


def store(
    spec: Spec, sharing: Sharing, placed: Placed, layouts: Layouts, masking: FactorMasks | None, stack: str = ""
) -> Storage:
    """The blocks that hold a factor for its sites, which are those of a stack; its name is part of theirs.

    Raises:
        SpecError: a mask, an initialiser, or the policy for a ragged mode does not fit the sizes.
    """
    refuse_excess(spec, sharing, layouts)
    users = users_of(spec, sharing, placed, layouts)
    keys_of: dict[FreeSizes, list[Key]] = defaultdict(list)
    for key, sizes in users:
        keys_of[sizes].append(key)
    ragged = [mode for mode, *sizes in zip(sharing.free, *keys_of, strict=True) if len(set(sizes)) > 1]
    blocks, of_site, axes = [], {}, {}
    for sizes, keys in keys_of.items():
        mine = {key: users[key, sizes] for key in keys}
        block = _block(spec, sharing, sizes, keys, ragged, stack)
        block = replace(block, names=_names(block, sharing, mine, layouts))
        if block.data_dependent:
            block = replace(block, unfolding=unfolding(block, sharing, mine, layouts))
        if masking is not None:
            kept = _kept(masking, block, sizes, mine)
            block = _packed(block, kept, masking.by_entries)
            axes.update({(block.name, key): each.axes for key, each in kept.items()})
        blocks.append(block)
        of_site.update({site.key: (key, block) for key, sites in mine.items() for site, _ in sites})
    policies = tuple(spec.policy(mode) for mode in sharing.free)
    return Storage(sharing, policies, masking, tuple(blocks), of_site, axes)


def _block(spec: Spec, sharing: Sharing, sizes: FreeSizes, keys: list[Key], ragged: list[str], stack: str) -> Block:
    """The block of a factor for one size; its name tells its stack, and the sizes of the modes that are ragged."""
    labels = {mode: tuple(dict.fromkeys(key[i] for key in keys)) for i, mode in enumerate(sharing.site_modes)}
    of_mode = dict(zip(sharing.free, sizes, strict=True))
    if prod(map(len, labels.values())) == len(keys):
        bound = {mode: Axis(mode, len(each), each) for mode, each in labels.items()}
        axes = tuple(bound[mode] if mode in bound else Axis(mode, of_mode[mode]) for mode in sharing.written)
        keys = [*product(*labels.values())]
    else:
        axes = (Axis("site", len(keys), tuple(keys)), *(Axis(mode, size) for mode, size in of_mode.items()))
    name = "_".join((sharing.factor, *filter(None, (stack,)), *(f"{mode}{of_mode[mode]}" for mode in ragged)))
    origin = origins(spec, sharing.factor)[-1]
    rule, init = spec.factor(sharing.factor), spec.factor(origin).init
    return Block(name, sharing.factor, rule, axes, tuple(keys), origin=origin, init=init, stack=stack)


def _names(block: Block, sharing: Sharing, users: Mapping[Key, Users], layouts: Layouts) -> dict[Key, dict[str, float]]:
    """The values of the names in the initialiser, key by key.

    A mode of the block is the size of its axis, the layer is the key's, and every other name has its value at the key's sites.
    """
    own = {axis.mode: axis.size for axis in block.free_axes}
    spoken = (block.init.power if isinstance(block.init, Spectral) else block.init).names - own.keys()
    known: dict[frozenset[SiteClass], dict[str, float]] = {}
    found = {}
    for key in block.keys:
        classes = frozenset(site_class for _, site_class in users[key])
        if classes not in known:
            known[classes] = {
                name: _one(name, block, [layouts[site_class].names[name] for site_class in classes])
                for name in sorted(spoken)
                if all(name in layouts[site_class].names for site_class in classes)
            }
        layer = {mode: float(value) for mode, value in zip(sharing.site_modes, key, strict=True) if mode == LAYER}
        found[key] = {**known[classes], **own, **layer}
    return found


def _one(name: str, block: Block, values: Sequence[float]) -> float:
    if len(set(values)) > 1:
        sizes = " and ".join(f"{value:g}" for value in sorted(set(values)))
        message = f"`{block.init}` speaks of `{name}`, which is {sizes} at the sites that share factor `{block.name}`"
        raise fail(f"{message}; expected one number", block.init.span)
    return values[0]


def _kept(masking: FactorMasks, block: Block, sizes: FreeSizes, users: Mapping[Key, Users]) -> dict[Key, KeptIndices]:
    """The kept indices of each key of a block: as the mask rules say, or as a checkpoint has them."""
    if block.name in masking.saved:
        return dict(zip(block.keys, masking.restored(block.name, block.keys, sizes, users), strict=True))
    return {key: masking.kept(key, sizes, users[key]) for key in block.keys}


def _packed(block: Block, kept: Mapping[Key, KeptIndices], by_entries: bool) -> Block:
    entries = {key: each.entries for key, each in kept.items() if each.entries is not None}
    if by_entries:
        whole = all(each.count == prod(axis.size for axis in block.free_axes) for each in entries.values())
        return block if whole else replace(block, entries=entries)
    axes = {key: each.axes for key, each in kept.items()}
    masked = any(axis is not None for each in axes.values() for axis in each)
    return replace(block, kept=axes) if masked else block
