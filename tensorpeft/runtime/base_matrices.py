"""The base weights at the sites of a group, and the squared norms of their rows, which change only when a weight does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tensorpeft.model.shape import Site
from tensorpeft.runtime.base_weight import base_weight, weight_place
from tensorpeft.runtime.state import State
from tensorpeft.runtime.torch_internals import is_traced


@dataclass(frozen=True)
class _Known:
    """W at each site and its squared norms; the weights, each with where its module keeps it, its version and its memory."""

    dtype: torch.dtype
    device: torch.device
    weights: list[tuple[dict[str, nn.Parameter | None], str, nn.Parameter, int, int]]
    matrices: list[Tensor]
    squares: Tensor

    def still_holds(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether no weight has changed since. This runs at every forward pass, and calls as little as it can."""
        if dtype != self.dtype or device != self.device:
            return False
        for own, name, weight, version, place in self.weights:
            if own[name] is not weight or weight._version != version or weight.data_ptr() != place:
                return False
        return True


class BaseMatrices:
    """W at the sites of a group, turned so that the norms along ``side`` are those of rows.

    The squared norms, and where W lies, are known as long as each weight is the same tensor, in the same memory, of the same
    version. Nothing counts what is written through ``weight.data``: call ``forget`` then.
    """

    def __init__(self, state: State, sites: tuple[Site, ...], side: str) -> None:
        self.state, self.sites, self.side = state, sites, side
        self.forget()

    def forget(self) -> None:
        """Look for the weights anew at the next call."""
        self._known: _Known | None = None

    def __call__(self, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """The weights as they are (kept, summed), and the squared norms of their rows in a dtype, (sites, kept)."""
        known = None if is_traced() else self._known  # a compiler follows neither versions nor places in memory
        if known is not None and known.still_holds(dtype, device):
            return known.matrices, known.squares
        matrices = [self._matrix(site) for site in self.sites]
        norms = [torch.linalg.vector_norm(matrix, dim=1, dtype=dtype).to(device) for matrix in matrices]
        squares = torch.stack(norms).square()
        if not is_traced():
            self._remember(dtype, device, matrices, squares)
        return matrices, squares

    def _matrix(self, site: Site) -> Tensor:  # shape: (kept, summed)
        matrix = base_weight(self.state, self._module(site), site)
        return matrix if self.side == "d_out" else matrix.mT

    def _module(self, site: Site) -> nn.Module:
        assert self.state.model is not None
        return self.state.model.get_submodule(site.module)

    def _remember(self, dtype: torch.dtype, device: torch.device, matrices: list[Tensor], squares: Tensor) -> None:
        """Keep what was found, if all of W are views of parameters that count their versions: no weight is kept twice."""
        weights = []
        for site, matrix in zip(self.sites, matrices, strict=True):
            at = weight_place(self._module(site), site)
            own, weight = at.module._parameters, at.module._parameters.get(at.name)
            if weight is None or weight.is_inference():
                return
            if matrix.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
                return
            weights.append((own, at.name, weight, weight._version, weight.data_ptr()))
        if not (
            torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        ):  # a graph's memory is its own
            self._known = _Known(dtype, device, weights, matrices, squares)
