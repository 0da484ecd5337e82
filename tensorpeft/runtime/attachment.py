"""How an adapter holds on to a model: forwards of modules, hooks of its root, a submodule, frozen parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from tensorpeft.language.errors import AdapterError
from tensorpeft.runtime.base_weight import weight_place
from tensorpeft.runtime.engine import Engine
from tensorpeft.runtime.hooks import (
    PREFIX,
    Mark,
    forward_of,
    is_adapter,
    remove_root_hooks,
    set_root_hooks,
)
from tensorpeft.runtime.ledger import entry, known
from tensorpeft.runtime.site_update import SiteUpdate
from tensorpeft.runtime.state import Held, State
from tensorpeft.runtime.torch_internals import remove_forward_hooks
from tensorpeft.runtime.weight_updates import OutputUpdate, ReplacedWeight


def install(engine: Engine, adapter: nn.Module, model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Let every module of a site have the update, add the adapter as a submodule, freeze the base but for what is trained of it.

    ``values`` are what the latter starts from, where it is not what it is. What an error leaves done ``remove`` takes back.

    Raises:
        AdapterError: a parameter is trained by another adapter, or is to be trained and has a site of one.
    """
    state = engine.state
    modules = dict(model.named_modules())
    _refuse_clash(state, modules)
    state.edges = list(_edges(modules, state))
    state.held = list(_held(modules))
    state.trained.attach(model, state, values)
    for held in state.held:
        held.entry.hold(state)
    for site in state.network.sites:
        found = known(weight_place(modules[site.module], site).parameter)
        if found is not None:
            found.adapted_by.append(state)
    for path in dict.fromkeys(site.module for site in state.network.sites):
        _join(engine, modules[path], path)
        if _has_fast_path(modules, path):
            modules[path].register_forward_pre_hook(Mark(state))
    products = [modules[path] for path in engine.programs.main.products]
    state.tells_biases = all(hasattr(module, "bias") for module in products)
    set_root_hooks(model, state, engine)
    model.add_module(PREFIX + state.name, adapter)
    state.refresh()


def remove(state: State, *, keep: bool = False) -> None:
    """Take everything back, however much of it there is. What was frozen thaws, unless another adapter holds it too."""
    model = state.model
    if model is None:
        return
    remove_root_hooks(model, state)
    for module, forward in state.modules:
        forward.leave(state)
        remove_forward_hooks(module, lambda hook: isinstance(hook, Mark) and hook.state is state)
    state.trained.detach(state, keep=keep)
    for held in state.held:
        now = held.owner._parameters.get(held.name)
        if now is not None and now is not held.entry.parameter:  # load_state_dict(assign=True) put another one there
            held.entry.move(now)
        held.entry.let_go(state)
    neighbours, state.neighbours = state.neighbours, set()
    for each in neighbours:
        each.neighbours.discard(state)
    if model._modules.get(PREFIX + state.name) is not None:
        model._modules.pop(PREFIX + state.name, None)
    for each in neighbours:
        each.refresh()
    state.model, state.held, state.edges = None, [], []
    state.modules, state.former = [], [forward for _, forward in state.modules] or state.former
    state.refresh()


def _refuse_clash(state: State, modules: Mapping[str, nn.Module]) -> None:
    """A parameter is trained by one adapter, or has sites, of this adapter or another."""
    for site in state.network.sites:
        parameter = weight_place(modules[site.module], site).parameter
        found = known(parameter)
        if found is not None and found.trainer is not None:
            name = getattr(found.trainer, "name", "")
            raise AdapterError(f"the weight of `{site.path}` is trained by adapter `{name}`; detach that one first")
    for path in state.trained.paths:
        owner, _, name = path.rpartition(".")
        found = known(modules[owner]._parameters.get(name))
        if found is not None and found.adapted_by:
            other = getattr(found.adapted_by[0], "name", "")
            raise AdapterError(
                f"`{path}` is to be trained, but it has a site of adapter `{other}`; detach that one first"
            )


def _edges(modules: Mapping[str, nn.Module], state: State) -> Iterator[tuple[dict[str, Any], str, nn.Module]]:
    """Every step from the model down to a site's module: the parent's children, the child's name, and the child."""
    seen: set[str] = set()
    for site in state.network.sites:
        path = site.module
        while path and path not in seen:
            seen.add(path)
            parent, _, name = path.rpartition(".")
            yield modules[parent]._modules, name, modules[path]
            path = parent


def _held(modules: Mapping[str, nn.Module]) -> Iterator[Held]:
    """The parameters of a model, those of adapters left out; each once, however many modules share it."""
    own = {id(part) for module in modules.values() if is_adapter(module) for part in module.modules()}
    seen: set[int] = set()
    for path, module in modules.items():
        for name, parameter in module._parameters.items() if id(module) not in own else ():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                yield Held(f"{path}.{name}".removeprefix("."), module, name, entry(parameter))


def _has_fast_path(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether a module lies in a transformer layer of torch's own."""
    parents = (path.rsplit(".", n)[0] for n in range(1, 1 + path.count(".")))
    return any(type(modules[parent]).__module__ == nn.TransformerEncoderLayer.__module__ for parent in parents)


def _join(engine: Engine, module: nn.Module, path: str) -> None:
    """Let the updates of one module be part of its forward."""
    state, weights = engine.state, engine.weights
    forward = forward_of(module)
    updates: list[SiteUpdate | OutputUpdate] = []
    if any(site.module == path and site.kind == "linear" for site in state.network.sites):
        updates.append(SiteUpdate(engine, path))
    if path in weights.called:
        updates.append(OutputUpdate(engine, weights.called[path]))
    ahead = [SiteUpdate(engine, path, ahead=True)] if path in engine.programs.main.inputs else []
    for other in forward.states:
        state.neighbours.add(other)
        other.neighbours.add(state)
    state.modules.append((module, forward))
    module.__dict__["forward"] = forward
    forward.join(updates, ahead, [ReplacedWeight(engine, each) for each in weights.read.get(path, ())])
