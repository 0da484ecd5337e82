"""How adapters take part in a model: the forward of a module of theirs is one of these, and the root tells when a pass begins.

A module's own ``forward`` is hidden behind an attribute of the module, so that hooks by others, on the module or on all modules,
see the whole output and nothing else, and what the base computed is seen by nobody before the update is in it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from threading import RLock
from typing import Any, Protocol
from weakref import WeakValueDictionary

from torch import Tensor, nn

from tensorpeft.language.errors import AdapterError
from tensorpeft.runtime.state import State
from tensorpeft.runtime.torch_internals import is_traced, remove_forward_hooks
from tensorpeft.runtime.whole import at_exit

PREFIX = "tensorpeft_"  # of an adapter's name among the model's submodules


class ModuleUpdate(Protocol):
    """What one adapter does at one module that it is called by."""

    state: State

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The output y of a module for an input x, or the input that it is to have, with the update; y may be written to."""


class Replacement(Protocol):
    """A weight that one adapter replaces while the forward of a module runs."""

    state: State

    def replace(self, module: nn.Module) -> None: ...

    def restore(self, module: nn.Module) -> None: ...


class ModuleForward:
    """The forward of one module with the updates of all adapters that have a site there."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.before = module.__dict__.get("forward")  # as another library has put one there
        self.updates: tuple[ModuleUpdate, ...] = ()  # of the output
        self.ahead: tuple[ModuleUpdate, ...] = ()  # of the input
        self.replacements: tuple[Replacement, ...] = ()
        self._bind()

    def _bind(self) -> None:
        self._turn = RLock()
        self.base: Callable[..., Any] = self.before or type(self.module).forward.__get__(self.module)
        self.__wrapped__ = self.base  # whose signature is this one's
        try:
            self.input_name = next(iter(inspect.signature(self.base).parameters), "input")
        except (TypeError, ValueError):
            self.input_name = "input"

    def __call__(self, *args: Any, **named: Any) -> Any:
        x: Any = args[0] if args else named.get(self.input_name)
        module = self.module
        if x.__class__ is Tensor and x.is_nested and any(state.working for state in self.states):
            _refuse_nested(module)
        if self.ahead:
            given = self._changed(module, x)
            args, named = ((given, *args[1:]), named) if args else (args, {**named, self.input_name: given})
        y = self._with_weights(args, named) if self.replacements else self.base(*args, **named)
        for update in self.updates:
            if update.state.working:
                y = update(module, x, y)
        return y

    def _changed(self, module: nn.Module, x: Tensor) -> Tensor:
        """The input, with what goes through the module's weight added."""
        changed = x
        for update in self.ahead:
            if update.state.working:
                changed = update(module, x, x.clone() if changed is x else changed)
        return changed

    def _with_weights(self, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Its own forward, which finds other weights; another thread that runs the module waits until they are restored."""
        at_work = [each for each in self.replacements if each.state.working]

        def restore() -> None:
            for each in reversed(at_work):
                each.restore(self.module)

        if is_traced():  # by what knows neither locks nor interrupts
            for each in at_work:
                each.replace(self.module)
            y = self.base(*args, **named)
            restore()
            return y
        with self._turn, at_exit(restore):
            for each in at_work:
                each.replace(self.module)
            y = self.base(*args, **named)
        return y  # noqa: RET504 - a return within the context is one more line that an interrupt may hit

    # Who takes part

    @property
    def states(self) -> dict[State, None]:
        """The adapters that do, in the order in which they came."""
        parts: list[ModuleUpdate | Replacement] = [*self.updates, *self.ahead, *self.replacements]
        return dict.fromkeys([each.state for each in parts])

    def join(
        self, updates: Iterable[ModuleUpdate], ahead: Iterable[ModuleUpdate], replacements: Iterable[Replacement]
    ) -> None:
        """Let an adapter take part."""
        self.updates, self.ahead = (*self.updates, *updates), (*self.ahead, *ahead)
        self.replacements = (*self.replacements, *replacements)
        self._bind()

    def leave(self, state: State) -> None:
        """Let an adapter do so no longer; with the last one the module has its own forward again."""
        self.updates = tuple([each for each in self.updates if each.state is not state])
        self.ahead = tuple([each for each in self.ahead if each.state is not state])
        self.replacements = tuple([each for each in self.replacements if each.state is not state])
        self._bind()
        if not self.states and self.module.__dict__.get("forward") is self:
            if self.before is None:
                del self.module.__dict__["forward"]
            else:
                self.module.__dict__["forward"] = self.before

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("module", "before", "updates", "ahead", "replacements")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._bind()

    def of_replica(self, module: nn.Module) -> ModuleForward:
        """The same for a copy of the module, as DataParallel makes one for each device and each pass."""
        copy = object.__new__(ModuleForward)
        copy.__dict__.update(self.__dict__, module=module, before=None)
        copy._bind()
        return copy


def forward_of(module: nn.Module) -> ModuleForward:
    """What stands before a module's own forward; new, and not yet there, if nothing does."""
    found = module.__dict__.get("forward")
    if isinstance(found, ModuleForward):
        return found
    former = _former.get(id(module))
    if former is not None and former.module is module and former.before is found:
        return former
    _former[id(module)] = made = ModuleForward(module)
    return made


# A compiled model asks whether a module has the very forward that it had: the next adapter takes over what a detached one left.
_former: WeakValueDictionary[int, ModuleForward] = WeakValueDictionary()


def _refuse_nested(module: nn.Module) -> None:
    raise AdapterError(
        f"a {type(module).__name__} with a site was given a nested tensor, to which no update can be added; build "
        "nn.TransformerEncoder with `enable_nested_tensor=False`, or call `torch.backends.mha.set_fastpath_enabled(False)`"
    )


class Mark:
    """A hook that does nothing, but keeps torch's own layers from a fast path that reads weights past their modules."""

    def __init__(self, state: State) -> None:
        self.state = state

    def __call__(self, module: nn.Module, args: Any) -> None: ...


class Root:
    """Tells an adapter that a forward pass of its model begins, or that it is over: the only hooks that it sets."""

    def __init__(self, state: State, told: Passes, *, begins: bool) -> None:
        self.state, self.told, self.begins = state, told, begins

    def __call__(self, model: nn.Module, *_: Any) -> None:
        if not self.begins:
            self.told.end()
            return
        if model is not self.state.model and getattr(model, "_is_replica", False):
            _bind_replica(model)
        self.told.begin()


class Passes(Protocol):
    """Who is told of passes."""

    def begin(self) -> None: ...

    def end(self) -> None: ...


def _bind_replica(model: nn.Module) -> None:
    """A replica has the attributes of the model: let its modules' forwards be its own."""
    for module in model.modules():
        found = module.__dict__.get("forward")
        if isinstance(found, ModuleForward) and found.module is not module:
            module.__dict__["forward"] = found.of_replica(module)


def set_root_hooks(model: nn.Module, state: State, told: Passes) -> None:
    """Let an adapter be told of the passes of a model."""
    model.register_forward_pre_hook(Root(state, told, begins=True))
    model.register_forward_hook(Root(state, told, begins=False), always_call=True)


def remove_root_hooks(model: nn.Module, state: State) -> None:
    """Let it be told no longer."""
    remove_forward_hooks(model, lambda hook: isinstance(hook, Root) and hook.state is state)


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is an adapter."""
    return isinstance(module.__dict__.get("state"), State)


def adapters(model: nn.Module) -> list[Any]:
    """The adapters attached to a model, in the order in which they were attached."""
    return [child for child in model.children() if is_adapter(child)]
