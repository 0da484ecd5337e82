"""Names from paths, where no family's table knows a weight: its stack, layer and expert, and the name of its matrix."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from tensorpeft.model.family import Architecture
from tensorpeft.model.roles import with_roles
from tensorpeft.model.shape import Linear, distinct

Sides = tuple[int, int]  # d_out, d_in


@dataclass(frozen=True)
class SiteName:
    """A site's matrix and place, as its path tells them."""

    matrix: str
    stack: str | None
    layer: int
    expert: int | None


def names(linears: Iterable[Linear], architecture: Architecture | None) -> dict[str, SiteName]:
    """The names of weights by their paths; one path alone says little, so all are compared.

    Its expert is the integer behind a name such as ``experts``; its layer the first other integer in the path that differs
    between weights of otherwise equal paths and equal sides (or of any sides, or the first integer that is not the path's end,
    or 0 if there is none); its stack is what is before that integer. Its matrix is the path without these, where common names
    of modules inside the layers, or of a model without layers, are the roles that they mostly have (`model.roles`),
    unless a family knows the whole model. It is cut to the shortest dotted ending that begins with a name, is no role of the
    family's, and is no other matrix's ending; or where others of its stack lack a shorter one, to that, with the stack in front:
    ``encoder.query``.
    """
    linears = list(linears)
    sides = {linear.name: (linear.d_out, linear.d_in) for linear in linears}
    experts = {path: _expert(path) for path in sides}
    places = _places({rest: sides[path] for path, (rest, _) in experts.items()})
    if architecture is None or architecture.is_part:
        unknown = [linear for linear in linears if not (architecture and architecture.find(linear.path))]
        has_layers = any(place.stack is not None for place in places.values())
        modules = {experts[linear.name][0] for linear in unknown if linear.is_module}
        places = _with_roles(places, modules, everywhere=not has_layers)
    matrices = architecture.matrices if architecture else ()
    short = _short(set(places.values()), {ending for matrix in matrices for ending in _endings(matrix.role)})
    found = {path: (places[rest], expert) for path, (rest, expert) in experts.items()}
    return {path: SiteName(short[place], place.stack, place.layer, expert) for path, (place, expert) in found.items()}


def has_roles(linears: Iterable[Linear]) -> bool:
    """Whether common names give any of some weights inside the layers a role."""
    linears = list(linears)
    places = _places({_expert(linear.name)[0]: (linear.d_out, linear.d_in) for linear in linears})
    modules = {_expert(linear.name)[0] for linear in linears if linear.is_module}
    return _with_roles(places, modules, everywhere=False) != places


@dataclass(frozen=True)
class _LayerPath:
    """Where a weight is: its stack and layer, and its path without the layer's integer."""

    stack: str | None
    layer: int
    path: str

    @property
    def inner(self) -> str:
        """The path within the layer; of a layer that is the weight itself, the stack's own name."""
        inner = self.path.removeprefix(f"{self.stack}.") if self.stack else self.path
        return inner if inner != self.stack else inner.rpartition(".")[2]


def _with_roles(
    places: Mapping[str, _LayerPath], modules: Collection[str], *, everywhere: bool
) -> dict[str, _LayerPath]:
    """The same places, with roles for names inside the layers, or everywhere."""
    layers: dict[tuple[str | None, int], list[str]] = defaultdict(list)
    for place in places.values():
        if place.stack is not None or everywhere:
            layers[place.stack, place.layer].append(place.path)
    linear = {places[path].path for path in modules}
    roles = {layer: with_roles(paths, linear.intersection(paths)) for layer, paths in layers.items()}
    renamed = {path: roles.get((place.stack, place.layer), {}) for path, place in places.items()}
    found = {path: replace(place, path=renamed[path].get(place.path, place.path)) for path, place in places.items()}
    kept = {place.path for path, place in places.items() if found[path] == place}
    return {path: places[path] if place.path in kept else place for path, place in found.items()}


def _expert(path: str) -> tuple[str, int | None]:
    """``mlp.experts.3.up`` -> ``mlp.experts.up``, 3."""
    parts = path.split(".")
    behind = (at for at, before in enumerate(parts[:-1], 1) if before.lower().endswith("experts"))
    at = next((at for at in behind if parts[at].isdecimal()), None)
    return (path, None) if at is None else (".".join([*parts[:at], *parts[at + 1 :]]), int(parts[at]))


