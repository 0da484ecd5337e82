"""Header x model: whether a saved adapter was saved from such a base. Says what differs."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from tensorpeft.checkpoint.header import Header, SiteRow
from tensorpeft.language.errors import CheckpointError, listing
from tensorpeft.model.shape import Site
from tensorpeft.model.target import site_rows
from tensorpeft.network.network import Network


def stored_name(path: str) -> str:
    """Under which name a file has a parameter of the base: one that no factor can have."""
    return f"base.{path}"


def check_sites(header: Header, model: str, sites: tuple[Site, ...]) -> None:
    """Hold the sites that the saved spec means on a model to those of the base that it was saved from.

    Raises:
        CheckpointError: they differ in number, order or size.
    """
    here = site_rows(sites)
    if here != header.sites:
        expected = f"does not have the sites of the {header.model} it was saved from"
        raise CheckpointError(f"this {model} {expected}: {_difference(header.sites, here)}")


def check_factors(header: Header, network: Network) -> None:
    """Hold the factors that the saved spec has on a model to those of the file.

    Raises:
        CheckpointError: the names, a shape or a mask differ, or one is not stored that no seed gives.
    """
    blocks = {block.name: block for block in network.blocks}
    extras = {stored_name(extra.path): extra for extra in network.extras}
    owners = {name.rpartition(".")[0] for name in extras}
    statistics = {name for name in header.factors.keys() - extras.keys() if name.rpartition(".")[0] in owners}
    if blocks.keys() | extras.keys() != header.factors.keys() - statistics:
        expected = f"expected {listing(sorted((*blocks, *extras)))} for this model"
        raise CheckpointError(f"it has the factors {listing(header.factors)}, {expected}")
    for name, extra in extras.items():
        if (found := prod(header.factors[name].shape)) != extra.count:
            raise CheckpointError(f"`{name}` has {found:,} numbers, expected {extra.count:,} for this model")
    for name, block in blocks.items():
        saved = header.factors[name]
        if saved.shape != block.shape:
            raise CheckpointError(f"factor `{name}` has shape {saved.shape}, expected {block.shape} for this model")
        if saved.mask != block.mask_digest:
            raise CheckpointError(f"the mask of factor `{name}` is another than the one it was saved with")
        if not (saved.stored or block.seeded):
            raise CheckpointError(f"it does not hold factor `{name}`, which no seed gives")


def _difference(saved: Iterable[SiteRow], here: Iterable[SiteRow]) -> str:
    """The first difference between two lists of sites."""
    before, now = ({(*row[:2], *row[4:]): row[2:4] for row in rows} for rows in (saved, here))
    for key, (d_out, d_in) in before.items():
        if key not in now:
            return f"there is no {_place(*key)}"
        if (found := now[key]) != (d_out, d_in):
            return f"{_place(*key)} is {found[0]} x {found[1]} (d_out x d_in), expected {d_out} x {d_in}"
    more = next((key for key in now if key not in before), None)
    return f"it has {_place(*more)} too" if more else "they are in another order"


def _place(matrix: str | int, layer: str | int, *expert: str | int) -> str:
    return f"`{matrix}` of layer {layer}" + "".join(f", expert {each}" for each in expert)
