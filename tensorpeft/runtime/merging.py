"""dW as a dense matrix, and its addition to the base weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tensorpeft.language.errors import AdapterError, did_you_mean
from tensorpeft.runtime.dense import GroupUpdates
from tensorpeft.runtime.hooks import adapters
from tensorpeft.runtime.weights import held_weight

if TYPE_CHECKING:
    from tensorpeft.runtime.adapter import Adapter


@dataclass(frozen=True)
class Merged:
    """What a merge replaced: the base weights' own values, by module. ``order`` counts the model's merges."""

    task: int | None
    order: int
    weights: dict[str, Tensor]


@torch.no_grad()
def delta(adapter: Adapter, module: str, task: int | None) -> Tensor:  # shape: (d_out, d_in)
    """The update dW of a module."""
    return Updates(adapter, task).of(module)


class Updates:
    """The updates dW of an adapter's modules."""

    def __init__(self, adapter: Adapter, task: int | None) -> None:
        _check_task(adapter, task)
        self.adapter, self.task = adapter, task
        self.places: dict[str, list[tuple[int, int]]] = {}
        for number, group in enumerate(adapter.network.groups):
            for n, site in enumerate(group.sites):
                self.places.setdefault(site.module, []).append((number, n))
        self.groups: dict[int, GroupUpdates] = {}

    def of(self, module: str) -> Tensor:  # shape: (d_out, d_in)
        """The update of a module, gathered from the sites that lie in it."""
        if module not in self.places:
            paths = [site.module for site in self.adapter.sites]
            hint = did_you_mean(module, paths) or f"; one that has is `{paths[0]}`"
            raise AdapterError(f"adapter `{self.adapter.name}` has no site at `{module}`{hint}")
        places, groups = self.places[module], self.adapter.network.groups
        first = groups[places[0][0]].sites[places[0][1]]
        like = self.adapter.factors[self.adapter.network.blocks[0].name]
        dense = torch.zeros(first.module_d_out, first.d_in, dtype=like.dtype, device=like.device)
        for group, number in places:
            if group not in self.groups:
                self.groups[group] = GroupUpdates(self.adapter, groups[group], self.task)
            for update, rows, columns in self.groups[group].at(number):
                dense[rows[:, None], columns] += update.to(dense.dtype)
        return dense


def _check_task(adapter: Adapter, task: int | None) -> None:
    n_tasks = adapter.spec.tasks
    if n_tasks is None and task is not None:
        raise AdapterError(f"adapter `{adapter.name}` has no task mode, found task {task}")
    if n_tasks is not None and (task is None or not 0 <= task < n_tasks):
        raise AdapterError(
            f"adapter `{adapter.name}` has {n_tasks} tasks, found task {task}, expected 0 to {n_tasks - 1}"
        )


@torch.no_grad()
def merge(adapter: Adapter, task: int | None) -> Merged:
    """Replace W by W + dW, computed in the wider of the two dtypes, in every module that has a site."""
    if adapter.attachment is None:
        raise AdapterError(f"adapter `{adapter.name}` is not attached to a model")
    if adapter.merged is not None:
        raise AdapterError(f"adapter `{adapter.name}` is already merged")
    _check_task(adapter, task)
    others = _merged_adapters(adapter)
    saved = Merged(task, 1 + max((m.order for _, m in others), default=0), {})
    try:
        updates = Updates(adapter, task)
        for path in updates.places:
            weight, transposed = _weight(adapter, path)
            change = updates.of(path).to(weight.device)
            if not change.isfinite().all():
                raise AdapterError(f"the update of `{path}` has values that are not finite; nothing was merged")
            saved.weights[path] = weight.clone()
            wide = torch.promote_types(weight.dtype, change.dtype)
            weight.copy_(weight.to(wide) + (change.t() if transposed else change).to(wide))
    except BaseException:
        _restore(adapter, saved)
        raise
    return saved


@torch.no_grad()
def unmerge(adapter: Adapter) -> None:
    """Give the base weights back the values that a merge replaced."""
    if adapter.merged is None:
        raise AdapterError(f"adapter `{adapter.name}` is not merged")
    later = [other.name for other, merged in _merged_adapters(adapter) if merged.order > adapter.merged.order]
    if later:
        raise AdapterError(f"unmerge `{later[-1]}` before `{adapter.name}`: it was merged after it")
    _restore(adapter, adapter.merged)


def _restore(adapter: Adapter, merged: Merged) -> None:
    for path, values in merged.weights.items():
        _weight(adapter, path)[0].copy_(values)


def _merged_adapters(adapter: Adapter) -> list[tuple[Adapter, Merged]]:
    assert adapter.attachment is not None
    found = ((other, other.merged) for other in adapters(adapter.attachment.model) if other is not adapter)
    return [(other, merged) for other, merged in found if merged is not None]


def _weight(adapter: Adapter, path: str) -> tuple[nn.Parameter, bool]:
    assert adapter.attachment is not None
    module = adapter.attachment.model.get_submodule(path)
    held = held_weight(module)
    if held is None:
        raise AdapterError(
            f"the weight of `{path}` ({type(module).__name__}) is no plain matrix of numbers, so nothing can be merged into it"
        )
    return held
