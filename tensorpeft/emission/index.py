"""Constant positions that emitted code is given: made in the code, they would come from the host at every call."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class Index:
    """Positions, drawn when a device first needs them, and kept there. The meta device needs their number alone."""

    def __init__(self, count: int, draw: Callable[[], np.ndarray]) -> None:
        self.count, self._draw = count, draw
        self._placed: dict[torch.device, Tensor] = {}

    @classmethod
    def of(cls, positions: np.ndarray) -> Index:  # shape: (count,)
        return cls(len(positions), lambda: positions)

    def on(self, device: torch.device) -> Tensor:  # shape: (count,), int64
        """The positions on a device. Made in inference mode, they would be of no use in training."""
        if device not in self._placed:
            with torch.inference_mode(False):
                self._placed[device] = self._made(device)
        return self._placed[device]

    def _made(self, device: torch.device) -> Tensor:
        if device.type == "meta":
            return torch.empty(self.count, dtype=torch.int64, device=device)
        return torch.from_numpy(self._draw().astype(np.int64, copy=False)).to(device)
