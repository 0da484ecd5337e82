"""The weights of a model -> sites: each gets the name of its matrix and the number of its layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

from tensorpeft.language.errors import ModelError
from tensorpeft.network.architecture import Architecture, Matrix
from tensorpeft.network.shapes import Key, Linear, Site


def resolve(linears: Iterable[Linear], architecture: Architecture | None) -> tuple[Site, ...]:
    """The sites of a model, matrix by matrix, each from its first layer to its last.

    Weights that the family knows have the family's roles, in its order. Every other one is named by its path: its expert is the
    integer behind a name such as ``experts``, its layer the first other integer in the path that differs between weights
    of otherwise equal paths (the first integer if none does, 0 if there is none), its matrix the path without these, cut to the
    shortest dotted ending that begins with a name, is no role's, and is no other matrix's ending. A module that the
    family never calls is a parameter of the module that reads it.

    Raises:
        ModelError: a weight has other sides than its family's table says, or two have one role, layer and expert.
    """
    if architecture:
        used = (linear for linear in linears if not architecture.is_unused(linear.path))
        linears = [_read(linear) if architecture.is_read(linear.path) else linear for linear in used]
    linears = list(linears)
    named = _names([linear.name for linear in linears], architecture)
    sites: dict[Key, Site] = {}
    known: set[str] = set()  # paths of weights whose parts are the family's
    for linear in linears:
        found = architecture and architecture.find(linear.path)
        if not found:
            parts = _unknown(linear, *named[linear.name], sites)
        else:
            parts = [] if linear.path in known else [s for matrix in found[1] for s in _known(linear, found[0], matrix)]
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


def _read(linear: Linear) -> Linear:
    """A weight that is no module's to call, but is read by the module around it."""
    module, _, name = linear.module.rpartition(".")
    transposed = linear.kind == "embedding"
    return replace(linear, module=module, kind="parameter", parameter=f"{name}.weight", transposed=transposed)


def _unknown(linear: Linear, matrix: str, layer: int, expert: int | None, others: Container[Key]) -> list[Site]:
    """The sites of a weight that no family knows: one, or one for each expert."""
    experts: Iterable[int | None] = (expert,) if linear.experts is None else range(linear.experts)
    sites = [_site(linear, matrix, layer, each, linear) for each in experts]
    return [site if site.key not in others else replace(site, matrix=linear.name) for site in sites]


def _known(linear: Linear, layer: int, matrix: Matrix) -> list[Site]:
    """The sites of a role in a weight that the family knows: one, or one for each expert."""
    found = linear.module_d_out, linear.d_in, linear.experts
    expected = matrix.module_d_out, matrix.d_in, matrix.experts
    if found != expected:
        raise ModelError(
            f"`{linear.path}` is {_sides(*found)} (d_out x d_in), "
            f"but by the model's config the module of `{matrix.role}` is {_sides(*expected)}"
        )
    experts: Iterable[int | None] = (None,) if linear.experts is None else range(linear.experts)
    return [_site(linear, matrix.role, layer, each, matrix) for each in experts]


def _sides(d_out: int, d_in: int, experts: int | None) -> str:
    return f"{d_out} x {d_in}" if experts is None else f"{experts} of {d_out} x {d_in}"


def _site(linear: Linear, matrix: str, layer: int, expert: int | None, said: Linear | Matrix) -> Site:
    """The weight's own matter from the model, the matrix's from whoever knows it."""
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
    )


def _names(paths: Sequence[str], architecture: Architecture | None) -> dict[str, tuple[str, int, int | None]]:
    """For each path: the name of its matrix, the number of its layer and that of its expert, by the path alone."""
    experts = {path: _expert(path) for path in paths}
    located = _layers(list(dict.fromkeys(rest for rest, _ in experts.values())))
    matrices = architecture.matrices if architecture else ()
    roles = {ending for matrix in matrices for ending in _endings(matrix.role)}
    endings = {name: _endings(name) for name in {name for name, _ in located.values()}}
    count = Counter(ending for each in endings.values() for ending in each)
    short = {
        name: next((ending for ending in each if count[ending] == 1 and ending not in roles), name)
        for name, each in endings.items()
    }
    named = ((path, *located[rest], expert) for path, (rest, expert) in experts.items())
    return {path: (short[name], layer, expert) for path, name, layer, expert in named}


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


def _layers(modules: Sequence[str]) -> dict[str, tuple[str, int]]:
    """For each path: the path without its layer's integer, and that integer."""
    places = {module: _integers(module) for module in modules}
    siblings = Counter(rest for found in places.values() for _, rest, _ in found)
    located = {}
    for module, found in places.items():
        varying = [place for place in found if siblings[place[1]] > 1]
        number, _, name = (varying or found or [(0, "", module)])[0]
        located[module] = (name or "linear", number)  # a bare nn.Sequential has paths that are integers alone
    return located


def _integers(module: str) -> list[tuple[int, str, str]]:
    """Each integer of a path, with the path that has a hole there, and the path without it."""
    parts = module.split(".")
    return [
        (int(part), ".".join([*parts[:at], "*", *parts[at + 1 :]]), ".".join([*parts[:at], *parts[at + 1 :]]))
        for at, part in enumerate(parts)
        if part.isdecimal()
    ]
