"""A spec: what a YAML file means, before any model is known, and its canonical text.

``str(spec)`` is what ``expand`` prints and what a checkpoint stores. The same spec gives the same text, which loads back to an
equal spec. Everything that has a value is written, defaults included, so that a stored text keeps its meaning if a default
should change.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from tensorpeft.language.source import Source, Span
from tensorpeft.language.syntax import (
    EVERYWHERE,
    Call,
    Choice,
    Definition,
    Expression,
    Initialiser,
    Number,
    Selector,
    Update,
)

SITE_MODES: tuple[str, ...] = ("matrix", "layer", "expert")  # bound when the adapter is attached
STRUCTURAL_MODES = ("head", "head_dim", "width")  # the two sides of an attention matrix, by its heads
SIDES = ("d_out", "d_in")
BASE_WEIGHT = "W"
BUDGET = "budget"  # among the bonds of `rank`: how many numbers are trained at most
INPUT = "x"  # of a site, for `dropout`


@dataclass(frozen=True)
class Target:
    """Which sites: roles, module suffixes, globs or patterns, or ``all-linear``."""

    matrices: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    spans: tuple[Span, ...] = field(default=(), compare=False, repr=False)  # one per entry of these three, in order

    def span(self, entry: str | int) -> Span | None:
        """The span of an entry of ``matrices``, ``exclude`` or ``layers``."""
        entries: tuple[str | int, ...] = (*self.matrices, *self.exclude, *(self.layers or ()))
        return dict(zip(entries, self.spans, strict=False)).get(entry)


@dataclass(frozen=True)
class Heads:
    """Which side of a matrix its heads split, and how many they are, where the model does not say so.

    Each is a pair of (matrix, value) tuples; the matrix ``*`` stands for every other one.
    """

    side: tuple[tuple[str, str], ...] = ()
    count: tuple[tuple[str, int], ...] = ()
    spans: tuple[Span, ...] = field(default=(), compare=False, repr=False)  # one per entry of side, then of count

    def span(self, key: str, matrix: str) -> Span | None:
        """The span of a matrix's entry under ``side`` or ``count``."""
        entries = [*(("side", name) for name, _ in self.side), *(("count", name) for name, _ in self.count)]
        return dict(zip(entries, self.spans, strict=False)).get((key, matrix))


@dataclass(frozen=True)
class FactorRule:
    """The entry of one factor under ``factors:``."""

    init: Initialiser
    frozen: bool = False
    stored: bool = False  # a frozen factor that the checkpoint holds, rather than its seed
    lr: float = 1.0  # multiplies the learning rate
    norm: bool = False  # a magnitude: it is divided by the norms of W + dW, from which it starts
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class MaskRule:
    """Which indices of a mode of a factor exist: ``B[d_out]: bernoulli(0.13)``; with several modes, which of its entries.

    Of the rules for the same modes of a factor, the last whose selector fits a site counts.
    """

    factor: str
    modes: tuple[str, ...]
    rule: Call
    at: Selector = EVERYWHERE
    span: Span | None = field(default=None, compare=False, repr=False)

    @property
    def mode(self) -> str:
        """The mode, of a rule for one."""
        return self.modes[0]


@dataclass(frozen=True)
class Spec:
    """A method, written out: its update, and what the update's names stand for.

    A spec given as ``structure:`` is expanded on loading, so that everything downstream sees this form alone.
    """

    name: str
    target: Target
    update: Update
    factors: tuple[tuple[str, FactorRule], ...]  # one per factor of the update, in its order, W left out
    ranks: tuple[tuple[str, Expression], ...] = ()
    modes: tuple[Definition, ...] = ()
    masks: tuple[MaskRule, ...] = ()
    alpha: float | None = None
    scale: Expression = Number(1)
    ragged: tuple[tuple[str, str], ...] = (("*", "by_size"),)  # mode -> by_size | slice | group | error; `*`: the rest
    heads: Heads = Heads()
    tasks: int | None = None
    budget: int | None = None  # trained numbers at most: the bonds of `free` get the largest size that fits
    budget_span: Span | None = field(default=None, compare=False, repr=False)
    free: tuple[str, ...] = ()
    dropout: tuple[tuple[str, float], ...] = ()  # `x` (the input of every site) or a bond -> probability
    train: tuple[str, ...] = ()  # parameters of the base trained beside dW: `biases`, `norms`, `head`, or patterns
    train_spans: tuple[Span, ...] = field(default=(), compare=False, repr=False)  # one per entry of `train`
    scores: str | None = None  # the file that mask rules such as `top` read
    seed: int = 0
    start: str = "zero"  # zero | nonzero
    source: Source | None = field(default=None, compare=False, repr=False)
    span: Span | None = field(default=None, compare=False, repr=False)

    def factor(self, name: str) -> FactorRule:
        """The rule of a factor of the update."""
        return dict(self.factors)[name]

    def policy(self, mode: str) -> str:
        """The policy for a mode whose size differs from matrix to matrix: by_size, slice, group or error."""
        policies = dict(self.ragged)
        return policies.get(mode, policies.get("*", "by_size"))

    def __str__(self) -> str:
        return "\n".join(_lines(self)) + "\n"


_BARE = re.compile(r"[A-Za-z][A-Za-z0-9_ .,()\[\]*/+=-]*")  # needs no quotes between the keys of a block
_BARE_IN_LIST = re.compile(r"[A-Za-z][A-Za-z0-9_ .()*/+=-]*")
_OTHER_MEANING = re.compile(r"(?i)true|false|null|yes|no|on|off|y|n|.*\s")


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
