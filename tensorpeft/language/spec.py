"""A spec: what a YAML file means, before any model is known."""

from __future__ import annotations

from dataclasses import dataclass, field

from tensorpeft.language.source import Source, Span
from tensorpeft.language.syntax import EVERYWHERE, Call, Definition, Expression, Initialiser, Number, Selector, Update

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
    spans: tuple[Span, ...] = field(default=(), compare=False, repr=False)  # one per entry of these three, in order

    def span(self, entry: str | int) -> Span | None:
        """Where an entry of ``matrices``, ``exclude`` or ``layers`` is written."""
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
        """Where ``side`` or ``count`` speaks of a matrix."""
        entries = [*(("side", name) for name, _ in self.side), *(("count", name) for name, _ in self.count)]
        return dict(zip(entries, self.spans, strict=False)).get((key, matrix))


@dataclass(frozen=True)
class FactorRule:
    """What is said of one factor under ``factors:``."""

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
        """What happens where the sizes of a mode differ from matrix to matrix."""
        policies = dict(self.ragged)
        return policies.get(mode, policies.get("*", "by_size"))
