"""The products of the update at a group of sites: their operands, and what masks leave of their modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tensorpeft.language.errors import fail, listing
from tensorpeft.language.modes import free_modes
from tensorpeft.language.spec import BASE_WEIGHT, SIDES, FactorRule, Spec
from tensorpeft.language.syntax import Call, Product, Reference
from tensorpeft.model.shape import Key, Site
from tensorpeft.network.blocks import Storage
from tensorpeft.network.mode_sizes import ModeLayout
from tensorpeft.network.network import Axis, Block, Group, Operand, Term
from tensorpeft.network.site_classes import SiteClass

Atoms = Mapping[str, tuple[str, ...]]  # of each mode, and of both sides
KeptAtoms = dict[str, np.ndarray]  # atom -> the indices that masks leave of it, ascending


@dataclass(frozen=True)
class _Factor:
    """One reference of a product at a group of sites: its free modes as named there, and where its numbers are."""

    reference: Reference
    modes: tuple[str, ...]
    storage: Storage | None  # None: the base weight


@dataclass(frozen=True)
class _GroupContext:
    """The arguments that building every term of a group needs."""

    spec: Spec
    site_class: SiteClass
    layout: ModeLayout
    sites: tuple[Site, ...]

    @property
    def site(self) -> Site:
        return self.sites[0]


def group(
    spec: Spec, storages: Mapping[str, Storage], site_class: SiteClass, layout: ModeLayout, sites: tuple[Site, ...]
) -> Group:
    """The terms of sites at which the same blocks combine in the same way.

    Raises:
        SpecError: the modes of a product do not fit each other, or its masks leave nothing.
    """
    context = _GroupContext(spec, site_class, layout, sites)
    return Group(sites, layout.scale, tuple(_term(context, storages, product) for product in site_class.products))


def _base_weight(site: Site) -> Block:
    """The block that tells the shape of the base weight; none of the network's."""
    axes = (Axis("d_out", site.d_out), Axis("d_in", site.d_in))
    return Block(BASE_WEIGHT, BASE_WEIGHT, FactorRule(Call(BASE_WEIGHT), frozen=True), axes, ((),))


def _term(context: _GroupContext, storages: Mapping[str, Storage], product: Product) -> Term:
    definitions, sizes = context.spec.modes, context.layout.sizes
    factors = [_Factor(f, free_modes(f, definitions), storages.get(f.factor)) for f in product.factors]
    atoms = context.layout.atoms(dict.fromkeys(mode for factor in factors for mode in factor.modes), product.span)
    _check_atoms(product, factors, atoms, context.site)
    for factor in factors:
        _check_sizes(context, factor)
    kept = _kept_atoms(context, factors, atoms)
    operands = tuple(_operand(context, factor, atoms, kept) for factor in factors)
    rows, columns = (_flat_indices(atoms[side], sizes, kept) for side in SIDES)
    left = {atom: len(kept[atom]) if atom in kept else sizes[atom] for each in atoms.values() for atom in each}
    return Term(product.sign, operands, left, atoms["d_out"], atoms["d_in"], rows, columns)


def _check_atoms(product: Product, factors: Sequence[_Factor], atoms: Atoms, site: Site) -> None:
    """Every factor carries an atom once, and both sides are carried whole."""
    found: set[str] = set()
    for factor in factors:
        mine = [atom for mode in factor.modes for atom in atoms[mode]]
        found.update(mine)
        twice = next((atom for atom in mine if mine.count(atom) > 1), None)
        if twice:
            raise fail(f"`{factor.reference}` carries `{twice}` twice, once within another mode", factor.reference.span)
    for side in SIDES:
        missing = next((atom for atom in atoms[side] if atom not in found), None)
        if missing:
            raise fail(f"no factor of this product carries `{missing}`, the {side} of {site}", product.span)


def _check_sizes(context: _GroupContext, factor: _Factor) -> None:
    """The modes of a reference have the sizes of the tensor that it refers to."""
    names = SIDES if factor.storage is None else factor.storage.sharing.names[context.site_class]
    for mode, name in zip(factor.modes, names, strict=True):
        found, expected = context.layout.sizes[mode], context.layout.sizes[name]
        if found != expected:
            message = f"`{factor.reference}` has {mode} = {found} at {context.site}, expected {name} = {expected}"
            raise fail(message, factor.reference.span)


def _kept_atoms(context: _GroupContext, factors: Sequence[_Factor], atoms: Atoms) -> KeptAtoms:
    """The indices of each masked mode of a product that all factors with a mask on it keep."""
    kept: KeptAtoms = {}
    for factor in factors:
        if factor.storage is None:
            continue
        for position, mode in enumerate(factor.modes):
            left = factor.storage.kept(context.site, position)
            if left is None:
                continue
            rule = factor.storage.rule(position)
            if atoms[mode] != (mode,):
                message = f"`{mode}` cannot be masked: another factor of the product carries a part of it"
                raise fail(f"{message}; mask one of {listing(atoms[mode])} there instead", rule.span)
            serving = factor.storage.serving(context.site, position, context.layout.sizes[mode])
            indices = np.flatnonzero(np.isin(serving, left))
            kept[mode] = np.intersect1d(kept[mode], indices) if mode in kept else indices
            if not len(kept[mode]):
                raise fail(f"the masks leave nothing of mode `{mode}` at {context.site}", rule.span)
    return kept


def _operand(context: _GroupContext, factor: _Factor, atoms: Atoms, kept: KeptAtoms) -> Operand:
    storage, sizes, site = factor.storage, context.layout.sizes, context.site
    block = _base_weight(site) if storage is None else storage.block(site)
    take: list[Sequence[int] | None] = []
    for position, mode in enumerate(factor.modes):
        used = _flat_indices(atoms[mode], sizes, kept)
        axis_size = block.free_axes[position].size
        if storage is None:
            take.append(None if used is None else tuple(used.tolist()))
        elif used is None and storage.policies[position] != "group":
            take.append(None if sizes[mode] == axis_size else range(sizes[mode]))
        else:
            serving = storage.serving(site, position, sizes[mode])
            wanted = serving if used is None else serving[used]
            take.append(_positions(wanted, storage.stored(site, position), axis_size))
    mine = tuple(atom for mode in factor.modes for atom in atoms[mode])
    left = tuple(len(kept[atom]) if atom in kept else sizes[atom] for atom in mine)
    site_modes = () if storage is None else storage.sharing.site_modes
    keys: tuple[Key, ...] = tuple(() if storage is None else storage.key(each) for each in context.sites)
    return Operand(factor.reference.factor, block, mine, left, site_modes, keys, tuple(take))


def _positions(wanted: np.ndarray, stored: np.ndarray | None, axis_size: int) -> tuple[int, ...] | None:
    """Where the wanted indices of an axis are among those that are stored (None: all of it); None: they are just these."""
    positions = wanted if stored is None else np.searchsorted(stored, wanted)
    n_stored = axis_size if stored is None else len(stored)
    return None if np.array_equal(positions, np.arange(n_stored)) else tuple(positions.tolist())


def _flat_indices(atoms: tuple[str, ...], sizes: Mapping[str, int], kept: KeptAtoms) -> np.ndarray | None:
    """The kept indices of a mode from those of its atoms, the first the slowest; None: all of them."""
    if not kept.keys() & {*atoms}:
        return None
    grids = np.ix_(*(kept[atom] if atom in kept else np.arange(sizes[atom]) for atom in atoms))
    return np.ravel_multi_index(np.broadcast_arrays(*grids), [sizes[atom] for atom in atoms]).ravel()
