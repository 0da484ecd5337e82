"""The stored tensors of a factor, and which part of them each site uses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from tensorpeft.language.errors import fail
from tensorpeft.language.spec import SITE_MODES, MaskRule, Spec
from tensorpeft.language.syntax import Reference
from tensorpeft.network.layout import Layout
from tensorpeft.network.masks import kept_indices
from tensorpeft.network.modes import free_modes, written_modes
from tensorpeft.network.network import Axis, Block
from tensorpeft.network.selection import Kind
from tensorpeft.network.shapes import Key, Site

Sizes = tuple[int, ...]  # of the free written modes of a factor
Layouts = Mapping[Kind, Layout]
Placed = Sequence[tuple[Site, Kind]]


@dataclass(frozen=True)
class Use:
    """A factor at the sites that have it: the modes of its first reference name those of the stored tensor.

    ``names`` are the modes of the first reference at each kind of sites.
    """

    factor: str
    written: tuple[str, ...]
    names: dict[Kind, tuple[str, ...]]

    @property
    def site_modes(self) -> tuple[str, ...]:
        """The site modes that the factor carries, in the order of a key."""
        return tuple(mode for mode in SITE_MODES if mode in self.written)

    @property
    def free(self) -> tuple[str, ...]:
        """The other written modes, in their order."""
        return tuple(mode for mode in self.written if mode not in SITE_MODES)

    def key(self, site: Site) -> Key:
        """Under which label a site's numbers are stored."""
        return tuple(getattr(site, mode) for mode in self.site_modes)

    def sizes(self, kind: Kind, layouts: Layouts) -> Sizes:
        """What a kind of sites wants of each free mode."""
        sizes = layouts[kind].sizes
        return tuple(sizes[mode] for mode in self.names[kind])


def use(spec: Spec, factor: str, kinds: Iterable[Kind]) -> Use:
    """Who uses a factor, and by which names of its modes."""

    def first(references: Iterable[Reference]) -> Reference | None:
        return next((reference for reference in references if reference.factor == factor), None)

    stored = first(f for product in spec.update.products for f in product.factors)
    assert stored is not None
    found = {kind: first(f for product in kind.products for f in product.factors) for kind in kinds}
    names = {kind: free_modes(reference, spec.modes) for kind, reference in found.items() if reference is not None}
    return Use(factor, written_modes(stored, spec.modes), names)


@dataclass(frozen=True)
class Storage:
    """The blocks of one factor, and which of them a site uses."""

    use: Use
    policies: tuple[str, ...]  # of the free modes
    masks: tuple[MaskRule, ...]
    blocks: tuple[Block, ...]
    of_site: dict[Key, tuple[Key, Block]]

    def key(self, site: Site) -> Key:
        return self.of_site[site.key][0]

    def block(self, site: Site) -> Block:
        return self.of_site[site.key][1]

    def kept(self, site: Site, position: int) -> np.ndarray | None:
        """The indices of a free axis that are stored for a site; None: all of them."""
        key, block = self.of_site[site.key]
        return None if block.kept is None else block.kept[key][position]

    def source(self, site: Site, position: int, size: int) -> np.ndarray | None:
        """For each index of a mode of this size the index of the axis that serves it; None: the same."""
        stored = self.block(site).free_axes[position].size
        grouped = self.policies[position] == "group" and stored != size
        return np.arange(size) * stored // size if grouped else None

    def rule(self, position: int) -> MaskRule:
        return next(rule for rule in self.masks if rule.mode == self.use.free[position])


def store(spec: Spec, use: Use, placed: Placed, layouts: Layouts) -> Storage:
    """The blocks that hold a factor for its sites.

    Raises:
        SpecError: a mask, or the policy for a ragged mode, does not fit the sizes.
    """
    wanted = {kind: use.sizes(kind, layouts) for kind in use.names}
    of_site = {site: (use.key(site), wanted[kind]) for site, kind in placed if kind in use.names}
    several: dict[Key, set[Sizes]] = defaultdict(set)
    for key, sizes in of_site.values():
        several[key].add(sizes)
    policies = tuple(spec.policy(mode) for mode in use.free)
    refuse_ragged(spec, use, wanted.values())
    stored = {key: stored_sizes(spec, use, policies, frozenset(sizes)) for key, sizes in several.items()}
    keys_of: dict[Sizes, list[Key]] = defaultdict(list)
    for key, by_wanted in stored.items():
        for sizes in sorted(set(by_wanted.values())):
            keys_of[sizes].append(key)
    ragged = [mode for mode, *sizes in zip(use.free, *keys_of, strict=True) if len(set(sizes)) > 1]
    blocks = {sizes: _block(spec, use, sizes, keys, ragged) for sizes, keys in keys_of.items()}
    held = {site.key: (key, blocks[stored[key][sizes]]) for site, (key, sizes) in of_site.items()}
    masks = tuple(rule for rule in spec.masks if rule.factor == use.factor)
    return Storage(use, policies, masks, tuple(blocks.values()), held)


