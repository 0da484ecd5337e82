"""The usual names of modules, and the roles that they stand for (``specs/models/conventions``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from typing import Any

from tensorpeft.model.tables import FOLDER, read_table

PARTS = ("query", "key", "value")  # what one fused weight may hold


def with_roles(layer: Iterable[str], modules: Collection[str]) -> dict[str, str]:
    """The names of a layer's weights of which common ones end in a role instead: ``self_attn.q_proj`` -> ``self_attn.query``.

    What is in front of a common name is its owner. One that has a query, or a weight that holds several of query, key and
    value, is an attention; one that has all the parts of an MLP is that; and the weight beside ``experts`` that chooses them is
    a router. All but a router are ``modules``: linear ones. Names that would then be the same stay as they are.
    """
    layer = list(layer)
    mixtures = {".".join(parts[: parts.index("experts")]) for name in layer if "experts" in (parts := name.split("."))}
    found = dict([*_routers(layer, mixtures), *_mlps(modules), *_attentions(modules)])
    times = Counter(found.get(name, name) for name in layer)
    return {name: new for name, new in found.items() if times[new] == 1}


def is_fused(matrix: str) -> bool:
    """Whether a matrix is called what several of query, key and value together mostly are."""
    return any(end in _table()["fused"] for _, end in _cuts(matrix))


@cache
def fused_layouts() -> list[dict[str, Any]]:
    """How classes cut fused weights: the ``order`` of parts, ``blocks``, and by the module's name the classes it is ``of``."""
    return list(read_table(FOLDER / "conventions" / "fused.yaml", "fused"))


def _attentions(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    roles = {name: role for role, names in _table()["attention"].items() for name in names}
    cuts = [(name, owner, end) for name in modules for owner, end in _cuts(name)]
    owners = {owner for _, owner, end in cuts if roles.get(end) == "query" or end in _table()["fused"]}
    found: dict[str, str] = {}
    for name, owner, end in cuts:
        if owner in owners and end in roles:
            found.setdefault(name, _joined(owner, roles[end]))  # of several the longest ending
    yield from found.items()


def _mlps(modules: Collection[str]) -> Iterator[tuple[str, str]]:
    found: dict[str, str] = {}
    for roles in _table()["mlp"]:
        first = next(iter(roles))
        for owner in [owner for name in modules for owner, end in _cuts(name) if end == first]:
            named = {_joined(owner, end): _joined(owner, role) for end, role in roles.items()}
            if all(name in modules and name not in found for name in named):
                found |= named
    yield from found.items()


def _routers(layer: Iterable[str], mixtures: Collection[str]) -> Iterator[tuple[str, str]]:
    roles = {name: role for role, names in _table()["mixture"].items() for name in names}
    for name in layer:
        for owner, end in _cuts(name):
            if owner in mixtures and end in roles:
                yield name, _joined(owner, roles[end])


def _joined(owner: str, name: str) -> str:
    return f"{owner}.{name}".removeprefix(".")


def _cuts(name: str) -> list[tuple[str, str]]:
    """``a.b.c`` -> (``""``, ``a.b.c``), (``a``, ``b.c``), (``a.b``, ``c``): the longest ending first."""
    parts = name.split(".")
    return [(".".join(parts[:at]), ".".join(parts[at:])) for at in range(len(parts))]


@cache
def _table() -> dict[str, Any]:
    return dict(read_table(FOLDER / "conventions" / "roles.yaml", "roles"))
