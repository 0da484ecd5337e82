"""The network of an adapter: what a spec means on a given model. A frozen value, without torch: it prints, hashes and compares.

Two networks are equal if they store the same tensors, of which masks keep the same, and use them in the same way.

    Network
    ├── blocks    the tensors that are stored: one per factor, and per size where a mode is ragged
    └── groups    the sites that share one shape
        └── terms     the products that add up to dW there

A factor's *written* modes are those of the spec; its *atoms* are what they come down to in a product: a mode is replaced by
its parts where another factor carries one of these. Contractions speak of atoms, storage speaks of written modes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from hashlib import sha256
from math import prod

import numpy as np

from tensorpeft.language.spec import BASE_WEIGHT, SITE_MODES, FactorRule, Spec
from tensorpeft.language.syntax import Call, Initialiser, Spectral
from tensorpeft.model.shape import Key, ModelShape, Parameter, Site


@dataclass(frozen=True)
class Axis:
    """One axis of a stored tensor. The labels of a bound axis are the matrices or layers (or, on ``site``, their pairs)."""

    mode: str
    size: int
    labels: tuple[str | int | Key, ...] | None = None


@dataclass(frozen=True)
class Unfolding:
    """Where a tensor that starts from the base weight holds the vectors of a decomposition.

    The vectors, (side, bond), are seen as (*atoms of the side, bond); each free axis consists of some of these, by number, or
    of none: then it repeats the numbers.
    """

    rank: int  # how many vectors
    side: tuple[int, ...]  # the sizes of the atoms; none where it holds singular values alone
    axes: tuple[tuple[int, ...], ...]  # one entry for each free axis


@dataclass(frozen=True)
class Entries:
    """The entries of one key that a mask of several modes keeps: positions in the grid of all free axes, ascending.

    They are drawn when first asked for: a report of a large model needs their number alone.
    """

    count: int
    draw: Callable[[], np.ndarray] = field(repr=False)

    @classmethod
    def of(cls, positions: np.ndarray) -> Entries:
        return cls(len(positions), partial(np.asarray, positions))

    @cached_property
    def positions(self) -> np.ndarray:  # shape: (count,)
        return self.draw()


@dataclass(frozen=True)
class Block:
    """One stored tensor of a factor.

    ``axes`` are the written modes in order; where the sites of a block do not fill the grid of its site modes, these
    are replaced by one leading ``site`` axis. A masked block is *packed*: a flat tensor that holds, key after key, what the
    masks keep. ``kept`` says for each free axis which indices these are (None: all of them), and a key holds their grid.
    Where a mask speaks of several modes, ``entries`` says it instead: the kept positions in the grid of all free axes,
    ascending. To be used, such a block is scattered into zeros of shape (keys, *free axes) first, at ``positions``.
    """

    name: str
    factor: str
    rule: FactorRule
    axes: tuple[Axis, ...]
    keys: tuple[Key, ...]  # in storage order
    kept: dict[Key, tuple[np.ndarray | None, ...]] | None = field(default=None, compare=False)  # see ``mask_digest``
    entries: dict[Key, Entries] | None = field(default=None, compare=False)
    origin: str = ""  # the factor whose numbers it starts from: another one's where its `init` is `start(...)`
    init: Initialiser = Call("zeros")  # how that one starts
    stack: str = ""  # of several stacks, whose it is
    names: dict[Key, dict[str, float]] = field(default_factory=dict, hash=False)  # the sizes that `init` speaks of
    unfolding: Unfolding | None = None  # of one that is data-dependent

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Block):
            return NotImplemented
        compared = (each.name for each in fields(self) if each.compare)
        same = all(getattr(self, name) == getattr(other, name) for name in compared)
        return same and self.mask_digest == other.mask_digest

    @cached_property
    def mask_digest(self) -> str | None:
        """SHA-256 of what masks keep, key by key: the indices of each masked axis, or the entries. None: no mask.

        A checkpoint holds it: its text must never change.
        """
        if self.entries is not None:
            hashed = sha256()
            for key in self.keys:
                hashed.update(f"{key}\n".encode() + self.entries[key].positions.astype("<i8").tobytes())
            return hashed.hexdigest()
        if self.kept is None:
            return None
        axes = ((key, axis, kept) for key in self.keys for axis, kept in enumerate(self.kept[key]))
        lines = (f"{key} {axis} {kept.tolist()}" for key, axis, kept in axes if kept is not None)
        return sha256("\n".join(lines).encode()).hexdigest()

    @property
    def packed(self) -> bool:
        """Whether masks leave a part of it."""
        return self.kept is not None or self.entries is not None

    @property
    def free_axes(self) -> tuple[Axis, ...]:
        """The axes that are not bound to sites."""
        return tuple(axis for axis in self.axes if axis.labels is None)

    @cached_property
    def positions(self) -> np.ndarray:  # shape: (count,)
        """Of a block of entries: where each number is in a flat tensor of shape (keys, *free axes)."""
        assert self.entries is not None
        size = prod(axis.size for axis in self.free_axes)
        return np.concatenate([number * size + self.entries[key].positions for number, key in enumerate(self.keys)])

    def key_shape(self, key: Key) -> tuple[int, ...]:
        """The shape of what one key holds: over the free axes, or of entries (kept,)."""
        sizes = tuple(axis.size for axis in self.free_axes)
        if self.entries is not None:
            return (self.entries[key].count,)
        if self.kept is None:
            return sizes
        return tuple(size if kept is None else len(kept) for size, kept in zip(sizes, self.kept[key], strict=True))

    @cached_property
    def key_sizes(self) -> tuple[int, ...]:
        """How many numbers each key holds, in storage order."""
        if not self.packed:
            return (prod(axis.size for axis in self.free_axes),) * len(self.keys)
        return tuple(prod(self.key_shape(key)) for key in self.keys)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the stored tensor."""
        return (self.count,) if self.packed else tuple(axis.size for axis in self.axes)

    @property
    def count(self) -> int:
        """How many numbers are stored."""
        return sum(self.key_sizes)

    @property
    def trainable(self) -> bool:
        return not self.rule.frozen

    @property
    def seeded(self) -> bool:
        """Frozen and regenerated from the spec's seed: a checkpoint does not hold it."""
        return self.rule.frozen and not self.rule.stored and not self.data_dependent

    @property
    def data_dependent(self) -> bool:
        """Whether its first numbers come from the base weight of the site that each key stands for."""
        return isinstance(self.init, Spectral)