def stored_sizes(spec: Spec, use: Use, policies: tuple[str, ...], wanted: frozenset[Sizes]) -> dict[Sizes, Sizes]:
    """For each of the sizes that the sites of one key want of a factor, those of the tensor that serves them."""
    if len(wanted) == 1 or not {"slice", "group"}.intersection(policies):
        return {sizes: sizes for sizes in wanted}
    together: dict[Sizes, list[Sizes]] = defaultdict(list)
    for sizes in wanted:
        apart = tuple(size for size, policy in zip(sizes, policies, strict=True) if policy not in ("slice", "group"))
        together[apart].append(sizes)
    found = {}
    for several in together.values():
        columns = zip(policies, *several, strict=True)
        serving = tuple(min(sizes) if policy == "group" else max(sizes) for policy, *sizes in columns)
        for sizes in several:
            for mode, policy, size, least in zip(use.free, policies, sizes, serving, strict=True):
                if policy == "group" and size % least:
                    raise fail(
                        f"mode `{mode}` of factor `{use.factor}` is `group`, but its size {size} is no multiple "
                        f"of {least}, its least",
                        spec.factor(use.factor).span or spec.span,
                    )
            found[sizes] = serving
    return found


def refuse_ragged(spec: Spec, use: Use, wanted: Iterable[Sizes]) -> None:
    """Hold what sites want of a factor to `ragged: error`.

    Raises:
        SpecError: the sizes of a mode differ, and its policy forbids that.
    """
    for mode, *sizes in zip(use.free, *wanted, strict=True):
        if spec.policy(mode) == "error" and len(set(sizes)) > 1:
            found = " and ".join(map(str, sorted(set(sizes))))
            raise fail(
                f"mode `{mode}` of factor `{use.factor}` is ragged, its sizes are {found}, and `ragged: error` forbids it",
                spec.factor(use.factor).span or spec.span,
            )


def _block(spec: Spec, use: Use, sizes: Sizes, keys: list[Key], ragged: list[str]) -> Block:
    """The block of a factor for one size; its name tells the sizes of the modes that are ragged."""
    labels = {mode: tuple(dict.fromkeys(key[i] for key in keys)) for i, mode in enumerate(use.site_modes)}
    of_mode = dict(zip(use.free, sizes, strict=True))
    if prod(map(len, labels.values())) == len(keys):
        axes = tuple(Axis(m, of_mode[m]) if m in of_mode else Axis(m, len(labels[m]), labels[m]) for m in use.written)
        keys = [tuple(key) for key in _grid([labels[m] for m in use.site_modes])]
    else:
        axes = (Axis("site", len(keys), tuple(keys)), *(Axis(mode, size) for mode, size in of_mode.items()))
    name = "_".join((use.factor, *(f"{mode}{of_mode[mode]}" for mode in ragged)))
    rule = spec.factor(use.factor)
    return Block(name, use.factor, rule, axes, tuple(keys), _kept(spec, use, of_mode, keys))


def _grid(labels: list[tuple[str | int, ...]]) -> list[Key]:
    return [()] if not labels else [(first, *rest) for first in labels[0] for rest in _grid(labels[1:])]


def _kept(
    spec: Spec, use: Use, sizes: Mapping[str, int], keys: list[Key]
) -> dict[Key, tuple[np.ndarray | None, ...]] | None:
    rules = {rule.mode: rule for rule in spec.masks if rule.factor == use.factor}
    if not rules:
        return None
    return {
        key: tuple(kept_indices(rules[m], key, size, spec.seed) if m in rules else None for m, size in sizes.items())
        for key in keys
    }
