"""Parameters of the base that an adapter trains beside dW: the model's own, thawed, and the values that they had."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensorpeft.language.errors import AdapterError
from tensorpeft.runtime.ledger import BaseParameter, entry


class TrainedBase(nn.Module):
    """The parameters by their paths in the model. Each is one ``nn.Parameter`` with two owners, the model and this module.

    A state dict has it as the model's alone; here ``parameters()`` finds it, for an optimizer of the adapter's. A normalisation
    whose parameters are trained moves its statistics too: these buffers are kept, saved and given back alike.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        super().__init__()
        self.paths = tuple(paths)
        self.base: dict[str, Tensor] = {}  # while attached: the values that the model had, of parameters and of buffers
        self._aside: dict[str, Tensor] = {}  # while the model has the base's values: the trained ones
        self._leaving: dict[str, Tensor] = {}  # while it is detached
        self._entries: dict[str, BaseParameter] = {}
        self._model: list[nn.Module] = []  # out of nn.Module's sight

    def __getitem__(self, path: str) -> nn.Parameter:
        parameter = self._parameters[_name(path)]
        assert parameter is not None
        return parameter

    @property
    def statistics(self) -> tuple[str, ...]:
        """The paths of the buffers that go along."""
        return tuple(path for path in self.base if path not in self.paths)

    def value(self, path: str) -> Tensor:
        """What is trained, of a parameter or a buffer, also while the model has the base's values."""
        return self._aside[path] if path in self._aside else self._now(path)

    # Attach and detach

    def attach(self, model: nn.Module, holder: object, values: Mapping[str, Tensor]) -> None:
        """Take the parameters of a model over and thaw them, with other values where some are given.

        Raises:
            AdapterError: a parameter is quantised or trained by another adapter, or its value is of another shape, or would be
                lost on the meta device. Then nothing has changed.
        """
        found = {path: model.get_parameter(path) for path in self.paths}
        for path, parameter in found.items():
            _check(path, parameter, values.get(path))
        self._model = [model]
        for path in (*found, *_statistics(model, self.paths)):
            self.base[path] = self._now(path).detach() if path in found else self._now(path).clone()
        for path, parameter in found.items():
            mine = self._entries[path] = entry(parameter)
            mine.trainer = holder
            mine.hold(holder)
            self.register_parameter(_name(path), parameter)
            given = values.get(path, self.base[path])
            parameter.data = given.to(parameter.device, parameter.dtype, copy=True)
        for path in self.statistics:
            if path in values:
                self._now(path).copy_(values[path])

    def detach(self, holder: object, *, keep: bool) -> None:
        """Give the parameters back, with the values they had or, to ``keep`` them, the trained ones. The latter stay here."""
        if not self._leaving:  # once: an interrupt may bring us here again, when some are given back
            self._leaving = {path: self.value(path).detach().clone() for path in self.base}
        for path, mine in list(self._entries.items()):
            parameter, trained = mine.parameter, self._leaving[path]
            self.register_parameter(_name(path), nn.Parameter(trained.clone() if keep else trained))
            parameter.data = trained if keep else self.base[path]
            mine.let_go(holder)
            del self._entries[path]
        for path in self.statistics:
            self._now(path).copy_(self._leaving[path] if keep else self.base[path])
        self.base, self._aside, self._leaving, self._model = {}, {}, {}, []

    def follow(self) -> None:
        """Notice that the model has other parameters in the place of these, as ``load_state_dict(assign=True)`` leaves it.

        Raises:
            AdapterError: one is of another shape.
        """
        for path, mine in self._entries.items():
            now = self._owner(path)._parameters.get(path.rpartition(".")[2])
            is_for_one_call = now is not None and not (
                isinstance(now, nn.Parameter) and now.is_leaf
            )  # functional_call's
            if now is mine.parameter or is_for_one_call:
                continue
            if now is None or now.shape != mine.parameter.shape:
                found = "gone" if now is None else f"replaced by one of shape {tuple(now.shape)}"
                raise AdapterError(
                    f"`{path}`, which is trained, was {found} after attach; detach the adapter and attach it again"
                )
            mine.move(now)
            self.register_parameter(_name(path), now)

    # Values

    def show(self, *, trained: bool) -> None:
        """Let the model have the trained values, or those of the base. Doing it again does no harm."""
        for path, values in self.base.items():
            if not trained:
                now = self._now(path)
                self._aside.setdefault(path, now.detach() if path in self._entries else now.clone())
                self._put(path, values)
            elif path in self._aside:
                self._put(path, self._aside[path])
                self._aside.pop(path, None)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set what is trained to the values that the model had."""
        for path, values in self.base.items():
            self.value(path).copy_(values)

    def _put(self, path: str, values: Tensor) -> None:
        if path in self._entries:
            self._entries[path].parameter.data = values
        else:
            self._now(path).copy_(values)

    def _owner(self, path: str) -> nn.Module:
        return self._model[0].get_submodule(path.rpartition(".")[0])

    def _now(self, path: str) -> Tensor:
        """What the model has there."""
        if path in self._entries:
            return self._entries[path].parameter
        found: Tensor = getattr(self._owner(path), path.rpartition(".")[2]) if self._model else self[path]
        return found

    # What nn.Module asks for

    def forward(self, x: Any) -> Any:
        """The input as it is."""
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainedBase:
        super()._apply(fn, recurse)
        self.base = {path: fn(values) for path, values in self.base.items()}
        self._aside = {path: fn(values) for path, values in self._aside.items()}
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: a state dict has these parameters as the model's."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing, for the same reason."""


def _check(path: str, parameter: nn.Parameter, value: Tensor | None) -> None:
    mine = entry(parameter)
    if mine.trainer is not None:
        name = getattr(mine.trainer, "name", "")
        raise AdapterError(f"`{path}` is trained by adapter `{name}` already; detach that one first")
    if mine.additions:
        raise AdapterError(f"`{path}` is to be trained, but an adapter is merged into it; unmerge that one first")
    if not parameter.is_floating_point():
        raise AdapterError(f"`{path}` is {parameter.dtype}, so it cannot be trained")
    if value is not None and parameter.is_meta:
        raise AdapterError("the model's weights are on the meta device: load them before the adapter")
    if value is not None and value.shape != parameter.shape:
        raise AdapterError(f"the saved `{path}` has shape {tuple(value.shape)}, expected {tuple(parameter.shape)}")


def _statistics(model: nn.Module, paths: Iterable[str]) -> dict[str, None]:
    """The persistent buffers of the normalisations that have one of these parameters."""
    owners = dict.fromkeys(path.rpartition(".")[0] for path in paths)
    found: dict[str, None] = {}
    for owner in owners:
        module = model.get_submodule(owner)
        if "norm" in type(module).__name__.lower():
            names = [name for name, buffer in module._buffers.items() if buffer is not None]
            lasting = [name for name in names if name not in module._non_persistent_buffers_set]
            found |= dict.fromkeys(f"{owner}.{name}".removeprefix(".") for name in lasting)
    return found


def _name(path: str) -> str:
    """A path as the name of a parameter, which has no dots."""
    return path.replace(".", "/")
