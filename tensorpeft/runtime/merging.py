"""dW as a dense matrix, and its addition to the base weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tensorpeft.language.errors import AdapterError, did_you_mean
from tensorpeft.model.shape import Site
from tensorpeft.runtime.base_weight import WeightPlace, attached_weight, weight_place
from tensorpeft.runtime.engine import Engine
from tensorpeft.runtime.hooks import PREFIX
from tensorpeft.runtime.ledger import BaseParameter, entry
from tensorpeft.runtime.site_tensors import Value
from tensorpeft.runtime.state import Merged, State
from tensorpeft.runtime.whole import at_exit


@torch.no_grad()
def delta(engine: Engine, path: str, task: int | None) -> Tensor:  # shape: (d_out, d_in), or (experts, d_out, d_in)
    """The update dW of a weight, for the factors as they are."""
    _check_task(engine.state, task)
    return _delta(engine, path, task, engine.magnitudes.over_norms())


def _delta(engine: Engine, path: str, task: int | None, value: Value) -> Tensor:
    state = engine.state
    paths = dict.fromkeys(site.path for site in state.network.sites)
    if not isinstance(path, str) or path not in paths:
        known = list(paths)
        hint = did_you_mean(str(path), known) or (f"; one that has is `{known[0]}`" if known else "")
        raise AdapterError(f"adapter `{state.name}` has no site at `{path}`{hint}")
    return engine.delta_weight(path)(value, attached_weight(state), task)


def _check_task(state: State, task: int | None) -> None:
    n_tasks = state.spec.tasks
    if n_tasks is None and task is not None:
        raise AdapterError(f"adapter `{state.name}` has no task mode, found task {task}")
    if n_tasks is not None and (not isinstance(task, int) or isinstance(task, bool) or not 0 <= task < n_tasks):
        raise AdapterError(
            f"adapter `{state.name}` has {n_tasks} tasks, found task {task}, expected 0 to {n_tasks - 1}"
        )


@dataclass(frozen=True, eq=False)
class MergedUpdate:
    """What a merge adds to one weight: not dW, which is as large as the weight, but the factors that it is made of."""

    engine: Engine
    merged: Merged
    path: str

    @property
    def holder(self) -> State:
        return self.engine.state

    @property
    def is_active(self) -> bool:
        return not self.holder.disabled_by

    def added_to(self, values: Tensor) -> Tensor:
        """W + dW, in the wider of the two dtypes.

        Raises:
            AdapterError: dW has values that are not finite, or the sum is beyond the range of the weight's dtype.
        """
        change = _delta(self.engine, self.path, self.merged.task, self.merged.values.__getitem__).to(values.device)
        if not change.isfinite().all():
            raise AdapterError(f"the update of `{self.path}` has values that are not finite; nothing was merged")
        site = self.engine.delta_weight(self.path).site
        module = self.holder.module_of(site)
        assert module is not None
        place = weight_place(module, site)
        wide = torch.promote_types(values.dtype, change.dtype)
        found = values.to(wide) + place.stored(change).to(wide)
        dtype = place.parameter.dtype
        if found.dtype != dtype and not found.to(dtype).isfinite().all() and found.isfinite().all():
            raise AdapterError(
                f"W + dW of `{self.path}` has values beyond the range of {str(dtype).removeprefix('torch.')}; "
                "nothing was merged"
            )
        return found


def merge(engine: Engine, task: int | None) -> None:
    """Add dW to every weight that has a site: to all of them, or on an error to none."""
    state = engine.state
    model = state.base_model()
    if state.merged is not None:
        raise AdapterError(f"adapter `{state.name}` is already merged")
    _check_task(state, task)
    places = {site.path: site for site in reversed(state.network.sites)}
    owners, whole = _owners(model), False
    entries = {path: _entry(state, site, owners) for path, site in places.items()}
    value = engine.magnitudes.over_norms()
    values = {block.name: value(block.name).detach().clone() for block in state.network.blocks}

    def take_back() -> None:
        if not whole:
            take(state)

    with at_exit(take_back):
        state.merged = Merged(task, values)  # what it will undo, before it writes
        for path, each in entries.items():
            each.add(MergedUpdate(engine, state.merged, path))
        state.refresh()
        whole = True


def unmerge(state: State) -> None:
    """Take what a merge added off the base weights; with nothing else merged, they have their own bits again."""
    if state.merged is None:
        raise AdapterError(f"adapter `{state.name}` is not merged")
    check_unchanged(state)
    with at_exit(lambda: take(state)):
        pass


def take(state: State, *, keep: bool = False) -> None:
    """Take a merge off the weights, or let it be their own. Doing it again does no harm."""
    for each in merged_entries(state).values():
        if keep:
            each.keep(state)
        else:
            each.take(state)
    state.merged = None
    state.refresh()


def merged_entries(state: State) -> dict[str, BaseParameter]:
    """The weights into which an adapter is merged, by their paths."""
    mine = (each for each in state.held if any(added.holder is state for added in each.entry.additions))
    return {each.path: each.entry for each in mine}


def check_unchanged(state: State) -> None:
    """A merged weight that is another one now, or has other numbers, is somebody's work: it is not written over.

    Raises:
        AdapterError: there is one.
    """
    for held in state.held:
        mine = held.entry
        if not any(each.holder is state for each in mine.additions):
            continue
        if held.owner._parameters.get(held.name) is not mine.parameter or mine.was_changed:
            raise AdapterError(
                f"`{held.path}` was changed by somebody else while `{state.name}` was merged into it; "
                "detach(keep_merged=True) leaves it as it is"
            )


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """For each parameter of a model, by its id, the modules that have it."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if f".{PREFIX}" in f".{path}":
            continue
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(path)
    return owners


def _entry(state: State, site: Site, owners: dict[int, list[str]]) -> BaseParameter:
    """The entry of a site's weight.

    Raises:
        AdapterError: it is quantised or on the meta device, of another module by now, or shared with another module.
    """
    module = state.base_model().get_submodule(site.module)
    weight: WeightPlace = weight_place(module, site)
    parameter = weight.parameter
    if not (weight.is_plain and isinstance(parameter, nn.Parameter)):
        raise AdapterError(
            f"the weight of `{site.path}` ({type(module).__name__}) is no plain matrix of numbers, "
            "so nothing can be merged into it"
        )
    expected, found = (site.module_d_out, site.d_in), tuple(weight.matrix(parameter).shape[-2:])
    if found != expected:
        raise AdapterError(
            f"the weight of `{site.path}` is {found[0]} x {found[1]} (d_out x d_in), but {expected[0]} x {expected[1]} when "
            f"`{state.name}` was attached: the module was replaced, and the adapter is not on the new one"
        )
    if parameter.is_meta:
        raise AdapterError(
            f"the weight of `{site.path}` is on the meta device, or offloaded: it has no values to merge into"
        )
    others = [path for path in owners[id(parameter)] if path != site.path]
    if len(owners[id(parameter)]) > 1:
        raise AdapterError(
            f"the weight of `{site.path}` is that of `{others[0]}` too, which the update is not for, "
            "so nothing can be merged into it"
        )
    return entry(parameter)
