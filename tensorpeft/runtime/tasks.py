"""Which task each row of a batch belongs to, as long as the caller says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType

import torch
from torch import Tensor

from tensorpeft.language.errors import AdapterError
from tensorpeft.runtime.torch_internals import backward_pass, is_traced
from tensorpeft.runtime.whole import at_exit

# For each bank of ids the contexts that are open in this thread, coroutine or generator, with their ids; the last one counts.
_Open = tuple[tuple[object, Tensor], ...]
_open: ContextVar[Mapping[Tasks, _Open]] = ContextVar("tasks", default=MappingProxyType({}))


class Tasks:
    """The ids that callers have set for an adapter. Threads and coroutines that serve requests side by side have their own."""

    def __init__(self) -> None:
        self._everywhere: dict[object, Tensor] = {}

    @contextmanager
    def chosen(self, ids: Tensor, n_tasks: int) -> Iterator[None]:  # shape: (batch,), integers
        """Within this context row i of a batch belongs to task ``ids[i]``.

        Raises:
            AdapterError: the ids are not a vector of tasks that exist.
        """
        mine, context = self._checked(ids, n_tasks), object()

        def close() -> None:
            self._everywhere.pop(context, None)
            left = tuple(each for each in _open.get().get(self, ()) if each[0] is not context)
            others = {tasks: each for tasks, each in _open.get().items() if tasks is not self}
            _open.set({**others, self: left} if left else others)

        with at_exit(close):
            self._everywhere[context] = mine
            _open.set({**_open.get(), self: (*_open.get().get(self, ()), (context, mine))})
            yield

    @staticmethod
    def _checked(ids: Tensor, n_tasks: int) -> Tensor:
        """A copy of the ids, so that no one changes them while they count."""
        if not isinstance(ids, Tensor):
            raise AdapterError(f"tasks() found {type(ids).__name__}, expected a tensor of shape (batch,) with integers")
        if ids.dim() != 1 or ids.dtype.is_floating_point or ids.dtype == torch.bool:
            raise AdapterError(
                f"tasks() found ids of shape {tuple(ids.shape)} and {ids.dtype}, expected (batch,) integers"
            )
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < n_tasks:
            raise AdapterError(
                f"tasks() found ids from {int(ids.min())} to {int(ids.max())}, expected 0 to {n_tasks - 1}"
            )
        return ids.to(torch.long, copy=True)

    def on(self, device: torch.device) -> Tensor | None:  # shape: (batch,)
        """The ids of the innermost context, which stay on the device that asks; None if there is none.

        A backward pass may run parts of the forward again in a thread of autograd's, and a compiler knows no contexts: these get
        the ids of the only context that is open anywhere.
        """
        found = () if is_traced() else _open.get().get(self, ())
        if found:
            context, ids = found[-1]
            if ids.device != device:
                ids = ids.to(device)
                _open.set({**_open.get(), self: (*found[:-1], (context, ids))})
            return ids
        if len(self._everywhere) == 1 and (is_traced() or backward_pass() != -1):
            return next(iter(self._everywhere.values())).to(device)
        return None

    def __getstate__(self) -> dict[str, object]:
        return {"_everywhere": {}}
