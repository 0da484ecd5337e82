"""The weights of a model -> sites: each gets the name of its matrix and the number of its layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

from tensorpeft.language.catalogue import data_folder
from tensorpeft.language.errors import ModelError
from tensorpeft.network.architecture import Architecture, Matrix, read_yaml
from tensorpeft.network.shapes import Key, Linear, Site

Sides = tuple[int, int]  # d_out, d_in
Located = tuple[str, str | None, int]  # a path without its layer's integer, what is before that, and the integer


def resolve(linears: Iterable[Linear], architecture: Architecture | None) -> tuple[Site, ...]:
    """The sites of a model, matrix by matrix, each from its first layer to its last.

    Weights that the family knows have the family's roles, in its order. Every other one is named by its path: its expert is the
    integer behind a name such as ``experts``; its layer the first other integer in the path that differs between weights
    of otherwise equal paths and equal sides (or of any sides, or the first integer, or 0 if there is none); its matrix
    the path without these, cut to the shortest dotted ending that begins with a name, is no role's, and is no other
    matrix's ending. Where no family is known at all, the common names of linear modules are the roles that they mostly have
    (``specs/models/conventions``). A module that the family never calls is a parameter of the module that reads it.

    Raises:
        ModelError: a weight has other sides than its family's table says, or two have one role, layer and expert.
    """
    if architecture:
        used = (linear for linear in linears if not architecture.is_unused(linear.path))
        linears = [linear.read() if architecture.is_read(linear.path) else linear for linear in used]
    linears = list(linears)
    named = _names(linears, architecture)
    sites: dict[Key, Site] = {}
    known: set[str] = set()  # paths of weights whose parts are the family's
    for linear in linears:
        found = architecture and architecture.find(linear.path)
        if not found:
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


def _unknown(linear: Linear, name: Name, others: Container[Key]) -> list[Site]:
    """The sites of a weight that no family knows: one, or one for each expert."""
    experts: Iterable[int | None] = (name.expert,) if linear.experts is None else range(linear.experts)
    sites = [_site(linear, name.matrix, (name.stack, name.layer, expert), linear) for expert in experts]
    return [site if site.key not in others else replace(site, matrix=linear.name) for site in sites]


def _known(linear: Linear, found: tuple[str, int, Any], matrix: Matrix) -> list[Site]:
    """The sites of a role in a weight that the family knows: one, or one for each expert."""
    sides = linear.module_d_out, linear.d_in, linear.experts
    expected = matrix.module_d_out, matrix.d_in, matrix.experts
    if sides != expected:
        raise ModelError(
            f"`{linear.path}` is {_sides(*sides)} (d_out x d_in), "
            f"but by the model's config the module of `{matrix.role}` is {_sides(*expected)}"
        )
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


@dataclass(frozen=True)
class Name:
    """What a path says by itself."""

    matrix: str
    stack: str | None
    layer: int
    expert: int | None


def _names(linears: Iterable[Linear], architecture: Architecture | None) -> dict[str, Name]:
    """What the path of each weight says, among the others."""
    sides = {linear.name: (linear.d_out, linear.d_in) for linear in linears}
    experts = {path: _expert(path) for path in sides}
    located = _layers({rest: sides[path] for path, (rest, _) in experts.items()})
    if architecture is None:
        located = _with_roles(located, {experts[linear.name][0] for linear in linears if linear.is_module})
    matrices = architecture.matrices if architecture else ()
    roles = {ending for matrix in matrices for ending in _endings(matrix.role)}
    endings = {name: _endings(name) for name in {name for name, _, _ in located.values()}}
    count = Counter(ending for each in endings.values() for ending in each)
    short = {
        name: next((ending for ending in each if count[ending] == 1 and ending not in roles), name)
        for name, each in endings.items()
    }
    named = ((path, *located[rest], expert) for path, (rest, expert) in experts.items())
    return {path: Name(short[name], stack, layer, expert) for path, name, stack, layer, expert in named}


def _with_roles(located: Mapping[str, Located], linear: Container[str]) -> dict[str, Located]:
    """The same places, where inside the layers the last of a linear module's names is a role if it is a common one."""
    found = {}
    for path, (name, stack, layer) in located.items():
        before, dot, last = name.rpartition(".")
        known = stack is not None and path in linear and last in common_names()
        found[path] = (f"{before}{dot}{common_names()[last]}" if known else name, stack, layer)
    twice = {place for place, times in Counter(found.values()).items() if times > 1}
    return {path: located[path] if place in twice else place for path, place in found.items()}


@cache
def common_names() -> Mapping[str, str]:
    """The role that a linear module of a common name mostly has."""
    roles = read_yaml(data_folder("specs") / "models" / "conventions" / "roles.yaml")
    return {name: role for role, names in roles.items() for name in names}


def _expert(path: str) -> tuple[str, int | None]:
    """``mlp.experts.3.up`` -> ``mlp.experts.up``, 3."""
    parts = path.split(".")
    at = next((at for at, (before, part) in enumerate(pairwise(parts), 1) if _is_expert(before, part)), None)
    return (path, None) if at is None else (".".join([*parts[:at], *parts[at + 1 :]]), int(parts[at]))


def _is_expert(before: str, part: str) -> bool:
    return part.isdecimal() and before.lower().endswith("experts")


def _endings(name: str) -> list[str]:
    """``a.b.0`` -> ``b.0``, ``a.b.0``: the dotted endings that begin with a name, from the shortest."""
    parts = name.split(".")
    starts = (at for at in reversed(range(len(parts))) if at == 0 or not parts[at].isdecimal())
    return [".".join(parts[at:]) for at in starts]


def _layers(sides: Mapping[str, Sides]) -> dict[str, Located]:
    """Where each path is."""
    places = {path: _integers(path) for path in sides}
    of_shape = Counter((place.others, sides[path]) for path, found in places.items() for place in found)
    of_path = Counter(place.others for found in places.values() for place in found)
    located: dict[str, Located] = {}
    for path, found in places.items():
        alike = [place for place in found if of_shape[place.others, sides[path]] > 1]
        varying = [place for place in found if of_path[place.others] > 1]
        chosen = (alike or varying or found)[:1]
        # a bare nn.Sequential has paths that are integers alone
        located[path] = (
            (chosen[0].rest or "linear", chosen[0].before, chosen[0].number) if chosen else (path or "linear", None, 0)
        )
    return located


@dataclass(frozen=True)
class _Integer:
    """An integer of a path."""

    number: int
    before: str
    others: str  # the path with a hole there
    rest: str  # the path without it


def _integers(path: str) -> list[_Integer]:
    parts = path.split(".")
    found = []
    for at, part in enumerate(parts):
        if part.isdecimal():
            before, behind = parts[:at], parts[at + 1 :]
            others, rest = ".".join([*before, "*", *behind]), ".".join([*before, *behind])
            found.append(_Integer(int(part), ".".join(before), others, rest))
    return found
