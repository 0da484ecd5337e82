"""An adapter -> what its file holds, and back."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tensorpeft import __version__
from tensorpeft.checkpoint.files import Saved, check_digest, digest, dtype_name, write
from tensorpeft.checkpoint.fit import mask_digest, stored_name
from tensorpeft.checkpoint.header import DTYPES, Header, SavedFactor
from tensorpeft.language.errors import AdapterError
from tensorpeft.model.target import choose, site_rows
from tensorpeft.network.mask_packing import from_file, indices
from tensorpeft.network.network import Block, Network
from tensorpeft.runtime.factors import initial_tensor

if TYPE_CHECKING:
    from tensorpeft.runtime.adapter import Adapter


def save(adapter: Adapter, folder: str | PathLike[str]) -> Path:
    """Write an adapter's file. A factor that the spec's seed gives, number for number, is described but not held."""
    network = adapter.network
    tensors = {block.name: _values(adapter, block.name, adapter.factors[block.name]) for block in network.blocks}
    factors = {block.name: _described(tensors[block.name], block, network.spec.seed) for block in network.blocks}
    for path in adapter.extras.paths:
        name, parameter = stored_name(path), adapter.extras[path]
        tensors[name] = tensor = _values(adapter, name, parameter)
        factors[name] = SavedFactor(dtype_name(tensor), tuple(tensor.shape), digest(tensor), True, None)
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


def _values(adapter: Adapter, factor: str, tensor: Tensor) -> Tensor:
    """The numbers of a tensor, on the CPU, if they are worth a file."""
    tensor = tensor.detach()
    name = f"factor `{factor}` of adapter `{adapter.name}`"
    if tensor.is_meta:
        raise AdapterError(f"{name} is on the meta device: it has no values to save")
    if dtype_name(tensor) not in DTYPES:
        raise AdapterError(f"{name} is {dtype_name(tensor)}, expected one of {', '.join(DTYPES)}; nothing was saved")
    if not tensor.isfinite().all():
        raise AdapterError(f"{name} has values that are not finite; nothing was saved")
    return tensor.cpu().contiguous()


def _described(tensor: Tensor, block: Block, seed: int) -> SavedFactor:
    # a change of dtype after attach, or the user's own hand, can make a frozen factor differ from what its seed gives
    stored = not (block.seeded and torch.equal(tensor, initial_tensor(block, seed, tensor.dtype)))
    return SavedFactor(dtype_name(tensor), tuple(tensor.shape), digest(tensor), stored, mask_digest(block))
