"""Which task each row of a batch belongs to, as long as a thread says so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

import torch
from torch import Tensor

from tensorpeft.language.errors import AdapterError
from tensorpeft.runtime.factor_cache import is_traced


class Tasks:
    """The ids that threads have set. Threads that serve requests side by side each have their own."""

    def __init__(self) -> None:
        self._ids: dict[int, Tensor] = {}

    @contextmanager
    def chosen(self, ids: Tensor, n_tasks: int) -> Iterator[None]:  # shape: (batch,), integers
        """Within this context row i of a batch belongs to task ``ids[i]``.

        Raises:
            AdapterError: the ids are not a vector of tasks that exist.
        """
        if ids.dim() != 1 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
            raise AdapterError(
                f"tasks() found ids of shape {tuple(ids.shape)} and {ids.dtype}, expected (batch,) integers"
            )
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < n_tasks:
            raise AdapterError(
                f"tasks() found ids from {int(ids.min())} to {int(ids.max())}, expected 0 to {n_tasks - 1}"
            )
        thread = get_ident()
        before = self._ids.get(thread)
        self._ids[thread] = ids.long()
        try:
            yield
        finally:
            if before is None:
                del self._ids[thread]
            else:
                self._ids[thread] = before

    def on(self, device: torch.device) -> Tensor | None:  # shape: (batch,)
        """The ids of this thread, which stay on the device that asks; None if it has none.

        A backward pass may run parts of the forward again in a thread of autograd's, and a compiler knows no threads: these
        get the ids of the only thread that has some.
        """
        own = None if is_traced() else self._ids.get(get_ident())
        if own is None:
            return next(iter(self._ids.values())).to(device) if len(self._ids) == 1 else None
        if own.device != device:
            self._ids[get_ident()] = own = own.to(device)
        return own
