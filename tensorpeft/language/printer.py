"""Spec -> its canonical YAML text: what ``expand`` prints and what a checkpoint stores.

The same spec gives the same text, which loads back to an equal spec. Everything that has a value is written, defaults
included, so that a stored text keeps its meaning if a default should change.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import groupby

from tensorpeft.language.keywords import BUDGET, INPUT
from tensorpeft.language.spec import FactorRule, Heads, MaskRule, Spec, Target
from tensorpeft.language.syntax import EVERYWHERE, Choice, Expression, Number

_BARE = re.compile(r"[A-Za-z][A-Za-z0-9_ .,()\[\]*/+=-]*")  # needs no quotes between the keys of a block
_BARE_IN_LIST = re.compile(r"[A-Za-z][A-Za-z0-9_ .()*/+=-]*")
_OTHER_MEANING = re.compile(r"(?i)true|false|null|yes|no|on|off|y|n|.*\s")


def spec_text(spec: Spec) -> str:
    """The spec in its written-out form."""
    return "\n".join(_lines(spec)) + "\n"


def _lines(spec: Spec) -> Iterator[str]:
    yield "tensorpeft: 1"
    yield f"name: {_quoted(spec.name)}"
    yield from _target(spec.target)
    if spec.modes:
        yield f"modes: {_list(map(str, spec.modes))}"
    if spec.ranks or spec.budget is not None:
        budget = [] if spec.budget is None else [(BUDGET, str(spec.budget))]
        yield f"rank: {_mapping([*((_quoted(bond), _size(size)) for bond, size in spec.ranks), *budget])}"
    yield from _update(spec)
    if spec.masks:
        yield "mask:"
        yield from _masks(spec.masks)
    if spec.alpha is not None:
        yield f"alpha: {_number(spec.alpha)}"
    yield f"scale: {_size(spec.scale, _BARE)}"
    yield f"ragged: {_each(spec.ragged, '*')}"
    yield from _heads(spec.heads)
    if spec.tasks is not None:
        yield f"tasks: {spec.tasks}"
    if spec.dropout:
        yield f"dropout: {_each(((name, _number(value)) for name, value in spec.dropout), INPUT)}"
    if spec.train:
        yield f"train: {_list(spec.train)}"
    if spec.scores is not None:
        yield f"scores: {_quoted(spec.scores)}"
    yield f"seed: {spec.seed}"
    yield f"start: {spec.start}"


def _target(target: Target) -> Iterator[str]:
    yield "target:"
    yield f"  matrices: {_list(target.matrices)}"
    if target.exclude:
        yield f"  exclude: {_list(target.exclude)}"
    if target.layers is not None:
        yield f"  layers: [{', '.join(map(str, target.layers))}]"


def _update(spec: Spec) -> Iterator[str]:
    entries = spec.update.entries
    if entries.keys() == {EVERYWHERE}:
        yield f"update: {_quoted(str(spec.update))}"
    elif entries:
        yield "update:"
        yield from (f"  {_quoted(str(at))}: {_quoted(str(update))}" for at, update in entries.items())
    if spec.factors:
        yield "factors:"
        yield from (f"  {_quoted(name)}: {_rule(rule)}" for name, rule in spec.factors)


def _masks(masks: Iterable[MaskRule]) -> Iterator[str]:
    for (factor, modes), group in groupby(masks, key=lambda mask: (mask.factor, mask.modes)):
        rules = [(mask.at, _quoted(str(mask.rule))) for mask in group]
        key = f"  {factor}[{', '.join(modes)}]:"
        if [at for at, _ in rules] == [EVERYWHERE]:
            yield f"{key} {rules[0][1]}"
        else:
            yield key
            yield from (f"    {_quoted(str(at))}: {rule}" for at, rule in rules)


def _heads(heads: Heads) -> Iterator[str]:
    if heads.side or heads.count:
        yield "heads:"
    for key, values in (("side", heads.side), ("count", heads.count)):
        if values:
            yield f"  {key}: {_each(((name, str(value)) for name, value in values), '*')}"


def _rule(rule: FactorRule) -> str:
    said = [("norm", "true")] if rule.norm else [("init", _quoted(str(rule.init), _BARE_IN_LIST))]
    said += [(key, "true") for key, value in (("frozen", rule.frozen), ("stored", rule.stored)) if value]
    if rule.lr != 1:
        said.append(("lr", _number(rule.lr)))
    return _mapping(said)


def _size(size: Expression, bare: re.Pattern[str] = _BARE_IN_LIST) -> str:
    if isinstance(size, Choice):
        return _mapping((_quoted(str(at), _BARE_IN_LIST), _size(value)) for at, value in size.entries)
    return _number(size.value) if isinstance(size, Number) else _quoted(str(size), bare)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) and abs(value) < 1e15 else repr(value)


def _each(items: Iterable[tuple[str, str]], single: str) -> str:
    """Values by their names; the value alone where ``single`` is the only one that has a value."""
    items = list(items)
    return items[0][1] if [name for name, _ in items] == [single] else _mapping((_quoted(k), v) for k, v in items)


def _mapping(items: Iterable[tuple[str, str]]) -> str:
    return "{" + ", ".join(f"{key}: {value}" for key, value in items) + "}"


def _list(texts: Iterable[str]) -> str:
    return "[" + ", ".join(_quoted(text, _BARE_IN_LIST) for text in texts) + "]"


def _quoted(text: str, bare: re.Pattern[str] = _BARE) -> str:
    """A text for YAML, in quotes only where it would read as something else."""
    if bare.fullmatch(text) and not _OTHER_MEANING.fullmatch(text):
        return text
    return "'" + text.replace("'", "''") + "'"
