"""What a plan depends on beside the network."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Regime:
    """How an adapter is used: ``tokens`` per forward of a site (batch x length), with or without a backward pass."""

    tokens: int = 4096
    gradients: bool = True
