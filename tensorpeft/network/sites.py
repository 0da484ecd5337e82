"""Linear modules -> sites: each gets the name of its matrix and the number of its layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tensorpeft.language.errors import ModelError
from tensorpeft.network.architecture import Architecture, Matrix
from tensorpeft.network.shapes import Key, Linear, Site


def resolve(linears: Sequence[Linear], architecture: Architecture | None) -> tuple[Site, ...]:
    """The sites of a model, matrix by matrix, each from its first layer to its last.

    Modules that the family knows have the family's roles, in its order. Every other module is named by its path: its
    layer is the first integer in the path that differs between modules of otherwise equal paths (the first integer if
    none does, 0 if there is none), its matrix the path without that integer, cut to the shortest dotted ending that
    begins with a name, is no role, and is no other matrix's ending. A module that the model never calls is no site.

    Raises:
        ModelError: a module has other sides than its family's table says, or two modules have one role and layer.
    """
    named = _names([linear.module for linear in linears], architecture)
    sites: dict[Key, Site] = {}
    for linear in linears:
        found = architecture and architecture.find(linear.module)
        if found:
            layer, matrices = found
            parts = [_part(linear, layer, matrix) for matrix in matrices if matrix.called]
        else:
            matrix, layer = named[linear.module]
            key_is_free = (matrix, layer) not in sites
            parts = [Site(linear.module, matrix if key_is_free else linear.module, layer, linear.d_out, linear.d_in)]
        for site in parts:
            if site.key in sites:
                other = sites[site.key].module
                raise ModelError(f"`{other}` and `{site.module}` are both `{site.matrix}` of layer {site.layer}")
            sites[site.key] = site
    return in_order(sites.values(), [matrix.role for matrix in architecture.matrices] if architecture else ())


def in_order(sites: Iterable[Site], first: Iterable[str] = ()) -> tuple[Site, ...]:
    """Sites by matrix and layer: the matrices in the given order, then as they come."""
    sites = list(sites)
    rank = {matrix: at for at, matrix in enumerate(dict.fromkeys((*first, *(site.matrix for site in sites))))}
    return tuple(sorted(sites, key=lambda site: (rank[site.matrix], site.layer)))


def _part(linear: Linear, layer: int, matrix: Matrix) -> Site:
    found, expected = (linear.d_out, linear.d_in), (matrix.module_d_out, matrix.d_in)
    if found != expected:
        raise ModelError(
            f"`{linear.module}` is {found[0]} x {found[1]} (d_out x d_in), "
            f"but by the model's config the module of `{matrix.role}` is {expected[0]} x {expected[1]}"
        )
    sides = matrix.d_out, matrix.d_in
    heads = matrix.heads, matrix.head_side
    return Site(linear.module, matrix.role, layer, *sides, *heads, matrix.rows, reads=matrix.reads)


def _names(modules: Sequence[str], architecture: Architecture | None) -> dict[str, tuple[str, int]]:
    """For each module path: the name of its matrix and the number of its layer, by the path alone."""
    located = _layers(modules)
    roles = {matrix.role for matrix in architecture.matrices} if architecture else set()
    endings = {name: _endings(name) for name in {name for name, _ in located.values()}}
    count = Counter(ending for each in endings.values() for ending in each)
    short = {
        name: next((ending for ending in each if count[ending] == 1 and ending not in roles), name)
        for name, each in endings.items()
    }
    return {module: (short[name], layer) for module, (name, layer) in located.items()}


def _endings(name: str) -> list[str]:
    """``a.b.0`` -> ``b.0``, ``a.b.0``: the dotted endings that begin with a name, from the shortest."""
    parts = name.split(".")
    starts = (at for at in reversed(range(len(parts))) if at == 0 or not parts[at].isdecimal())
    return [".".join(parts[at:]) for at in starts]


def _layers(modules: Sequence[str]) -> dict[str, tuple[str, int]]:
    """For each module path: the path without its layer's integer, and that integer."""
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
