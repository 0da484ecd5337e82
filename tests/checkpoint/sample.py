"""A small model, an adapter with every kind of factor, and its file taken apart and put together again.

The format is written out here a second time, so that the tests hold the library to it and not to itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

import tensorpeft as tp

FILE = "adapter.safetensors"
SPEC = """\
tensorpeft: 1
name: sample
target: {matrices: [up, down]}
rank: {r: 3}
update: B[matrix, layer, d_out, r] * d[layer, r] * A[r, d_in]
factors:
  B: {init: zeros}
  d: {init: ones, frozen: true, stored: true}
  A: {init: kaiming_uniform, frozen: true}
mask:
  B[d_out]: keep(5)
seed: 7
"""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Residual(nn.Module):
    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def model(width: int = 8, layers: int = 2) -> nn.Module:
    """A residual network with weights that are the same at every call."""
    torch.manual_seed(0)
    return Residual(width, layers)


def adapter_on(base: nn.Module) -> tp.Adapter:
    """The sample adapter, its trained factor filled with exact fractions."""
    adapter = tp.attach(base, SPEC)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_((torch.arange(parameter.numel()) % 17 - 8).view(parameter.shape) / 16)
    return adapter


def outputs(base: nn.Module) -> Tensor:
    return base(torch.arange(24.0).view(3, 8) / 24)


def state(base: nn.Module) -> dict[str, Any]:
    """Everything of a model that an attach could change, in a form that compares by value."""
    tensors = [*base.named_parameters(), *base.named_buffers()]
    return {
        "tensors": [(name, t.dtype, t.requires_grad, id(t), t.detach().numpy().tobytes()) for name, t in tensors],
        "keys": list(base.state_dict()),
        "modules": [(name, type(m), m.training, sorted(m.__dict__)) for name, m in base.named_modules()],
        "hooks": [
            (name, key, list(value))
            for name, m in base.named_modules()
            for key, value in m.__dict__.items()
            if "hooks" in key and value is not None
        ],
        "random": torch.get_rng_state().tolist(),
    }


@dataclass
class Parts:
    """A file's header and tensors."""

    header: dict[str, Any]
    tensors: dict[str, Tensor]

    def write(self, folder: Path, *, sign: bool = True) -> None:
        """Put the file together; ``sign`` gives the header the SHA-256 that it should have."""
        if sign:
            self.header["sha256"] = signature(self.header)
        (folder / FILE).write_bytes(save(self.tensors, {"tensorpeft": canonical(self.header)}))

    def set(self, name: str, tensor: Tensor) -> None:
        """Another tensor, of which the header knows."""
        self.tensors[name] = tensor
        self.header["factors"][name].update(
            dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape), sha256=digest(tensor)
        )


def parts(folder: Path) -> Parts:
    with safe_open(folder / FILE, framework="pt") as file:
        return Parts(json.loads(file.metadata()["tensorpeft"]), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118


def canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def signature(header: dict[str, Any]) -> str:
    return sha256(canonical({key: value for key, value in header.items() if key != "sha256"}).encode()).hexdigest()


def digest(tensor: Tensor) -> str:
    line = f"{str(tensor.dtype).removeprefix('torch.')}[{','.join(map(str, tensor.shape))}]\n"
    return sha256(line.encode() + tensor.numpy().tobytes()).hexdigest()