def _endings(name: str) -> list[str]:
    """``a.b.0`` -> ``b.0``, ``a.b.0``: the dotted endings that begin with a name, from the shortest."""
    parts = name.split(".")
    starts = (at for at in reversed(range(len(parts))) if at == 0 or not parts[at].isdecimal())
    return [".".join(parts[at:]) for at in starts]


def _short(places: Iterable[_LayerPath], roles: Collection[str]) -> dict[_LayerPath, str]:
    """The name of each place's matrix: one for all the layers of a stack."""
    places = list(places)
    matrices = {(place.stack, place.path): place.inner for place in places}
    paths = Counter(ending for _, path in matrices for ending in _endings(path))
    inner = Counter((stack, ending) for (stack, _), name in matrices.items() for ending in _endings(name))
    labels = _labels({stack for stack, _ in matrices if stack})

    def named(stack: str | None, path: str, name: str) -> Iterator[str]:
        """The names that would do, the best first. Of experts it is told that they are."""
        for ending in [e for e in _endings(name) if "experts" not in name.removesuffix(e).split(".")] + _endings(path):
            if paths[ending] == 1 and ending not in roles:
                yield ending
            if inner[stack, ending] == 1 and stack in labels:
                yield f"{labels[stack]}.{ending}"

    first = {matrix: next(named(*matrix, name), matrix[1]) for matrix, name in matrices.items()}
    times = Counter(first.values())
    unique = {matrix: name if times[name] == 1 else matrix[1] for matrix, name in first.items()}
    return {place: unique[place.stack, place.path] for place in places}


def _labels(stacks: Collection[str]) -> dict[str, str]:
    """The part of each stack's path that the others do not share, from a name on: ``stages.0`` beside ``stages.1``.

    The name of its list of layers is no part of that where it needs not be: ``encoder`` for ``encoder.layers``.
    """
    if len(stacks) < 2:
        return {}
    owners = {stack: stack.rpartition(".")[0] for stack in stacks}
    times = Counter(owners.values())
    named = {stack: owner if owner and times[owner] == 1 else stack for stack, owner in owners.items()}
    own = distinct(named.values())
    return {stack: _from_a_name(name, own[name]) for stack, name in named.items()}


def _from_a_name(path: str, label: str) -> str:
    """A part of a path, with what is before it as far as it begins with a number."""
    before = path[: f".{path}.".rfind(f".{label}.")].strip(".").split(".")
    while label[0].isdecimal() and before[-1:] > [""]:
        label = f"{before.pop()}.{label}"
    return label


def _places(sides: Mapping[str, Sides]) -> dict[str, _LayerPath]:
    """Where each path is."""
    integers = {path: _integers(path) for path in sides}
    of_shape = Counter((place.others, sides[path]) for path, found in integers.items() for place in found)
    of_path = Counter(place.others for found in integers.values() for place in found)
    places: dict[str, _LayerPath] = {}
    for path, found in integers.items():
        alike = [place for place in found if of_shape[place.others, sides[path]] > 1]
        holding = [place for place in found if not place.is_last or not place.before]
        varying = [place for place in holding if of_path[place.others] > 1]
        chosen = next(iter(alike or varying or holding), None)
        before, number, rest = (chosen.before, chosen.number, chosen.rest) if chosen else (None, 0, path)
        places[path] = _LayerPath(before, number, rest or "linear")  # nn.Sequential has paths that are integers alone
    return places


@dataclass(frozen=True)
class _Integer:
    """An integer of a path."""

    number: int
    before: str
    others: str  # the path with a hole there
    rest: str  # the path without it
    is_last: bool  # whether the weight is in no layer of several, but one of a list itself


def _integers(path: str) -> list[_Integer]:
    parts = path.split(".")
    found = [(int(part), parts[:at], parts[at + 1 :]) for at, part in enumerate(parts) if part.isdecimal()]
    return [
        _Integer(number, ".".join(before), ".".join([*before, "*", *behind]), ".".join(before + behind), not behind)
        for number, before, behind in found
    ]