@dataclass(frozen=True)
class Operand:
    """A factor as one product sees it, at one group of sites.

    ``modes`` are its atoms and ``sizes`` what masks leave of them; ``site_modes`` are the site modes it carries; ``keys`` gives,
    site by site, the key of the block to use. ``take`` says, for each free axis of what a key holds, which positions are used:
    None for all of them, a range for a leading slice.
    """

    factor: str
    block: Block
    modes: tuple[str, ...]
    sizes: tuple[int, ...]
    site_modes: tuple[str, ...]
    keys: tuple[Key, ...]
    take: tuple[Sequence[int] | None, ...]

    @property
    def is_base(self) -> bool:
        """Whether it is the base weight: its block only tells its shape, and is none of the network's."""
        return self.factor == BASE_WEIGHT


@dataclass(frozen=True)
class Term:
    """One product of the update, at a group of sites: of these rows and columns of dW, the only ones where it is not zero."""

    sign: int
    operands: tuple[Operand, ...]
    sizes: dict[str, int] = field(hash=False)  # atom -> what masks leave of it
    d_out: tuple[str, ...]  # atoms of the output side, the first the slowest
    d_in: tuple[str, ...]
    # which rows and columns, ascending (None: all of them); masks tell them, so what operands are equal tells whether these are
    rows: np.ndarray | None = field(default=None, compare=False)
    columns: np.ndarray | None = field(default=None, compare=False)

    @property
    def sides(self) -> tuple[str, ...]:
        """The atoms of both sides; behind or ahead of W the two have some in common."""
        return tuple(dict.fromkeys((*self.d_in, *self.d_out)))

    def size(self, modes: Iterable[str]) -> int:
        return prod([self.sizes[mode] for mode in modes])  # a list: compilers of forward passes follow no generator


@dataclass(frozen=True)
class Group:
    """Sites of one shape, at which the same blocks combine in the same way."""

    sites: tuple[Site, ...]  # of one kind
    scale: float
    terms: tuple[Term, ...]
    at: str = "site"  # from x to y; or "output": from W x to y; or "input": from x to x (``planning.base_product``)

    @property
    def kind(self) -> str:
        """Of the sites."""
        return self.sites[0].kind

    @cached_property
    def site_sizes(self) -> dict[str, int]:
        """How many values each site mode takes."""
        return {mode: len({getattr(site, mode, None) for site in self.sites}) for mode in SITE_MODES}


@dataclass(frozen=True)
class Network:
    """Everything that a spec comes down to on a model."""

    spec: Spec
    model: ModelShape
    blocks: tuple[Block, ...]
    groups: tuple[Group, ...]
    extras: tuple[Parameter, ...] = ()  # parameters of the base that are trained beside dW

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for group in self.groups for site in group.sites)

    def __str__(self) -> str:
        lines = [f"network {self.spec.name} on {self.model.name}: dW = {self.spec.scale} * ({self.spec.update})"]
        for block in self.blocks:
            axes = ", ".join(f"{axis.mode}={axis.size}" for axis in block.axes)
            kind = "trained" if block.trainable else "seeded" if block.seeded else "frozen, stored"
            lines.append(f"  {block.name}[{axes}] {block.rule.init}, {kind}, {block.count:,}")
        if self.extras:
            count = sum(extra.count for extra in self.extras)
            lines.append(f"  and {count:,} numbers of the base: {', '.join(self.spec.train)}")
        for group in self.groups:
            lines.append(f"  {len(group.sites)} sites like {group.sites[0]}")
            for term in group.terms:
                sides = ", ".join(f"{mode}={term.sizes[mode]}" for mode in (*term.d_out, *term.d_in))
                lines.append(f"    {' * '.join(operand.factor for operand in term.operands)}: {sides}")
        return "\n".join(lines)
