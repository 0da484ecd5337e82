"""The stored tensors of an adapter: one parameter or buffer per block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tensorpeft.language.errors import AdapterError, fail
from tensorpeft.language.spec import SITE_MODES
from tensorpeft.model.shape import Key
from tensorpeft.network.initialisers import initial_values
from tensorpeft.network.network import Block, Network
from tensorpeft.network.sharing import first_reference


class Factors(nn.Module):
    """The blocks of a network. Trained ones are parameters; frozen ones are buffers, in the state dict if they are stored."""

    def __init__(self, network: Network, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        for block in network.blocks:
            if hasattr(self, block.name):
                message = f"the factor name `{block.name}` is taken by torch.nn.Module; choose another"
                raise fail(message, first_reference(network.spec, block.factor).span)
            tensor = torch.empty(block.shape, dtype=dtype, device=device)
            if block.trainable:
                self.register_parameter(block.name, nn.Parameter(tensor))
            else:
                self.register_buffer(block.name, tensor, persistent=not block.seeded)

    def extra_repr(self) -> str:
        named = [*self.named_parameters(), *((f"{name}, frozen", buffer) for name, buffer in self.named_buffers())]
        return "\n".join(f"{name}: {' x '.join(map(str, tensor.shape))}" for name, tensor in named)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of a block."""
        tensor = getattr(self, name)
        assert isinstance(tensor, Tensor)
        return tensor

    def holder(self, name: str) -> dict[str, Any]:
        """Where torch keeps the tensor of a block: to look there takes no call."""
        return self._parameters if name in self._parameters else self._buffers

    def tensors(self) -> list[Tensor]:
        """All of them, trained and frozen."""
        return [*self.parameters(), *self.buffers()]

    def refuse_thawed(self, name: str) -> None:
        """Nothing computes a gradient of what the spec freezes.

        Raises:
            AdapterError: it is to have one.
        """
        raise AdapterError(
            f"factor `{name}` is frozen by its spec, found `requires_grad`; to train it, let the spec not freeze it"
        )

    def fill(self, block: Block, seed: int) -> None:
        """Set a block to its initial values, if they do not come from the base weight."""
        if not block.data_dependent and not block.rule.norm:
            _fill(self[block.name], block, seed)

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Replace the tensors of blocks by others of their shapes: the dtype is the new tensor's, the device stays.

        Raises:
            AdapterError: the device is the meta device, on which the values would be lost.
        """
        for name, value in values.items():
            tensor = self[name]
            if tensor.is_meta:
                raise AdapterError("the model's weights are on the meta device: load them before the adapter")
            tensor.data = value.to(tensor.device)


def initial_tensor(block: Block, seed: int, dtype: torch.dtype) -> Tensor:
    """What a block starts from, on the CPU."""
    tensor = torch.empty(block.shape, dtype=dtype, device="cpu")
    _fill(tensor, block, seed)
    return tensor


@torch.no_grad()
def _fill(tensor: Tensor, block: Block, seed: int) -> None:
    """Set a tensor to a block's initial values; each is computed in float64 and rounded once."""
    if tensor.is_meta:
        return
    for rows, (_, values) in zip(key_views(tensor, block), initial_values(block, seed), strict=True):
        if isinstance(values, np.ndarray):
            rows.copy_(torch.from_numpy(values))
        else:
            rows.fill_(values)


def key_views(tensor: Tensor, block: Block) -> list[Tensor]:
    """For each key of a block, the view of the tensor that holds its values."""
    if block.packed:
        parts = tensor.split(block.key_sizes)
        return [part.view(block.key_shape(key)) for part, key in zip(parts, block.keys, strict=True)]
    bound = [i for i, axis in enumerate(block.axes) if axis.labels is not None]
    views = []
    for key in block.keys:
        view = tensor
        for i in reversed(bound):
            labels = block.axes[i].labels
            assert labels is not None
            view = view.select(i, labels.index(key) if block.axes[i].mode == "site" else _position(block, i, key))
        views.append(view)
    return views


def _position(block: Block, axis: int, key: Key) -> int:
    bound = block.axes[axis]
    assert bound.labels is not None
    order = [mode for mode in SITE_MODES if mode in {a.mode for a in block.axes}]  # of a key
    return bound.labels.index(key[order.index(bound.mode)])
