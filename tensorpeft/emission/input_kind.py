"""Input sets as their code sees them: chains, the products that these share, and the modules in which their sites are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from tensorpeft.emission.lowering import LoweredChain
from tensorpeft.model.shape import Rows


@dataclass(frozen=True)
class ModuleSite:
    """A site in a module: its chains, one per product, which of their sites it is, and its rows among the module's outputs."""

    chains: tuple[int, ...]
    member: int
    rows: Rows | None


@dataclass(frozen=True)
class FusedProjection:
    """One product of the input with the concatenated first links of some chains, each of which has columns of the result."""

    argument: int
    trainable: bool
    width: int
    columns: tuple[tuple[int, int, int], ...]  # (chain, first, how many)


@dataclass(frozen=True)
class SetKind:
    """The properties that input sets of the same code share; it is the key of that code."""

    chains: tuple[LoweredChain, ...]
    arguments: tuple[
        tuple[int, ...], ...
    ]  # of each chain: the numbers of its arguments; -1 where it has none, or the base weight
    trainable: tuple[bool, ...]  # of each argument
    projections: tuple[FusedProjection, ...]
    modules: tuple[tuple[ModuleSite, ...], ...]
    d_in: int
    d_out: tuple[int, ...]  # of the modules
    dropout: float  # of the input

    @cached_property
    def sizes(self) -> dict[tuple[int, str], int]:
        """Of the chains' modes, by the number of the chain."""
        return {(number, mode): size for number, chain in enumerate(self.chains) for mode, size in chain.sizes}

    @cached_property
    def outline(self) -> SetKind:
        """All of it but those."""
        return replace(self, chains=tuple(replace(chain, sizes=()) for chain in self.chains))

    @property
    def by_task(self) -> bool:
        return any(chain.by_task for chain in self.chains)

    @property
    def by_base(self) -> bool:
        return any(argument.is_base for chain in self.chains for stage in chain.stages for argument in stage.arguments)
