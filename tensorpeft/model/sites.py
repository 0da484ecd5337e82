"""The weights of a model -> sites: each gets the name of its matrix and the number of its layer."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import replace
from typing import Any

from tensorpeft.language.errors import ModelError
from tensorpeft.model.family import Architecture, Matrix
from tensorpeft.model.naming import SiteName, names
from tensorpeft.model.shape import Key, Linear, Site


def resolve(linears: Iterable[Linear], architecture: Architecture | None) -> tuple[Site, ...]:
    """The sites of a model, matrix by matrix, each from its first layer to its last.

    Weights that the family knows have the family's roles, in its order. Every other one is named by its path
    (`model.naming`). A module that the family never calls is a parameter of the module that reads it.

    Raises:
        ModelError: a weight has other sides than its family's table says, or two have one role, layer and expert.
    """
    if architecture:
        used = (linear for linear in linears if not architecture.is_unused(linear.path))
        linears = [linear.read() if architecture.is_read(linear.path) else linear for linear in used]
    linears = list(linears)
    places = {linear.path: architecture and architecture.find(linear.path) for linear in linears}
    named = {} if all(places.values()) else names(linears, architecture)
    sites: dict[Key, Site] = {}
    known: set[str] = set()  # paths of weights whose parts are the family's
    for linear in linears:
        if not (found := places[linear.path]):
            parts = _unknown(linear, named[linear.name], sites)
        else:
            parts = [] if linear.path in known else [site for m in found[2] for site in _known(linear, found, m)]
            known.add(linear.path)
        for site in parts:
            if site.key in sites:
                raise ModelError(f"`{sites[site.key].path}` and `{site.path}` are both {_place(site)}")
            sites[site.key] = site
    return in_order(sites.values(), [matrix.role for matrix in architecture.matrices] if architecture else ())


def in_order(sites: Iterable[Site], first: Iterable[str] = ()) -> tuple[Site, ...]:
    """Sites by matrix and layer: the matrices in the given order, then as they come."""
    sites = list(sites)
    rank = {matrix: at for at, matrix in enumerate(dict.fromkeys((*first, *(site.matrix for site in sites))))}
    return tuple(sorted(sites, key=lambda site: (rank[site.matrix], site.layer, site.expert or 0)))


def _place(site: Site) -> str:
    expert = "" if site.expert is None else f", expert {site.expert}"
    return f"`{site.matrix}` of layer {site.layer}{expert}"


def _unknown(linear: Linear, name: SiteName, others: Container[Key]) -> list[Site]:
    """The sites of a weight that no family knows: one, or one for each expert."""
    experts: Iterable[int | None] = (name.expert,) if linear.experts is None else range(linear.experts)
    sites = [_site(linear, name.matrix, (name.stack, name.layer, expert), linear) for expert in experts]
    return [site if site.key not in others else replace(site, matrix=linear.name) for site in sites]


def _known(linear: Linear, found: tuple[str, int, Any], matrix: Matrix) -> list[Site]:
    """The sites of a role in a weight that the family knows: one, or one for each expert."""
    sides = linear.module_d_out, linear.d_in, linear.experts
    expected = matrix.module_d_out, matrix.d_in, matrix.experts
    if sides != expected:
        told = f"by the model's config the module of `{matrix.role}` is {_sides(*expected)}"
        raise ModelError(f"`{linear.path}` is {_sides(*sides)} (d_out x d_in), but {told}")
    experts: Iterable[int | None] = (None,) if linear.experts is None else range(linear.experts)
    return [_site(linear, matrix.role, (*found[:2], expert), matrix) for expert in experts]


def _sides(d_out: int, d_in: int, experts: int | None) -> str:
    return f"{d_out} x {d_in}" if experts is None else f"{experts} of {d_out} x {d_in}"


def _site(linear: Linear, matrix: str, place: tuple[str | None, int, int | None], said: Linear | Matrix) -> Site:
    """The weight's own matter from the model, the matrix's from whoever knows it; ``place`` is stack, layer, expert."""
    stack, layer, expert = place
    return Site(
        module=linear.module,
        matrix=matrix,
        layer=layer,
        d_out=said.d_out,
        d_in=linear.d_in,
        heads=said.heads,
        head_side=said.head_side,
        rows=said.rows,
        expert=expert,
        kind=linear.kind,
        parameter=linear.parameter,
        reads=said.reads,
        transposed=linear.transposed,
        stack=stack,
    )
