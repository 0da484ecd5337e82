"""The use of an adapter that a plan is made for: how many tokens, with gradients or without, on what kind of machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache


@dataclass(frozen=True)
class Regime:
    """How an adapter is used: ``tokens`` per forward of a site (batch x length), with or without a backward pass.

    Activations and the tensors that they meet have numbers of ``number_bytes`` bytes. ``balance`` weighs memory against
    arithmetic: how many FLOPs a machine does while it moves a byte. Accelerators do 100 to 300 in half precision, and
    CPUs about 10; at 32 no plan is far from the best on either. ``launch`` is how many bytes it moves while it starts a
    kernel: some 10 MB on accelerators, and 0.1 MB on CPUs.
    """

    tokens: int = 4096
    gradients: bool = True
    number_bytes: int = 2
    balance: float = 32
    launch: float = 1e6

    def near(self, tokens: int, *, gradients: bool, number_bytes: int) -> Regime:
        """This one at the nearest power of 4 tokens, up to 4,096: few plans serve all lengths."""
        return _near(self, min(max(1, tokens).bit_length() // 2, 6), gradients, number_bytes)


@cache
def _near(regime: Regime, power: int, gradients: bool, number_bytes: int) -> Regime:
    return replace(regime, tokens=4**power, gradients=gradients, number_bytes=number_bytes)
