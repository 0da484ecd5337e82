"""A model family's table (``specs/models/families/<model_type>.yaml``) put to one config: its matrices and their sides.

A table is data. ``sizes`` and ``switches`` are rules over the config's keys (`network.sizes`), of which the sizes are
published; ``config`` gives keys that a config may lack. ``matrices`` say, for each role, which module holds it, its two
sides, which side the heads split and, for a part of a fused module, which rows. ``reads`` lists the roles that read the
very same tensor. ``linears`` are the modules outside the layers; these, ``parameters``, ``classes`` and ``uncounted``
(keys or switches) serve to count the parameters.
A table that is ``like:`` another has all its keys, but for those it gives itself.

A model of several stacks (encoder and decoder, two towers) has the stack, and the attention where there are two kinds,
in front of the role: ``encoder.query``, ``decoder.query``, ``decoder.cross.query``. Its matrices may give ``layers`` of
their own. A config inside the config is read with its name in front: ``text_config_hidden_size``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from tensorpeft.language.catalogue import data_folder
from tensorpeft.language.errors import ModelError, did_you_mean, listing
from tensorpeft.network.shapes import Rows
from tensorpeft.network.sizes import MAX_SIZE, Sizes

MAX_LAYERS = 10_000


@dataclass(frozen=True, slots=True)
class Matrix:
    """A role, as every layer of one model has it."""

    role: str
    modules: tuple[str, ...]  # templates with `{layer}`; the first is the present name, others are former ones
    d_out: int
    d_in: int
    layers: int  # how many layers have it
    n_parameters: int  # of the weight and, where there is one, the bias
    called: bool = True  # else the model reads the weight itself: an update of the module's output would have no effect
    heads: int | None = None
    head_side: str | None = None
    rows: Rows | None = None
    reads: str | None = None  # the first of the roles that read the very same tensor as this one

    @property
    def module_d_out(self) -> int:
        """The outputs of the whole module, of which this matrix may be a part."""
        return self.d_out if self.rows is None else self.d_out // self.rows.count * self.rows.period


@dataclass(frozen=True)
class Architecture:
    """The layers of a model of a known family."""

    family: str
    sizes: tuple[tuple[str, int], ...]
    matrices: tuple[Matrix, ...]

    def find(self, module: str) -> tuple[int, tuple[Matrix, ...]] | None:
        """The layer and the matrices of a module whose path ends as a template does; None where none fits."""
        for pattern, tails in self._patterns:
            found = pattern.fullmatch(module)
            if found and (matrices := tails.get(found[2])):
                return int(found[1]), matrices
        return None

    @cached_property
    def _patterns(self) -> tuple[tuple[re.Pattern[str], dict[str, tuple[Matrix, ...]]], ...]:
        """For each text before `{layer}`: its pattern, and the matrices by the text after `{layer}`."""
        heads: dict[str, dict[str, tuple[Matrix, ...]]] = {}
        for matrix in self.matrices:
            for template in matrix.modules:
                head, tail = template.split("{layer}")
                tails = heads.setdefault(head, {})
                tails[tail] = (*tails.get(tail, ()), matrix)
        return tuple((re.compile(rf"(?:.*\.)?{re.escape(head)}(\d+)(.+)"), tails) for head, tails in heads.items())


def families() -> tuple[str, ...]:
    """The model types that have a table."""
    return tuple(sorted(path.stem for path in (data_folder("specs") / "models" / "families").glob("*.yaml")))


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The layers that a config describes.

    Raises:
        ModelError: the model type has no table, or a key that the layers need is missing or makes no sense.
    """
    table, sizes = put(config)
    published = tuple((name, _sensible(name, sizes[name])) for name in table["sizes"])
    entries = {role: entry for role, entry in table["matrices"].items() if sizes.value(entry.get("if", 1))}
    reads = {role: together[0] for together in table.get("reads", ()) for role in together}
    matrices = tuple(_matrix(role, entry, sizes, reads.get(role)) for role, entry in entries.items())
    return Architecture(config["model_type"], published, matrices)


def put(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Sizes]:
    """The table of a config's model type, and its rules put to the config."""
    family = config.get("model_type")
    if family not in families():
        found = "the config has no `model_type`" if family is None else f"model type `{family}` is not known"
        raise ModelError(f"{found}, expected one of {listing(families(), 40)}{did_you_mean(str(family), families())}")
    table = _table(str(family))
    return table, Sizes({**table["sizes"], **table["switches"]}, {**table.get("config", {}), **_flat(config)})


def read_yaml(path: Path) -> dict[str, Any]:
    """A table or a card: files that ship with the package."""
    table: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return table


@cache
def _table(family: str) -> Mapping[str, Any]:
    table = read_yaml(data_folder("specs") / "models" / "families" / f"{family}.yaml")
    return {**_table(table["like"]), **table} if "like" in table else table


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with the keys of the configs inside it: ``text_config: {hidden_size: 8}`` gives ``text_config_hidden_size``."""
    inside = {key: part for key, part in config.items() if isinstance(part, Mapping)}
    return {**{f"{key}_{inner}": value for key, part in inside.items() for inner, value in part.items()}, **config}


def _sensible(name: str, size: int) -> int:
    most = MAX_LAYERS if name.endswith("layers") else MAX_SIZE
    if not 0 < size <= most:
        raise ModelError(f"`{name}` comes to {size}, expected 1 to {most}")
    return size


def _matrix(role: str, entry: Mapping[str, Any], sizes: Sizes, reads: str | None) -> Matrix:
    d_out, d_in = sizes.value(entry["d_out"]), sizes.value(entry["d_in"])
    ((side, heads),) = entry["heads"].items() if "heads" in entry else ((None, None),)
    rows = {"count": d_out, **entry["rows"]} if "rows" in entry else None
    return Matrix(
        role=role,
        modules=(entry["module"],) if isinstance(entry["module"], str) else tuple(entry["module"]),
        d_out=d_out,
        d_in=d_in,
        layers=_sensible("layers", sizes.value(entry.get("layers", "layers"))),
        n_parameters=d_out * (d_in + sizes.value(entry.get("bias", 0))),
        called=entry.get("called", True),
        heads=sizes.value(heads) if heads else None,
        head_side=side,
        rows=Rows(**{key: sizes.value(rule) for key, rule in rows.items()}) if rows else None,
        reads=reads,
    )
