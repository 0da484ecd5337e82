"""Steps: the contractions of two tensors each, one after the other, that make one tensor of several.

Planning writes them down once; whoever emits, counts or prints a product reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from tensorpeft.planning.orders import contract_path

Modes = tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One contraction of two tensors.

    ``inputs`` are numbers: the tensors that a contraction starts from count from 0, and what its steps make counts on from there.
    ``left`` and ``right`` are the modes of the two, and ``result`` those of what is made. Two steps are equal if they
    contract the same modes, whatever their sizes: emitted code does not depend on these.
    """

    inputs: tuple[int, int]
    left: Modes
    right: Modes
    result: Modes
    flops: int = field(compare=False)  # a multiply-add is two

    @property
    def summed(self) -> Modes:
        """The modes that the result lacks."""
        return tuple(mode for mode in dict.fromkeys((*self.left, *self.right)) if mode not in self.result)


def contraction_steps(inputs: Sequence[Modes], output: Modes, sizes: Mapping[str, int]) -> tuple[Step, ...]:
    """The cheapest steps from tensors of these modes to one of the modes ``output``; none for a single tensor."""
    if len(inputs) == 1:
        return ()
    live = dict(enumerate(inputs))
    steps: list[Step] = []
    for one, other in contract_path(inputs, output, sizes)[0]:
        left, right = live.pop(one), live.pop(other)
        needed = {*output}.union(*live.values())
        result = tuple(mode for mode in dict.fromkeys((*left, *right)) if mode in needed) if live else output
        live[len(inputs) + len(steps)] = result
        steps.append(Step((one, other), left, right, result, step_flops(left, right, result, sizes)))
    return tuple(steps)


def step_flops(left: Modes, right: Modes, result: Modes, sizes: Mapping[str, int]) -> int:
    """FLOPs of contracting two tensors: a product for each choice of indices, and an addition where some are summed."""
    every = {*left, *right}
    return prod(sizes[mode] for mode in every) * (1 if every <= {*result} else 2)
