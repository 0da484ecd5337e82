"""Header and tensors <-> one file, ``adapter.safetensors``.

The file is replaced as a whole: whoever reads meets the old one or the new one. Reading trusts nothing of it: no
pickle, no name that is imported or looked up, and each tensor is held to the shape, dtype and digest of the header.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from tensorpeft.checkpoint.header import DTYPES, Header, SavedFactor, header_text, parse_header
from tensorpeft.checkpoint.whole import write_whole
from tensorpeft.language.errors import CheckpointError, SpecError, did_you_mean, listing

FILE = "adapter.safetensors"
_MASK = "mask."  # before the name of a factor: no factor's name has a dot
_KEY = "tensorpeft"  # the one entry of the file's metadata: safetensors writes several in no order that lasts


@dataclass(frozen=True)
class Saved:
    """The content of a file. The tensors are those of the stored factors, on the CPU.

    ``indices`` are what masks keep of some factors, where the spec alone does not tell it (``network.mask_packing.indices``).
    """

    path: Path
    header: Header
    tensors: dict[str, Tensor]
    indices: dict[str, np.ndarray]


def write(
    folder: Path, header: Header, tensors: Mapping[str, Tensor], indices: Mapping[str, np.ndarray] | None = None
) -> Path:
    """Write ``folder/adapter.safetensors``, and say where it is. An error leaves the file that was there.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    masks = {_MASK + name: torch.from_numpy(kept) for name, kept in (indices or {}).items()}
    content = serialise({**tensors, **masks}, {_KEY: header_text(header)})
    write_whole(folder / FILE, content)
    return folder / FILE


def read(folder: Path) -> Saved:
    """Read ``folder/adapter.safetensors``, if it is whole, undamaged, and of finite numbers.

    Raises:
        CheckpointError: there is none, or it is not that.
    """
    path = folder / FILE
    with blamed_on(path), _opened(path) as file:
        metadata = file.metadata() or {}
        if _KEY not in metadata:
            raise CheckpointError(f"this safetensors file is no adapter of tensorpeft: it has no metadata `{_KEY}`")
        header = parse_header(metadata[_KEY])
        stored = {name: factor for name, factor in header.factors.items() if factor.stored}
        found = set(file.keys())
        masks = {_MASK + name: name for name, factor in header.factors.items() if factor.mask and _MASK + name in found}
        _check_names(stored, found - masks.keys())
        tensors = {name: _tensor(file, name, factor) for name, factor in stored.items()}
        indices = {name: _indices(file, key) for key, name in masks.items()}
    return Saved(path, header, tensors, indices)


@contextmanager
def blamed_on(path: Path) -> Iterator[None]:
    """Within this context an error of a file, or of the spec in it, becomes one that starts with the file's path."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    except SpecError as error:
        raise CheckpointError(f"{path}: its spec does not load, or does not fit this model\n{error}") from error


def digest(tensor: Tensor) -> str:
    """SHA-256 of a CPU tensor: a line such as ``float32[8,64]``, then its numbers in C order, little-endian."""
    shape = ",".join(map(str, tensor.shape))
    whole_numbers = tensor.contiguous().view(_BITS[tensor.dtype.itemsize]).numpy()  # numpy has no bfloat16
    numbers = whole_numbers.astype(whole_numbers.dtype.newbyteorder("<"), copy=False)
    return sha256(f"{dtype_name(tensor)}[{shape}]\n".encode() + numbers.tobytes()).hexdigest()


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_name(tensor: Tensor) -> str:
    """``float32``."""
    return str(tensor.dtype).removeprefix("torch.")


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        is_file, parent_is_file = path.is_file(), path.parent.is_file()
    except (OSError, ValueError) as error:  # a name that is too long, or has a null character
        raise _unreadable(error) from error
    if parent_is_file:
        raise CheckpointError(f"`{path.parent}` is a file; give the folder that `{FILE}` lies in")
    if not is_file:
        raise CheckpointError("there is no such file; `adapter.save(folder)` writes it")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        raise _unreadable(error) from error
    except SafetensorError as error:
        found = f"found {path.stat().st_size:,} bytes that are no whole safetensors file"
        raise CheckpointError(f"{found}; it is damaged, cut off, or of another kind") from error


def _unreadable(error: OSError | ValueError) -> CheckpointError:
    return CheckpointError(f"it cannot be read: {(getattr(error, 'strerror', None) or str(error)).lower()}")


def _check_names(stored: Mapping[str, SavedFactor], found: set[str]) -> None:
    if missing := sorted(stored.keys() - found):
        raise CheckpointError(f"it lacks the factor {listing(missing)}; found {listing(sorted(found)) or 'no tensor'}")
    if extra := sorted(found - stored.keys()):
        name = extra[0][:60]
        raise CheckpointError(f"it has a tensor `{name}`, which is no stored factor of it{did_you_mean(name, stored)}")


def _tensor(file: safe_open, name: str, factor: SavedFactor) -> Tensor:
    """A tensor of the file, if it is as the header says. What the file says of it is checked before it is read."""
    place = file.get_slice(name)
    if place.get_dtype() != DTYPES[factor.dtype]:
        raise CheckpointError(f"factor `{name}` is {place.get_dtype()}, expected {DTYPES[factor.dtype]}")
    if tuple(place.get_shape()) != factor.shape:
        raise CheckpointError(f"factor `{name}` has shape {tuple(place.get_shape())}, expected {factor.shape}")
    tensor: Tensor = file.get_tensor(name).clone()  # its own memory, not the file's
    check_digest(tensor, factor, f"factor `{name}` is damaged")
    if bad := int((~tensor.isfinite()).sum()):
        raise CheckpointError(f"factor `{name}` has numbers that are not finite, {bad} of {tensor.numel()}")
    return tensor


def _indices(file: safe_open, key: str) -> np.ndarray:
    """The kept indices of a masked factor; they are held to the digest of its mask later, by ``compatibility``."""
    place = file.get_slice(key)
    if place.get_dtype() != "I64" or len(place.get_shape()) != 1:
        found = f"{place.get_dtype()} of shape {tuple(place.get_shape())}"
        raise CheckpointError(f"the indices `{key}` are {found}, expected a list of I64")
    indices: np.ndarray = file.get_tensor(key).numpy().copy()
    return indices


def check_digest(tensor: Tensor, factor: SavedFactor, otherwise: str) -> None:
    """Hold a tensor to a factor's digest.

    Raises:
        CheckpointError: it has another; the message starts with ``otherwise``.
    """
    found = digest(tensor)
    if found != factor.sha256:
        raise CheckpointError(f"{otherwise}: its SHA-256 is {found[:12]}..., expected {factor.sha256[:12]}...")
