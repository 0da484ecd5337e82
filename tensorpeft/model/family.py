"""A model family's table (``specs/models/families/<model_type>.yaml``) put to one config: its matrices and their sides.

A table is data. ``sizes`` and ``switches`` are rules over the config's keys (``model.config``), of which the sizes are
published; ``config`` gives keys that a config may lack. ``matrices`` say, for each role, which module holds it, its two
sides, which side the heads split and, for a part of a fused module, which rows; for a parameter that the module reads
by itself, its name, and over how many experts it goes. An entry may be several, ``for`` each of some values. ``reads``
lists the roles that read the very same tensor, ``uncalled`` modules whose weight is read by the module around them,
``unused`` those whose weight is tied to that of another, which the model uses instead. ``modules`` are those outside
the layers. These, ``norms`` (all normalisation layers), ``parameters`` (what is left), ``classes`` and ``uncounted``
(keys or switches) serve to count the parameters. A table that is ``like:`` another has all its entries, but for those
it gives itself; ``null`` takes an entry away.

A model of several stacks (encoder and decoder, two towers) has the stack, and the attention where there are two kinds,
in front of the role: ``encoder.query``, ``decoder.query``, ``decoder.cross.query``. Its matrices may give ``layers`` of
their own, and ``first``, the number of the first. A config inside the config is read with its name in front:
``text_config_hidden_size``, a list with each position behind it: ``depths_0``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from tensorpeft.language.errors import ModelError, did_you_mean, listing
from tensorpeft.model.config import MAX_SIZE, ConfigSizes
from tensorpeft.model.shape import Rows, distinct, is_named, weight_path
from tensorpeft.model.tables import FOLDER, read_table

MAX_LAYERS = 10_000


@dataclass(frozen=True, slots=True)
class Matrix:
    """A role, as every layer of one model has it."""

    role: str
    modules: tuple[str, ...]  # templates with `{layer}`; the first is the present name, others are former ones
    d_out: int
    d_in: int
    layers: range  # which layers have it
    bias: int  # 1 or 0
    kind: str = "linear"
    parameter: str | None = None
    experts: int | None = None
    transposed: bool = False
    heads: int | None = None
    head_side: str | None = None
    rows: Rows | None = None
    reads: str | None = None  # the first of the roles that read the very same tensor as this one
    inside: str = ""  # of one model among several inside another: its path, with a dot behind it

    @property
    def module_d_out(self) -> int:
        """The outputs of the whole module, of which this matrix may be a part."""
        return self.d_out if self.rows is None else self.rows.whole(self.d_out)


@dataclass(frozen=True)
class Architecture:
    """The layers of a model of a known family."""

    family: str
    sizes: tuple[tuple[str, int], ...]
    matrices: tuple[Matrix, ...]
    uncalled: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()

    @property
    def is_part(self) -> bool:
        """Whether it is of one or several models inside another one."""
        return all(matrix.inside for matrix in self.matrices)

    def find(self, path: str) -> tuple[str, int, tuple[Matrix, ...]] | None:
        """The stack, the layer and the matrices of a weight whose path ends as a template does; None where none fits."""
        for pattern, tails in self._patterns:
            found = pattern.fullmatch(path)
            if found and (matrices := tails.get(found[3])):
                return found[1], int(found[2]), matrices
        return None

    def is_read(self, path: str) -> bool:
        """Whether a module's weight is read, and the module never called."""
        return any(is_named(path, ending) for ending in self.uncalled)

    def is_unused(self, path: str) -> bool:
        """Whether a module does nothing."""
        return any(is_named(path, ending) for ending in self.unused)

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], dict[str, tuple[Matrix, ...]]], ...]:
        """For each text before `{layer}`: its pattern, and the matrices by the text after `{layer}`."""
        heads: dict[tuple[str, str], dict[str, tuple[Matrix, ...]]] = {}
        for matrix in self.matrices:
            for template in matrix.modules:
                head, tail = weight_path(template, matrix.parameter).split("{layer}")
                tails = heads.setdefault((re.escape(matrix.inside), re.escape(head[:-1])), {})
                tails[tail] = (*tails.get(tail, ()), matrix)
        return tuple(
            (re.compile(rf"({inside}(?:.*\.)?{head})\.(\d+)(.+)"), tails) for (inside, head), tails in heads.items()
        )


def together(models: Mapping[str, Architecture], *, named: bool) -> Architecture:
    """Models inside another, by their paths; where they are ``named``, each role and size has its model's name in front.

    The name is what a path has for itself: ``language_model`` and ``vision_tower`` of ``model.language_model`` and so on.
    """
    fronts = {path: f"{name}." if named else "" for path, name in distinct(models).items()}
    each = [(fronts[path], path, architecture) for path, architecture in models.items()]
    return Architecture(
        family=", ".join(dict.fromkeys(architecture.family for _, _, architecture in each)),
        sizes=tuple((front.replace(".", "_") + size, value) for front, _, a in each for size, value in a.sizes),
        matrices=tuple(
            replace(m, role=front + m.role, reads=m.reads and front + m.reads, inside=f"{path}.")
            for front, path, a in each
            for m in a.matrices
        ),
        uncalled=tuple(ending for _, _, a in each for ending in a.uncalled),
        unused=tuple(ending for _, _, a in each for ending in a.unused),
    )


