"""Spec x model -> Network: which tensors are stored, and how each group of equal sites uses them.

In: a checked spec, a model's shape. Out: a network whose every operand fits its block.
Not here: the order of contraction (planning), numbers (initial), torch (runtime).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from tensorpeft.language.errors import fail
from tensorpeft.language.spec import BASE_WEIGHT, SIDES, SITE_MODES, STRUCTURAL_MODES, Spec
from tensorpeft.network.layout import Layout, layout, used_modes
from tensorpeft.network.masks import kept_indices
from tensorpeft.network.network import Axis, Block, Group, Key, Network, Operand, Term
from tensorpeft.network.shapes import ModelShape, Site
from tensorpeft.network.targets import choose


def lower(spec: Spec, model: ModelShape) -> Network:
    """The network that a spec stands for on a model.

    Raises:
        SpecError: the target, a size, a mask or the ragged policy does not fit this model.
    """
    sites = choose(spec.target, model)
    placed = _layouts(spec, model, sites)
    storages = {name: _store(spec, name, placed) for name, _ in spec.factors}
    gathered: dict[tuple[Any, ...], list[tuple[Site, Layout]]] = defaultdict(list)
    for site, modes in placed:
        blocks = tuple(storage.block(site).name for storage in storages.values())
        unique = site.key if spec.masks else None  # masked sites differ in size, each from every other
        gathered[id(modes), blocks, unique].append((site, modes))
    groups = tuple(_group(spec, storages, members) for members in gathered.values())
    return Network(spec, model, tuple(b for s in storages.values() for b in s.blocks), groups)


def _layouts(spec: Spec, model: ModelShape, sites: tuple[Site, ...]) -> list[tuple[Site, Layout]]:
    """Each site with its layout; sites that differ in layer alone share one object."""
    known: dict[tuple[Any, ...], Layout] = {}
    placed = []
    with_heads = bool(used_modes(spec).intersection(STRUCTURAL_MODES))
    for site in sites:
        like = (site.d_out, site.d_in, *((site.matrix, site.heads, site.head_side) if with_heads else ()))
        if like not in known:
            known[like] = layout(spec, model, site)
        placed.append((site, known[like]))
    return placed


@dataclass(frozen=True)
class _Storage:
    """The blocks of one factor, and which of them a site uses."""

    site_modes: tuple[str, ...]
    written: tuple[str, ...]  # the free written modes
    blocks: tuple[Block, ...]
    of_site: dict[tuple[str, int], tuple[Key, Block]]

    def key(self, site: Site) -> Key:
        return self.of_site[site.key][0]

    def block(self, site: Site) -> Block:
        return self.of_site[site.key][1]


def _store(spec: Spec, factor: str, placed: list[tuple[Site, Layout]]) -> _Storage:
    written = _written_modes(spec, factor)
    site_modes = tuple(mode for mode in SITE_MODES if mode in written)
    free = tuple(mode for mode in written if mode not in SITE_MODES)
    wanted: dict[Key, set[tuple[int, ...]]] = defaultdict(set)
    sizes_of: dict[tuple[str, int], tuple[Key, tuple[int, ...]]] = {}
    for site, modes in placed:
        key = tuple(getattr(site, mode) for mode in site_modes)
        sizes = tuple(modes.sizes[mode] for mode in free)
        wanted[key].add(sizes)
        sizes_of[site.key] = key, sizes
    if spec.ragged == "error":
        _refuse_ragged(spec, factor, free, wanted)
    if spec.ragged == "slice":
        wanted = {key: {tuple(map(max, zip(*sizes, strict=True)))} for key, sizes in wanted.items()}
    keys_of: dict[tuple[int, ...], list[Key]] = defaultdict(list)
    for key, several in wanted.items():
        for sizes in sorted(several):
            keys_of[sizes].append(key)
    ragged = [mode for mode, *sizes in zip(free, *keys_of, strict=True) if len(set(sizes)) > 1]
    blocks = {
        sizes: _block(spec, factor, written, dict(zip(free, sizes, strict=True)), keys, ragged)
        for sizes, keys in keys_of.items()
    }
    by_key = {key: blocks[sizes] for sizes, keys in keys_of.items() for key in keys}
    of_site = {
        site: (key, by_key[key] if spec.ragged == "slice" else blocks[sizes]) for site, (key, sizes) in sizes_of.items()
    }
    return _Storage(site_modes, free, tuple(blocks.values()), of_site)


def _written_modes(spec: Spec, factor: str) -> tuple[str, ...]:
    """The modes of a factor as stored: as written, but a fused mode that holds site modes is its parts."""
    definitions = {definition.name: [part.name for part in definition.parts] for definition in spec.modes}

    def expand(mode: str) -> list[str]:
        parts = [inner for part in definitions.get(mode, ()) for inner in expand(part)]
        return parts if set(parts).intersection(SITE_MODES) else [mode]

    reference = next(f for product in spec.update.products for f in product.factors if f.factor == factor)
    return tuple(stored for mode in reference.modes for stored in expand(mode))


def _refuse_ragged(spec: Spec, factor: str, free: tuple[str, ...], wanted: dict[Key, set[tuple[int, ...]]]) -> None:
    sizes = sorted({size for several in wanted.values() for size in several})
    if len(sizes) > 1:
        mode, values = next((m, v) for m, *v in zip(free, *sizes, strict=True) if len(set(v)) > 1)
        found = " and ".join(map(str, sorted(set(values))))
        raise fail(
            f"mode `{mode}` of factor `{factor}` is ragged, its sizes are {found}, and `ragged: error` forbids it",
            spec.factor(factor).span or spec.span,
        )


def _block(
    spec: Spec, factor: str, written: tuple[str, ...], sizes: dict[str, int], keys: list[Key], ragged: list[str]
) -> Block:
    """The block of a factor for one size; its name tells the sizes of the modes that are ragged."""
    site_modes = tuple(mode for mode in SITE_MODES if mode in written)
    labels = {mode: tuple(dict.fromkeys(key[i] for key in keys)) for i, mode in enumerate(site_modes)}
    if prod(map(len, labels.values())) == len(keys):
        axes = tuple(Axis(m, sizes[m]) if m in sizes else Axis(m, len(labels[m]), labels[m]) for m in written)
        keys = [tuple(key) for key in _grid([labels[m] for m in site_modes])]
    else:
        axes = (Axis("site", len(keys), tuple(keys)), *(Axis(mode, size) for mode, size in sizes.items()))
    name = "_".join((factor, *(f"{mode}{sizes[mode]}" for mode in ragged)))
    return Block(name, factor, spec.factor(factor), axes, tuple(keys), _kept(spec, factor, sizes, keys))


def _grid(labels: list[tuple[str | int, ...]]) -> list[Key]:
    return [()] if not labels else [(first, *rest) for first in labels[0] for rest in _grid(labels[1:])]


def _kept(
    spec: Spec, factor: str, sizes: dict[str, int], keys: list[Key]
) -> dict[Key, tuple[np.ndarray | None, ...]] | None:
    rules = {rule.mode: rule for rule in spec.masks if rule.factor == factor}
    if not rules:
        return None
    return {
        key: tuple(kept_indices(rules[m], key, size, spec.seed) if m in rules else None for m, size in sizes.items())
        for key in keys
    }


def _group(spec: Spec, storages: dict[str, _Storage], members: list[tuple[Site, Layout]]) -> Group:
    sites, modes = tuple(site for site, _ in members), members[0][1]
    sides = {side: modes.atoms(side) for side in SIDES}
    kept = _kept_atoms(spec, storages, sites[0], modes) if spec.masks else {}
    sizes = {atom: len(kept[atom]) if atom in kept else size for atom, size in modes.sizes.items()}
    terms = []
    for product in spec.update.products:
        operands = tuple(_operand(storages.get(f.factor), f.factor, sites, modes, kept) for f in product.factors)
        carried = {mode for operand in operands for mode in operand.modes}
        for side in SIDES:
            missing = [atom for atom in sides[side] if atom not in carried]
            if missing:
                raise fail(f"no factor of this product carries `{missing[0]}`, the {side} of {sites[0]}", product.span)
        terms.append(Term(product.sign, operands))
    indices = {
        side: _flat_indices([modes.sizes[a] for a in atoms], [kept.get(a) for a in atoms])
        for side, atoms in sides.items()
    }
    return Group(
        sites, sizes, sides["d_out"], sides["d_in"], modes.scale, tuple(terms), indices["d_out"], indices["d_in"]
    )


def _operand(
    storage: _Storage | None, name: str, sites: tuple[Site, ...], modes: Layout, kept: dict[str, np.ndarray]
) -> Operand:
    if storage is None:  # the base weight
        atoms = (*modes.atoms("d_out"), *modes.atoms("d_in"))
        sides = (modes.sizes["d_out"], modes.sizes["d_in"])
        return Operand(
            BASE_WEIGHT,
            None,
            atoms,
            tuple(modes.sizes[a] for a in atoms),
            sides,
            SITE_MODES[:2],
            tuple(s.key for s in sites),
        )
    atoms = tuple(atom for mode in storage.written for atom in modes.atoms(mode))
    sizes = tuple(len(kept[atom]) if atom in kept else modes.sizes[atom] for atom in atoms)
    keys, block = tuple(storage.key(site) for site in sites), storage.block(sites[0])
    take = tuple(_positions(modes, mode, kept, block, keys[0], i) for i, mode in enumerate(storage.written))
    written = tuple(modes.sizes[mode] for mode in storage.written)
    return Operand(
        name, block, atoms, sizes, written, storage.site_modes, keys, take if any(t is not None for t in take) else None
    )


def _kept_atoms(spec: Spec, storages: dict[str, _Storage], site: Site, modes: Layout) -> dict[str, np.ndarray]:
    """What is left of each masked mode at a site: what every factor that masks it keeps."""
    kept: dict[str, np.ndarray] = {}
    for rule in spec.masks:
        if modes.atoms(rule.mode) != (rule.mode,):
            parts = " * ".join(modes.atoms(rule.mode))
            raise fail(f"mode `{rule.mode}` is split into {parts} here; mask one of its parts instead", rule.span)
        storage = storages[rule.factor]
        block, key = storage.block(site), storage.key(site)
        indices = block.kept[key][storage.written.index(rule.mode)] if block.kept else None
        assert indices is not None
        indices = indices[indices < modes.sizes[rule.mode]]
        kept[rule.mode] = np.intersect1d(kept[rule.mode], indices) if rule.mode in kept else indices
        if not len(kept[rule.mode]):
            raise fail(f"the masks leave nothing of mode `{rule.mode}` at {site}", rule.span)
    return kept


def _positions(
    modes: Layout, mode: str, kept: dict[str, np.ndarray], block: Block, key: Key, axis: int
) -> np.ndarray | None:
    """Where, on its axis of what a key stores, an operand finds the kept indices; None: there is nothing to choose."""
    stored = block.kept[key][axis] if block.kept else None
    if mode not in kept:
        return None
    if stored is None:
        return kept[mode]
    return None if len(stored) == len(kept[mode]) else np.searchsorted(stored, kept[mode])


def _flat_indices(sizes: list[int], kept: list[np.ndarray | None]) -> np.ndarray | None:
    """The kept indices of a side from those of its atoms; None: all of them."""
    if all(some is None for some in kept):
        return None
    grids = np.ix_(*(np.arange(size) if some is None else some for size, some in zip(sizes, kept, strict=True)))
    return np.ravel_multi_index(np.broadcast_arrays(*grids), sizes).ravel()
