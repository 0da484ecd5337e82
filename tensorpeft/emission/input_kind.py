"""Input sets as their code sees them: strands, the products that these share, and the modules in which their sites are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from tensorpeft.emission.lowering import Strand
from tensorpeft.model.shape import Rows


@dataclass(frozen=True)
class Place:
    """A site in a module: its strands, one per product, which of their sites it is, and its rows among the module's outputs."""

    strands: tuple[int, ...]
    member: int
    rows: Rows | None


@dataclass(frozen=True)
class Head:
    """One product of the input with the concatenated first links of some strands, each of which has columns of the result."""

    piece: int
    trainable: bool
    width: int
    columns: tuple[tuple[int, int, int], ...]  # (strand, first, how many)


@dataclass(frozen=True)
class SetKind:
    """What the input sets that run the same code have in common."""

    strands: tuple[Strand, ...]
    pieces: tuple[
        tuple[int, ...], ...
    ]  # of each strand: the numbers of its pieces; -1 where it has none, or the base weight
    trainable: tuple[bool, ...]  # of each piece
    heads: tuple[Head, ...]
    modules: tuple[tuple[Place, ...], ...]
    d_in: int
    d_out: tuple[int, ...]  # of the modules
    dropout: float  # of the input

    @cached_property
    def sizes(self) -> dict[tuple[int, str], int]:
        """Of the strands' modes, by the number of the strand."""
        return {(number, mode): size for number, strand in enumerate(self.strands) for mode, size in strand.sizes}

    @cached_property
    def outline(self) -> SetKind:
        """All of it but those."""
        return replace(self, strands=tuple(replace(strand, sizes=()) for strand in self.strands))

    @property
    def by_task(self) -> bool:
        return any(strand.by_task for strand in self.strands)

    @property
    def by_base(self) -> bool:
        return any(piece.is_base for strand in self.strands for met in strand.met for piece in met.pieces)
