"""Parameters of the base that an adapter trains beside dW: the model's own, thawed, and the values that they had."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tensorpeft.language.errors import AdapterError


class Extras(nn.Module):
    """The parameters by their paths in the model. Each is one ``nn.Parameter`` with two owners, the model and this module.

    A state dict has it as the model's alone; here ``parameters()`` finds it, for an optimizer of the adapter's.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        super().__init__()
        self.paths = tuple(paths)
        self.base: dict[str, Tensor] = {}  # while attached: the values that the model had
        self._thawed: list[str] = []

    def __getitem__(self, path: str) -> nn.Parameter:
        parameter = self._parameters[_name(path)]
        assert parameter is not None
        return parameter

    def __setitem__(self, path: str, parameter: nn.Parameter) -> None:
        self.register_parameter(_name(path), parameter)

    def attach(self, model: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Take the parameters of a model over and thaw them, with other values where some are given: all of them or none.

        Raises:
            AdapterError: a parameter is quantised, or its value is of another shape, or would be lost on the meta device.
        """
        found = {path: model.get_parameter(path) for path in self.paths}
        for path, parameter in found.items():
            if not parameter.is_floating_point():
                raise AdapterError(f"`{path}` is {parameter.dtype}, so it cannot be trained")
            if path in values and parameter.is_meta:
                raise AdapterError("the model's weights are on the meta device: load them before the adapter")
            if path in values and values[path].shape != parameter.shape:
                raise AdapterError(
                    f"the saved `{path}` has shape {tuple(values[path].shape)}, expected {tuple(parameter.shape)}"
                )
        for path, parameter in found.items():
            self[path] = parameter
            self.base[path] = parameter.detach()
            parameter.data = values.get(path, parameter.detach()).to(parameter.device, parameter.dtype, copy=True)
            if not parameter.requires_grad:
                self._thawed.append(path)
                parameter.requires_grad_(True)

    def detach(self, *, keep: bool) -> None:
        """Give the parameters back, with the values they had or, to ``keep`` them, the trained ones. The latter stay here."""
        for path in [path for path in self.paths if path in self.base]:
            parameter = self[path]
            trained = parameter.detach()
            self[path] = nn.Parameter(trained.clone() if keep else trained)
            if not keep:
                parameter.data = self.base[path]
            parameter.requires_grad_(path not in self._thawed)
        self.base, self._thawed = {}, []

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Within this context the model has the values of the base."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for path, values in self.base.items():
            parameter = self[path]
            self.base[path], parameter.data = parameter.detach(), values

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the parameters to the values that the model had."""
        for path, values in self.base.items():
            self[path].copy_(values)

    # What nn.Module asks for

    def forward(self, x: Any) -> Any:
        """The input as it is."""
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Extras:
        super()._apply(fn, recurse)
        self.base = {path: fn(values) for path, values in self.base.items()}
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: a state dict has these parameters as the model's."""

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing, for the same reason."""


def _name(path: str) -> str:
    """A path as the name of a parameter, which has no dots."""
    return path.replace(".", "/")
