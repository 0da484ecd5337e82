"""The base weights at the sites of a group, and the squared norms of their rows, which change only when a weight does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tensorpeft.model.shape import Site
from tensorpeft.runtime.base_weight import base_weight, weight_place
from tensorpeft.runtime.state import State
from tensorpeft.runtime.torch_internals import is_traced


@dataclass(frozen=True)
class _Known:
    """What was found, and what it was found for."""

    state: tuple[object, ...]
    matrices: list[Tensor] | None  # views of the weights; None where one is no view and would be a copy of its weight
    squares: Tensor


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
        self._slots: list[tuple[dict[str, object], str]] = []  # where the modules keep their weights

    def __call__(self, like: Tensor) -> tuple[list[Tensor], Tensor]:  # shapes: (kept, summed) each; (sites, kept)
        """The weights and their rows' squared norms, in the dtype and on the device of a tensor."""
        if is_traced():  # a compiler follows neither versions nor places in memory
            matrices = list(self._found())
            return [matrix.to(like) for matrix in matrices], self._squares(matrices, like)
        state = self._state(like)
        known = self._known
        if known is None or known.state != state:
            known = self._look(state, like)
        matrices = known.matrices if known.matrices is not None else list(self._found())
        if all(matrix.dtype == like.dtype and matrix.device == like.device for matrix in matrices):
            return matrices, known.squares
        return [matrix.to(like) for matrix in matrices], known.squares

    def _state(self, like: Tensor) -> tuple[object, ...]:
        """What the squares depend on; a weight without a version never stays what it was."""
        if not self._slots:
            self._slots = [self._slot(site) for site in self.sites]
        weights = [own.get(name) for own, name in self._slots]
        found = [(id(w), w._version, w.data_ptr()) for w in weights if isinstance(w, Tensor) and not w.is_inference()]
        return like.dtype, like.device, found if len(found) == len(weights) else object()

    def _slot(self, site: Site) -> tuple[dict[str, object], str]:
        assert self.state.model is not None
        weight = weight_place(self.state.model.get_submodule(site.module), site)
        own: dict[str, object] = weight.module._parameters  # type: ignore[assignment]
        return own, weight.name

    def _look(self, state: tuple[object, ...], like: Tensor) -> _Known:
        matrices = list(self._found())
        places = {
            w.untyped_storage().data_ptr() for w in (own.get(n) for own, n in self._slots) if isinstance(w, Tensor)
        }
        views = all(matrix.untyped_storage().data_ptr() in places for matrix in matrices)
        known = _Known(state, matrices if views else None, self._squares(matrices, like))
        captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        self._known = None if captured else known  # what a graph makes is its own, to be made again when that runs
        return known

    def _found(self) -> Iterator[Tensor]:  # shape: (kept, summed) each
        assert self.state.model is not None
        model = self.state.model
        for site in self.sites:
            matrix = base_weight(self.state, model.get_submodule(site.module), site)
            yield matrix if self.side == "d_out" else matrix.mT

    def _squares(self, matrices: list[Tensor], like: Tensor) -> Tensor:  # shape: (sites, kept)
        norms = [torch.linalg.vector_norm(matrix, dim=1, dtype=like.dtype).to(like.device) for matrix in matrices]
        return torch.stack(norms).square()
