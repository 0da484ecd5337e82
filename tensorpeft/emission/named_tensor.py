"""A tensor of emitted code, with the modes of its axes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from tensorpeft.planning.chain import SITE

Modes = tuple[str, ...]


@dataclass(frozen=True)
class NamedTensor:
    """A tensor of emitted code. Its axes lie in memory in their order; each is one mode or several, the first the slowest.

    Behind an axis of ``gaps`` memory jumps, so that it cannot be merged with the next one without a copy.
    """

    node: fx.Node
    axes: tuple[Modes, ...]
    gaps: frozenset[int] = frozenset()

    @property
    def modes(self) -> Modes:
        return tuple(mode for axis in self.axes for mode in axis)

    @property
    def cuts(self) -> frozenset[int]:
        """The positions among the modes before which memory jumps."""
        return frozenset(sum(len(axis) for axis in self.axes[: n + 1]) for n in self.gaps)


def one_site(tensor: NamedTensor) -> NamedTensor:
    """The axes of a tensor of several sites at one of them: memory jumps where the mode SITE was."""
    axes: list[Modes] = []
    gaps: set[int] = set()
    for n, axis in enumerate(tensor.axes):
        parts = (axis[: axis.index(SITE)], axis[axis.index(SITE) + 1 :]) if SITE in axis else (axis,)
        for i, part in enumerate(parts):
            if i == 1 and axes:
                gaps.add(len(axes) - 1)
            axes += [part] if part else []
        if n in tensor.gaps and axes:
            gaps.add(len(axes) - 1)
    return NamedTensor(tensor.node, tuple(axes), frozenset(gap for gap in gaps if gap < len(axes) - 1))
