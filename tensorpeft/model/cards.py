"""Model cards and configs -> ModelShape, without torch."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tensorpeft.language.errors import ModelError, did_you_mean, listing
from tensorpeft.model.config import ConfigSizes
from tensorpeft.model.family import Architecture, architecture, put
from tensorpeft.model.shape import Linear, ModelShape, Parameter
from tensorpeft.model.sites import resolve
from tensorpeft.model.tables import FOLDER, read_table

MAX_BYTES = 4 * 2**20  # of a config.json


@cache
def cards() -> tuple[str, ...]:
    """The names of the model cards that ship."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def model_shape(model: str | Path | Mapping[str, Any]) -> ModelShape:
    """The shape of a model given as a card's name, a ``config.json`` (or the folder that has one), or a config's dict.

    A card is a config too, of the keys that matter for sizes. ``n_parameters`` counts the class that the config names
    under ``architectures``, or the family's first where that one is not in the table; ``model_class`` says which.

    Raises:
        ModelError: there is no such card or file, its family is unknown, or a key is missing or makes no sense.
    """
    if isinstance(model, Mapping):
        return _shape(str(model.get("_name_or_path") or model.get("model_type")), model, "config")
    if isinstance(model, str) and model in cards():
        path = FOLDER / f"{model}.yaml"
        card = read_table(path, "card")
        _refuse_unread(card, path.name)
        return _shape(model, card, path.name)
    file = _config_file(Path(model))
    if file is None:
        known = f"the cards are {listing(cards(), 40)}{did_you_mean(str(model), cards())}"
        raise ModelError(f"`{model}` is neither a model card nor a config file; {known}")
    return _shape(file.resolve().parent.name, _read(file), str(file))


def _refuse_unread(card: Mapping[str, Any], where: str) -> None:
    """A config may have any key, but a card has those that count."""
    table, sizes = put(card)
    known = {"model_type", "architectures", *table.get("uncounted", ()), *sizes.config_keys}
    if wrong := next((key for key in card if key not in known), None):
        hint = did_you_mean(wrong, known - {*card})
        raise ModelError(f"{where}: the table of `{card['model_type']}` reads no key `{wrong}`{hint}")


def _config_file(path: Path) -> Path | None:
    try:
        path = path / "config.json" if path.is_dir() else path
        return path if path.is_file() else None
    except OSError:  # a name too long for the file system
        return None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        config = json.loads(text) if len(text) <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError) as reason:
        raise ModelError(f"{path}: this is not JSON: {reason}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object of at most {MAX_BYTES // 2**20} MiB")
    return config


def _shape(name: str, config: Mapping[str, Any], where: str) -> ModelShape:
    try:
        known = architecture(config)
        table, sizes = put(config)
        _refuse_uncounted(table, config, sizes)
        classes = _classes(table)
        # the class that the config names, else the table's first
        named = config.get("architectures")
        first = str(named[0]) if isinstance(named, list) and named else ""
        model_class = first if first in classes else next(iter(classes))
        added = classes[model_class]  # what it has outside the layers
        is_body = model_class.startswith(f"{table['stem']}Model")
        prefix = added.get("prefix", "" if is_body else table.get("prefix", ""))
        start = f"{prefix}." if prefix else ""
        weights = [*_inside(known, start), *_outside(table, added, start, sizes)]
        parameters = *_parameters(weights), *_others(table, "", sizes), *_others(added, "head.", sizes)
        return ModelShape(
            name=name,
            sites=resolve([weight.linear for weight in weights], known),
            sizes=known.sizes,
            n_parameters=sum(parameter.count for parameter in parameters),
            family=known.family,
            model_class=model_class,
            parameters=parameters,
        )
    except ModelError as reason:
        raise ModelError(f"{where}: {reason}") from None


def head_modules(config: Mapping[str, Any], model_class: str) -> tuple[str, ...]:
    """The modules that a class has beside its body, which make its output; none where the table does not know the class."""
    added = _classes(put(config)[0]).get(model_class, {})
    return tuple(path for path in added.get("modules", ()) if not path.startswith("."))


