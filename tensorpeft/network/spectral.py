"""Numbers from a decomposition of the base weight, W = U diag(S) V^T or W = Q R, in the places where a factor holds them.

The decomposition itself is computed where the weight is (runtime). Everything here is numpy, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tensorpeft.language.errors import fail
from tensorpeft.language.spec import Spec
from tensorpeft.language.syntax import Spectral
from tensorpeft.model.shape import Key, Site
from tensorpeft.network.initialisers import origins
from tensorpeft.network.mode_sizes import ModeLayout
from tensorpeft.network.network import Block, Unfolding
from tensorpeft.network.sharing import Layouts, Sharing, Users


@dataclass(frozen=True)
class Decomposition:
    """W = left diag(values) right^T, of k = min(d_out, d_in) pairs of vectors; of W = Q R, R is right^T and the values are 1."""

    left: np.ndarray  # shape: (d_out, k)
    values: np.ndarray  # shape: (k,), descending
    right: np.ndarray  # shape: (d_in, k)


def signed(left: np.ndarray, values: np.ndarray, right: np.ndarray) -> Decomposition:
    """The decomposition in which the entry of the largest size in each left vector is positive."""
    largest = np.take_along_axis(left, np.abs(left).argmax(axis=0)[None], axis=0)  # shape: (1, k)
    sign = np.where(largest < 0, -1.0, 1.0)
    return Decomposition(left * sign, values, right * sign)


def spectral_values(block: Block, key: Key, found: Decomposition, site: Site) -> np.ndarray:
    """The initial numbers of one key of a data-dependent block, from the decomposition of its weight, in the key's shape.

    Raises:
        SpecError: a power of the singular values is not finite.
    """
    init, fold = block.init, block.unfolding
    assert isinstance(init, Spectral)
    assert fold is not None
    n = len(found.values)
    kept = slice(n - fold.rank, n) if init.last else slice(fold.rank)
    part = {"U": found.left, "Q": found.left, "V": found.right, "R": found.right}.get(init.part)
    numbers = np.ones(fold.rank) if part is None else part[:, kept]
    exponent = float(init.power.evaluate(block.names[key])) + (init.part == "S")
    with np.errstate(all="ignore"):
        numbers = numbers * found.values[kept] ** exponent
    if not np.isfinite(numbers).all():
        raise fail(f"`{init}` has no finite value at {site}: a singular value is 0", init.span)
    apart = numbers.reshape((*fold.side, fold.rank))
    order = [place for places in fold.axes for place in places]
    sizes = [axis.size for axis in block.free_axes]
    shape = [size if places else 1 for size, places in zip(sizes, fold.axes, strict=True)]
    whole = np.broadcast_to(apart.transpose(order).reshape(shape), sizes)
    if block.entries is not None:
        return whole.ravel()[block.entries[key].positions]
    if block.kept is not None:
        return whole[np.ix_(*(np.arange(n) if k is None else k for n, k in zip(sizes, block.kept[key], strict=True)))]
    return whole


def unfolding(block: Block, sharing: Sharing, users: Mapping[Key, Users], layouts: Layouts) -> Unfolding:
    """Where a factor that starts from the weight holds its sides and its bond.

    Raises:
        SpecError: sites share its numbers, or it does not carry its side whole.
    """
    init = block.init
    assert isinstance(init, Spectral)
    for sites in users.values():
        if len(sites) > 1:
            shared = f"`{block.factor}` is one tensor for {sites[0][0]} and {sites[1][0]}"
            expected = "expected it to carry the modes that tell these apart"
            raise fail(f"`{init}` is another for each weight, and {shared}; {expected}", init.span)
    alone = [user for [user] in users.values()]
    return [_unfolding(block, init, sharing.names[each], site, layouts[each]) for site, each in alone][-1]


def _unfolding(block: Block, init: Spectral, names: tuple[str, ...], site: Site, layout: ModeLayout) -> Unfolding:
    bond = [axis.mode for axis in block.free_axes].index(init.bond)
    rank = layout.sizes[names[bond]]
    side = {"U": "d_out", "Q": "d_out", "V": "d_in", "R": "d_in"}.get(init.part)
    atoms = layout.atoms(names)
    within = atoms[side] if side else ()
    axes = [tuple(within.index(atom) for atom in atoms[name] if atom in within) for name in names]
    axes[bond] = (len(within),)
    if sorted(place for each in axes for place in each) != list(range(len(within) + 1)):
        carried = f"`{block.factor}` carries {', '.join(names)} at {site}"
        raise fail(f"`{init}` is of {side} and `{init.bond}`, and {carried}", init.span)
    return Unfolding(rank, tuple(layout.sizes[atom] for atom in within), tuple(axes))


def refuse_excess(spec: Spec, sharing: Sharing, layouts: Layouts) -> None:
    """Hold the rank of a factor that starts from the weight to what a decomposition has.

    Raises:
        SpecError: it takes more vectors than there are.
    """
    init = spec.factor(origins(spec, sharing.factor)[-1]).init
    if isinstance(init, Spectral):
        for site_class, names in sharing.names.items():
            site, rank = site_class.example, layouts[site_class].sizes[names[sharing.free.index(init.bond)]]
            most = min(site.d_out, site.d_in)
            if rank > most:
                raise fail(f"`{init}` takes {rank} vectors, and {site} has {most} in all", init.span)
