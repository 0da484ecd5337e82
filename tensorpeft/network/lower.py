"""Spec x model -> Network: which tensors are stored, and how each group of equal sites uses them.

In: a checked spec, a model's shape. Out: a network whose every operand fits its block.
Not here: the order of contraction (planning), numbers (initial), torch (runtime).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from tensorpeft.language.errors import did_you_mean, fail, listing
from tensorpeft.language.spec import BASE_WEIGHT, SIDES, SITE_MODES, STRUCTURAL_MODES, Spec
from tensorpeft.language.syntax import Product
from tensorpeft.network.layout import Layout, layout, used_modes
from tensorpeft.network.masks import kept_indices
from tensorpeft.network.network import Axis, Block, Group, Network, Operand, Term
from tensorpeft.network.shapes import Key, ModelShape, Site
from tensorpeft.network.targets import choose


def lower(spec: Spec, model: ModelShape) -> Network:
    """The network that a spec stands for on a model.

    Raises:
        SpecError: the target, a size, a mask or the ragged policy does not fit this model.
    """
    _refuse_unsupported(spec)
    sites = choose(spec.target, model)
    _refuse_unmatched(spec, sites)
    placed = _layouts(spec, model, sites)
    storages = {name: _store(spec, name, placed) for name, _ in spec.factors}
    masked = [storages[name] for name in dict.fromkeys(rule.factor for rule in spec.masks)]
    gathered: dict[tuple[Any, ...], tuple[Layout, list[Site]]] = {}
    for site, modes in placed:
        blocks = tuple(storage.block(site).name for storage in storages.values())
        keys = tuple(storage.key(site) for storage in masked)  # of which each keeps indices of its own
        gathered.setdefault((id(modes), blocks, keys), (modes, []))[1].append(site)
    groups = tuple(_group(spec, storages, modes, tuple(members)) for modes, members in gathered.values())
    return Network(spec, model, tuple(b for s in storages.values() for b in s.blocks), groups)


def _refuse_unsupported(spec: Spec) -> None:
    for product in spec.update.products:
        for reference in product.factors:
            if reference.factor == BASE_WEIGHT:
                raise fail("the base weight `W` in an update is not supported yet", reference.span)
            if "expert" in reference.modes:
                raise fail("the mode `expert` is not supported yet", reference.span)
    for definition in spec.modes:
        if any(part.name == "expert" for part in definition.parts):
            raise fail("the mode `expert` is not supported yet", definition.span)


def _refuse_unmatched(spec: Spec, sites: tuple[Site, ...]) -> None:
    """A value that a mask gives for one matrix belongs to a matrix of the target."""
    for rule in spec.masks:
        for name, value in rule.rule.options:
            if not any(site.is_named(name) for site in sites):
                matrices = dict.fromkeys(site.matrix for site in sites)
                hint = did_you_mean(name, matrices) or f"; the target has {listing(matrices)}"
                raise fail(
                    f"`{rule.rule}` gives a value for `{name}`, which is no matrix of the target{hint}", value.span
                )


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

    factor: str
    site_modes: tuple[str, ...]
    written: tuple[str, ...]  # the free written modes
    blocks: tuple[Block, ...]
    of_site: dict[Key, tuple[Key, Block]]

    def key(self, site: Site) -> Key:
        return self.of_site[site.key][0]

    def block(self, site: Site) -> Block:
        return self.of_site[site.key][1]

    def kept(self, site: Site, mode: str) -> np.ndarray:
        """The indices of a masked mode that are stored for a site."""
        key, block = self.of_site[site.key]
        indices = block.kept[key][self.written.index(mode)] if block.kept is not None else None
        assert indices is not None
        return indices


def _store(spec: Spec, factor: str, placed: list[tuple[Site, Layout]]) -> _Storage:
    written = _written_modes(spec, factor)
    site_modes = tuple(mode for mode in SITE_MODES if mode in written)
    free = tuple(mode for mode in written if mode not in SITE_MODES)
    wanted: dict[Key, set[tuple[int, ...]]] = defaultdict(set)
    sizes_of: dict[Key, tuple[Key, tuple[int, ...]]] = {}
    for site, modes in placed:
        key = tuple(getattr(site, mode) for mode in site_modes)
        sizes = tuple(modes.sizes[mode] for mode in free)
        wanted[key].add(sizes)
        sizes_of[site.key] = key, sizes
    if spec.policy("*") == "error":
        _refuse_ragged(spec, factor, free, wanted)
    if spec.policy("*") == "slice":
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
        site: (key, by_key[key] if spec.policy("*") == "slice" else blocks[sizes])
        for site, (key, sizes) in sizes_of.items()
    }
    return _Storage(factor, site_modes, free, tuple(blocks.values()), of_site)


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


def _group(spec: Spec, storages: dict[str, _Storage], modes: Layout, sites: tuple[Site, ...]) -> Group:
    terms = (_term(spec, p, [storages[f.factor] for f in p.factors], modes, sites) for p in spec.update.products)
    return Group(sites, modes.scale, tuple(terms))


def _term(spec: Spec, product: Product, storages: list[_Storage], modes: Layout, sites: tuple[Site, ...]) -> Term:
    carried = dict.fromkeys(mode for storage in storages for mode in storage.written).keys()
    atoms = {mode: modes.atoms(mode, carried) for mode in (*carried, *SIDES)}
    _check_atoms(product, storages, atoms, sites[0])
    kept = _kept_atoms(spec, storages, sites[0], modes, atoms)
    operands = tuple(_operand(storage, sites, modes, atoms, kept) for storage in storages)
    rows, columns = (_flat_indices(atoms[side], modes.sizes, kept) for side in SIDES)
    sizes = {atom: _left(atom, modes, kept) for each in atoms.values() for atom in each}
    return Term(product.sign, operands, sizes, atoms["d_out"], atoms["d_in"], rows, columns)


def _check_atoms(product: Product, storages: list[_Storage], atoms: dict[str, tuple[str, ...]], site: Site) -> None:
    """Every factor carries an atom once, and both sides are carried whole."""
    found: set[str] = set()
    for reference, storage in zip(product.factors, storages, strict=True):
        mine = [atom for mode in storage.written for atom in atoms[mode]]
        found.update(mine)
        twice = next((atom for atom in mine if mine.count(atom) > 1), None)
        if twice:
            raise fail(f"`{reference}` carries `{twice}` twice, once within another mode", reference.span)
    for side in SIDES:
        missing = next((atom for atom in atoms[side] if atom not in found), None)
        if missing:
            raise fail(f"no factor of this product carries `{missing}`, the {side} of {site}", product.span)


def _left(atom: str, modes: Layout, kept: dict[str, np.ndarray]) -> int:
    return len(kept[atom]) if atom in kept else modes.sizes[atom]


def _operand(
    storage: _Storage,
    sites: tuple[Site, ...],
    modes: Layout,
    atoms: dict[str, tuple[str, ...]],
    kept: dict[str, np.ndarray],
) -> Operand:
    block, keys = storage.block(sites[0]), tuple(storage.key(site) for site in sites)
    stored = block.kept[keys[0]] if block.kept is not None else (None,) * len(storage.written)
    take = tuple(
        _positions(_flat_indices(atoms[mode], modes.sizes, kept), modes.sizes[mode], some, axis.size)
        for mode, axis, some in zip(storage.written, block.free_axes, stored, strict=True)
    )
    mine = tuple(atom for mode in storage.written for atom in atoms[mode])
    sizes = tuple(_left(atom, modes, kept) for atom in mine)
    return Operand(storage.factor, block, mine, sizes, storage.site_modes, keys, take)


def _kept_atoms(
    spec: Spec, storages: list[_Storage], site: Site, modes: Layout, atoms: dict[str, tuple[str, ...]]
) -> dict[str, np.ndarray]:
    """What is left of each masked mode of a product at a site: what every factor that masks it keeps."""
    kept: dict[str, np.ndarray] = {}
    by_name = {storage.factor: storage for storage in storages}
    for rule in spec.masks:
        if rule.factor not in by_name:
            continue
        if atoms[rule.mode] != (rule.mode,):
            message = f"`{rule.mode}` cannot be masked: another factor of the product carries a part of it"
            raise fail(f"{message}; mask one of {listing(atoms[rule.mode])} there instead", rule.span)
        storage = by_name[rule.factor]
        indices = storage.kept(site, rule.mode)
        indices = indices[indices < modes.sizes[rule.mode]]
        kept[rule.mode] = np.intersect1d(kept[rule.mode], indices) if rule.mode in kept else indices
        if not len(kept[rule.mode]):
            raise fail(f"the masks leave nothing of mode `{rule.mode}` at {site}", rule.span)
    return kept


def _positions(used: np.ndarray | None, size: int, stored: np.ndarray | None, axis_size: int) -> Sequence[int] | None:
    """Which positions of an axis a product uses, of those that are stored; None: all of them."""
    if used is None:
        return None if size == axis_size else range(size)
    if stored is None:
        return tuple(used.tolist())
    return None if len(used) == len(stored) else tuple(np.searchsorted(stored, used).tolist())


def _flat_indices(atoms: tuple[str, ...], sizes: dict[str, int], kept: dict[str, np.ndarray]) -> np.ndarray | None:
    """The kept indices of a mode from those of its atoms, the first the slowest; None: all of them."""
    if not kept.keys() & {*atoms}:
        return None
    grids = np.ix_(*(kept[atom] if atom in kept else np.arange(sizes[atom]) for atom in atoms))
    return np.ravel_multi_index(np.broadcast_arrays(*grids), [sizes[atom] for atom in atoms]).ravel()
