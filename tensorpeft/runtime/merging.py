"""dW as a dense matrix, and its addition to the base weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tensorpeft.language.errors import AdapterError, did_you_mean
from tensorpeft.model.shape import Site
from tensorpeft.runtime.base_weight import Held, attached_weight, held
from tensorpeft.runtime.delta_weight import DeltaWeight
from tensorpeft.runtime.hooks import adapters

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
    """The updates dW of an adapter's weights."""

    def __init__(self, adapter: Adapter, task: int | None) -> None:
        _check_task(adapter, task)
        self.adapter, self.task, self._value = adapter, task, adapter.magnitudes.over_norms()
        self.places: dict[str, Site] = {}
        for site in adapter.network.sites:
            self.places.setdefault(site.path, site)

    def site(self, path: str) -> Site:
        """The first site that lies in a weight."""
        if path not in self.places:
            paths = list(self.places)
            hint = did_you_mean(path, paths) or f"; one that has is `{paths[0]}`"
            raise AdapterError(f"adapter `{self.adapter.name}` has no site at `{path}`{hint}")
        return self.places[path]

    def of(self, path: str) -> Tensor:  # shape: (d_out, d_in), or (experts, d_out, d_in)
        """The update of a weight, gathered from the sites that lie in it."""
        self.site(path)
        return DeltaWeight(self.adapter.network, path)(self._value, attached_weight(self.adapter), self.task)


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
    model = _model(adapter)
    if adapter.merged is not None:
        raise AdapterError(f"adapter `{adapter.name}` is already merged")
    _check_task(adapter, task)
    others = _merged_adapters(adapter)
    saved = Merged(task, 1 + max((m.order for _, m in others), default=0), {})
    try:
        updates, owners = Updates(adapter, task), _owners(model)
        for path in updates.places:
            weight = _weight(adapter, updates.site(path), owners)
            parameter = weight.parameter
            change = updates.of(path).to(parameter.device)
            if not change.isfinite().all():
                raise AdapterError(f"the update of `{path}` has values that are not finite; nothing was merged")
            saved.weights[path] = parameter.clone()
            wide = torch.promote_types(parameter.dtype, change.dtype)
            parameter.copy_(parameter.to(wide) + weight.stored(change).to(wide))
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
    model, sites = _model(adapter), {site.path: site for site in adapter.sites}
    for path, values in merged.weights.items():
        held(model.get_submodule(sites[path].module), sites[path]).parameter.copy_(values)


def _model(adapter: Adapter) -> nn.Module:
    if adapter.attachment is None:
        raise AdapterError(f"adapter `{adapter.name}` is not attached to a model")
    return adapter.attachment.model


def _merged_adapters(adapter: Adapter) -> list[tuple[Adapter, Merged]]:
    found = ((other, other.merged) for other in adapters(_model(adapter)) if other is not adapter)
    return [(other, merged) for other, merged in found if merged is not None]


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """For each parameter of a model, by its id, the modules that have it."""
    own = {id(module) for adapter in adapters(model) for module in adapter.modules()}
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for parameter in module.parameters(recurse=False) if id(module) not in own else ():
            owners.setdefault(id(parameter), []).append(path)
    return owners


def _weight(adapter: Adapter, site: Site, owners: dict[int, list[str]]) -> Held:
    module = _model(adapter).get_submodule(site.module)
    weight = held(module, site)
    if not (weight.is_plain and isinstance(weight.parameter, nn.Parameter)):
        raise AdapterError(
            f"the weight of `{site.path}` ({type(module).__name__}) is no plain matrix of numbers, "
            "so nothing can be merged into it"
        )
    expected, found = (site.module_d_out, site.d_in), tuple(weight.matrix(weight.parameter).shape[-2:])
    if found != expected:
        raise AdapterError(
            f"the weight of `{site.path}` is {found[0]} x {found[1]} (d_out x d_in), but {expected[0]} x {expected[1]} when "
            f"`{adapter.name}` was attached: the module was replaced, and the adapter is not on the new one"
        )
    others = [path for path in owners[id(weight.parameter)] if path != site.path]
    if len(owners[id(weight.parameter)]) > 1:
        raise AdapterError(
            f"the weight of `{site.path}` is that of `{others[0]}` too, which the update is not for, "
            "so nothing can be merged into it"
        )
    return weight
