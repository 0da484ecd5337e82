"""A spec: what a YAML file means, before any model is known."""

from __future__ import annotations

from dataclasses import dataclass, field

from tensorpeft.language.source import Source, Span
from tensorpeft.language.syntax import Call, Definition, Expression, Number, Update

SITE_MODES: tuple[str, ...] = ("matrix", "layer", "expert")  # bound when the adapter is attached
STRUCTURAL_MODES = ("head", "head_dim", "width")  # the two sides of an attention matrix, by its heads
SIDES = ("d_out", "d_in")
BASE_WEIGHT = "W"


@dataclass(frozen=True)
class Target:
    """Which sites: roles, module suffixes, globs or patterns, or ``all-linear``."""

    matrices: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    layers: tuple[int, ...] | None = None
    spans: tuple[Span, ...] = field(default=(), compare=False, repr=False)  # one per entry of matrices, then of exclude

    def span(self, entry: str) -> Span | None:
        """Where an entry of ``matrices`` or ``exclude`` is written."""
        return dict(zip((*self.matrices, *self.exclude), self.spans, strict=False)).get(entry)


@dataclass(frozen=True)
class Heads:
    """Which side of a matrix its heads split, and how many they are, where the model does not say so.

    Each is a pair of (matrix, value) tuples; the matrix ``*`` stands for every other one.
    """

    side: tuple[tuple[str, str], ...] = ()
    count: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class FactorRule:
    """What is said of one factor under ``factors:``."""

    init: Call
    frozen: bool = False
    stored: bool = False  # a frozen factor that the checkpoint holds, rather than its seed
    span: Span | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class MaskRule:
    """Which indices of a mode of a factor exist: ``B[d_out]: bernoulli(0.13)``."""

    factor: str
    mode: str
    rule: Call
    span: Span | None = field(default=None, compare=False, repr=False)


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
    ragged: str = "by_size"  # by_size | slice | error
    heads: Heads = Heads()
    tasks: int | None = None
    seed: int = 0
    start: str = "zero"  # zero | nonzero
    source: Source | None = field(default=None, compare=False, repr=False)
    span: Span | None = field(default=None, compare=False, repr=False)

    def factor(self, name: str) -> FactorRule:
        """The rule of a factor of the update."""
        return dict(self.factors)[name]