@cache  # a scan asks at every module
def families() -> tuple[str, ...]:
    """The model types that have a table."""
    return tuple(sorted(path.stem for path in (FOLDER / "families").glob("*.yaml")))


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The layers that a config describes.

    Raises:
        ModelError: the model type has no table, or a key that the layers need is missing or makes no sense.
    """
    table, sizes = put(config)
    published = tuple((name, _sensible(name, sizes[name])) for name in table["sizes"])
    each = (pair for role, entry in table["matrices"].items() for pair in _each(role, entry))
    there = ((role, entry) for role, entry in each if sizes.value(entry.get("if", 1)))
    entries = {entry.get("role", role): entry for role, entry in there}
    reads = {role: together[0] for together in table.get("reads", ()) for role in together}
    matrices = tuple(_matrix(role, entry, sizes, reads.get(role)) for role, entry in entries.items())
    uncalled, unused = (tuple(table.get(key, ())) for key in ("uncalled", "unused"))
    return Architecture(config["model_type"], published, matrices, uncalled, unused)


def _each(role: str, entry: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The entries that one stands for: itself, or with ``for: {n: [0, 1]}`` one for each value, put where it says ``{n}``."""
    if "for" not in entry:
        yield role, entry
        return
    ((name, values),) = entry["for"].items()
    for value in values:
        yield _filled(role, name, value), _filled(entry, name, value)


def _filled(part: Any, name: str, value: object) -> Any:
    if isinstance(part, Mapping):
        return {key: _filled(inner, name, value) for key, inner in part.items()}
    if isinstance(part, list):
        return [_filled(inner, name, value) for inner in part]
    return part.replace(f"{{{name}}}", str(value)) if isinstance(part, str) else part


def put(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], ConfigSizes]:
    """The table of a config's model type, and its rules put to the config."""
    family = config.get("model_type")
    if family not in families():
        found = "the config has no `model_type`" if family is None else f"model type `{family}` is not known"
        raise ModelError(f"{found}, expected one of {listing(families(), 40)}{did_you_mean(str(family), families())}")
    table = _table(str(family))
    return table, ConfigSizes({**table["sizes"], **table["switches"]}, {**table.get("config", {}), **_flat(config)})


@cache
def _table(family: str) -> Mapping[str, Any]:
    table: Mapping[str, Any] = read_table(FOLDER / "families" / f"{family}.yaml", "family")
    return _over(_table(table["like"]), table) if "like" in table else table


def _over(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """A table's keys over those of the one it is like: mappings entry by entry, and ``null`` takes an entry away."""
    both = {**old, **new}
    for key, entries in both.items():
        if isinstance(entries, Mapping) and isinstance(old.get(key), Mapping):
            both[key] = {name: entry for name, entry in {**old[key], **entries}.items() if entry is not None}
    return both


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with what is inside its parts: ``text_config: {hidden_size: 8}`` gives ``text_config_hidden_size``."""
    flat: dict[str, Any] = {}
    for key, part in config.items():
        inside = part.items() if isinstance(part, Mapping) else enumerate(part) if isinstance(part, list) else ()
        flat |= {f"{key}_{inner}": value for inner, value in inside}
    return {**flat, **config}


def _sensible(name: str, size: int) -> int:
    most = MAX_LAYERS if name.endswith("layers") else MAX_SIZE
    if not 0 < size <= most:
        raise ModelError(f"`{name}` comes to {size}, expected 1 to {most}")
    return size


def _matrix(role: str, entry: Mapping[str, Any], sizes: ConfigSizes, reads: str | None) -> Matrix:
    d_out, d_in = sizes.value(entry["d_out"]), sizes.value(entry["d_in"])
    ((side, heads),) = entry["heads"].items() if "heads" in entry else ((None, None),)
    rows = {"count": d_out, **entry["rows"]} if "rows" in entry else None
    first, layers = sizes.value(entry.get("first", 0)), sizes.value(entry.get("layers", "layers"))
    return Matrix(
        role=role,
        modules=(entry["module"],) if isinstance(entry["module"], str) else tuple(entry["module"]),
        d_out=d_out,
        d_in=d_in,
        layers=range(first, first + _sensible("layers", layers)),
        bias=sizes.value(entry.get("bias", 0)),
        kind=entry.get("kind", "parameter" if "parameter" in entry else "linear"),
        parameter=entry.get("parameter"),
        experts=sizes.value(entry["experts"]) if "experts" in entry else None,
        transposed=entry.get("transposed", False),
        heads=sizes.value(heads) if heads else None,
        head_side=side,
        rows=Rows(**{key: sizes.value(rule) for key, rule in rows.items()}) if rows else None,
        reads=reads,
    )