def _classes(table: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The classes of a family's table, each with what it has outside the layers."""
    return {table["stem"] + ending: added for ending, added in table["classes"].items()}


def _refuse_uncounted(table: Mapping[str, Any], config: Mapping[str, Any], sizes: ConfigSizes) -> None:
    for key in table.get("uncounted", ()):
        if sizes[key] if key in table["switches"] else config.get(key):
            raise ModelError(f"`{key}` adds parameters that the table of `{config['model_type']}` does not count")


@dataclass(frozen=True)
class _Weight:
    """A weight, with or without a bias, that counts as a parameter unless it is tied to another."""

    linear: Linear
    bias: int
    tied: int = 0
    kinds: frozenset[str] = frozenset()

    @property
    def n_weights(self) -> int:
        return self.linear.module_d_out * self.linear.d_in * (self.linear.experts or 1)

    @property
    def parameters(self) -> Iterator[Parameter]:
        is_module = self.linear.parameter in (None, "weight")
        weight, bias = (".weight", ".bias") if is_module else ("", "_bias")
        if not self.tied:
            yield Parameter(self.linear.path + weight, self.n_weights, self.kinds)
        if self.bias:
            count = self.linear.module_d_out * self.bias * (self.linear.experts or 1)
            yield Parameter(self.linear.path + bias, count, self.kinds | {"biases"})


def _parameters(weights: Iterable[_Weight]) -> Iterator[Parameter]:
    """All parameters of the weights; one that is tied has the kinds of all that share it."""
    tied: dict[int, frozenset[str]] = defaultdict(frozenset)
    for weight in weights:
        if weight.tied:
            tied[weight.n_weights] |= weight.kinds
    for weight in weights:
        for parameter in weight.parameters:
            # a table does not say which weight another is tied to; one of the same size outside the layers is meant
            is_shared = not weight.tied and parameter.count in tied and weight.linear.kind != "linear"
            yield replace(parameter, kinds=parameter.kinds | tied[parameter.count]) if is_shared else parameter


def _inside(known: Architecture, start: str) -> Iterable[_Weight]:
    """The weights in the layers, by their present names; the parts of a fused one are one."""
    found: dict[str, _Weight] = {}
    for matrix in known.matrices:
        for layer in matrix.layers:
            module = start + matrix.modules[0].format(layer=layer)
            weight = Linear(module, matrix.module_d_out, matrix.d_in, matrix.kind, matrix.parameter)
            linear = replace(weight, experts=matrix.experts, transposed=matrix.transposed)
            found.setdefault(linear.path, _Weight(linear, matrix.bias))
    return found.values()


def _outside(table: Mapping[str, Any], added: Mapping[str, Any], start: str, sizes: ConfigSizes) -> Iterator[_Weight]:
    """The weights outside the layers: those of the body, then those of the class, of which a dot in front says the body's."""
    entries = {f".{module}": entry for module, entry in table.get("modules", {}).items()} | added.get("modules", {})
    for path, entry in entries.items():
        if not sizes.value(entry.get("if", 1)):
            continue
        d_out, d_in, tied, bias = (sizes.value(entry.get(key, 0)) for key in ("d_out", "d_in", "tied", "bias"))
        in_body = path.startswith(".")
        module = start + path[1:] if in_body else path
        kind, parameter = entry.get("kind", "linear"), entry.get("parameter")
        linear = Linear(module, d_out, d_in, kind, parameter, transposed=bool(entry.get("transposed")))
        yield _Weight(linear, bias, tied, frozenset() if in_body else frozenset({"head"}))


_OTHERS = {  # a table's key -> the name of what it counts, and the words of `train:` that mean it
    "norms": ("norms.weight", {"norms"}),  # with their biases, which are counted apart
    "norm_biases": ("norms.bias", {"norms", "biases"}),
    "parameters": ("others.weight", set[str]()),
    "biases": ("others.bias", {"biases"}),
}


def _others(entries: Mapping[str, Any], where: str, sizes: ConfigSizes) -> Iterator[Parameter]:
    """Parameters that are no site's, of the body or of the head: all norms, all others, and the biases of each."""
    counts = {key: sizes.value(entries.get(key, 0)) for key in _OTHERS}
    counts["norms"] -= counts["norm_biases"]
    for key, (name, kinds) in _OTHERS.items():
        if counts[key]:
            yield Parameter(where + name, counts[key], frozenset({*kinds, *({"head"} if where else ())}))
