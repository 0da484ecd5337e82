"""An adapter -> what its file holds, and back."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from tensorpeft.checkpoint.compatibility import stored_name
from tensorpeft.checkpoint.files import Saved, check_digest, digest, dtype_name, write
from tensorpeft.checkpoint.header import DTYPES, Header, SavedFactor
from tensorpeft.language.errors import AdapterError
from tensorpeft.model.target import choose, site_rows
from tensorpeft.network.mask_packing import from_file, indices
from tensorpeft.network.network import Block, Network
from tensorpeft.runtime.factors import initial_tensor
from tensorpeft.runtime.state import State
from tensorpeft.version import __version__


def save(state: State, folder: str | PathLike[str]) -> Path:
    """Write an adapter's file. A factor that the spec's seed gives, number for number, is described but not held.

    Everything is copied first, and checked, digested and written from that copy: another thread may go on training.
    """
    network = state.network
    tensors = {block.name: _values(state, block.name, state.factors[block.name]) for block in network.blocks}
    for path in (*state.trained.paths, *state.trained.statistics):
        tensors[stored_name(path)] = _values(state, stored_name(path), state.trained.value(path))
    blocks = {block.name: block for block in network.blocks}
    factors = {
        name: _described(tensor, blocks[name], network.spec.seed) if name in blocks else _of_base(tensor)
        for name, tensor in tensors.items()
    }
    header = Header(
        spec=str(network.spec),
        model=network.model.name,
        sites=site_rows(choose(network.spec.target, network.model)),
        factors=factors,
        library=__version__,
    )
    masks = {b.name: indices(b) for b in network.blocks if b.packed and from_file(network.spec, b.factor)}
    return write(Path(folder), header, {name: tensors[name] for name in tensors if factors[name].stored}, masks)


def restored(saved: Saved, network: Network) -> dict[str, Tensor]:
    """The tensor of every block: those of the file, and those that the seed gives, held to the digests of the file.

    Raises:
        CheckpointError: the seed gives other numbers than when the adapter was saved.
    """
    values = dict(saved.tensors)
    for block in network.blocks:
        if block.name not in values:
            factor = saved.header.factors[block.name]
            values[block.name] = initial_tensor(block, network.spec.seed, getattr(torch, factor.dtype))
            check_digest(
                values[block.name], factor, f"factor `{block.name}` of seed {network.spec.seed} is not what was saved"
            )
    return values


def _values(state: State, factor: str, tensor: Tensor) -> Tensor:
    """The numbers of a tensor, on the CPU, if they are worth a file."""
    name = f"factor `{factor}` of adapter `{state.name}`"
    if tensor.is_meta:
        raise AdapterError(f"{name} is on the meta device: it has no values to save")
    if dtype_name(tensor) not in DTYPES:
        floating = ", ".join(dtype for dtype in DTYPES if "float" in dtype)  # a normalisation alone counts in integers
        raise AdapterError(f"{name} is {dtype_name(tensor)}, expected one of {floating}; nothing was saved")
    copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if not copy.isfinite().all():
        raise AdapterError(f"{name} has values that are not finite; nothing was saved")
    return copy


def _of_base(tensor: Tensor) -> SavedFactor:
    return SavedFactor(dtype_name(tensor), tuple(tensor.shape), digest(tensor), True, None)


def _described(tensor: Tensor, block: Block, seed: int) -> SavedFactor:
    # a change of dtype after attach, or the user's own hand, can make a frozen factor differ from what its seed gives
    stored = not (block.seeded and torch.equal(tensor, initial_tensor(block, seed, tensor.dtype)))
    return SavedFactor(dtype_name(tensor), tuple(tensor.shape), digest(tensor), stored, block.mask_digest)
