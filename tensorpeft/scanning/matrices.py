"""Which modules of torch hold a weight that acts as a matrix, and how the weight lies in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import nn

from tensorpeft.model.shape import Linear, Rows
from tensorpeft.runtime.hooks import ModuleForward

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def linears(path: str, module: nn.Module) -> Iterator[Linear]:
    """The matrices that a module's own weights are. None in a convolution with groups, which is no one matrix."""
    if isinstance(module, nn.MultiheadAttention):
        yield from _attention(path, module)
    elif isinstance(module, nn.Embedding):
        yield _embedding(path, module)
    elif isinstance(module, CONVOLUTIONS):
        if module.groups == 1:
            matrix = module.out_channels, module.in_channels * prod(module.kernel_size)
            yield Linear(path, *matrix, "conv") if is_plain(module) else Linear(path, *matrix, "parameter", "weight")
    elif (sides := _sides(module)) and not is_router(module):
        if is_plain(module) or not _has_numbers(module):
            yield Linear(path, *sides)
        elif "weight" in module._parameters:  # it does more than W x: its weight is replaced then
            yield Linear(path, *sides, "parameter", "weight", transposed=hasattr(module, "nf"))
    elif not is_norm(module):
        yield from _own(path, module)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer, by the name of its class, which no interface tells."""
    return "norm" in type(module).__name__.lower()


def is_router(module: nn.Module) -> bool:
    """Whether a linear module gives more than a product, the experts that it chose, by the name of its class."""
    return "router" in type(module).__name__.lower()


def _sides(module: nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of nn.Linear, its quantised kin and transformers' Conv1D; None for any other module."""
    weight = getattr(module, "weight", None)
    weight = getattr(module, "qweight", None) if weight is None else weight
    if getattr(weight, "ndim", 0) != 2:
        return None
    for d_out, d_in in (("out_features", "in_features"), ("nf", "nx")):
        sides = getattr(module, d_out, None), getattr(module, d_in, None)
        if isinstance(sides[0], int) and isinstance(sides[1], int):
            return sides[0], sides[1]
    return None


def is_plain(module: nn.Module) -> bool:
    """Whether a module's forward is known to be that of its kind: W x + b, a convolution, a look-up of rows.

    What another library has put in the place of a module's forward is not known, but for accelerate's, which moves tensors.
    """
    own = module.__dict__.get("forward")
    is_known = own is None or (isinstance(own, ModuleForward) and own.before is None)
    if not (is_known or hasattr(module, "_hf_hook")):
        return False
    forward = type(module).forward
    return forward in _PLAIN or f"{forward.__module__}.{forward.__qualname__}" in _PLAIN_BY_NAME


_PLAIN = {each.forward for each in (nn.Linear, nn.Embedding, *CONVOLUTIONS)}
_PLAIN_BY_NAME = {
    "transformers.pytorch_utils.Conv1D.forward",
    "transformers.models.falcon.modeling_falcon.FalconLinear.forward",
}


def _has_numbers(module: nn.Module) -> bool:
    """Whether its weight is a matrix of plain numbers, and not of the codes of a quantised one."""
    weight: Any = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1


def _embedding(path: str, module: nn.Embedding) -> Linear:
    """A class of its own may scale the rows, or look others up than it is given: then it reads its weight, to us, by itself."""
    plain = Linear(path, module.embedding_dim, module.num_embeddings, "embedding")
    return plain if is_plain(module) else replace(plain, kind="parameter", parameter="weight", transposed=True)


def _attention(path: str, module: nn.MultiheadAttention) -> Iterator[Linear]:
    """It reads the weights of query, key and value, one after the other in one parameter, and that of its `out_proj`."""
    width, heads = module.embed_dim, module.num_heads
    fused = module.in_proj_weight is not None
    for n, (part, d_in) in enumerate((("query", width), ("key", module.kdim), ("value", module.vdim))):
        parameter = "in_proj_weight" if fused else f"{part[0]}_proj_weight"
        rows = Rows(n * width, width, 3 * width) if fused else None
        yield Linear(path, width, d_in, "parameter", parameter, part, heads, "d_out", rows)
    yield Linear(path, width, width, "parameter", "out_proj.weight", "out", heads, "d_in")


def _own(path: str, module: nn.Module) -> Iterator[Linear]:
    """The parameters that a module of no known class reads by itself: its `weight`, as of a router, and those of experts."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 2 and name == "weight":
            yield Linear(path, parameter.shape[0], parameter.shape[1], "parameter", name)
        elif parameter.dim() == 3 and "expert" in type(module).__name__.lower():
            yield from _experts(path, module, name, tuple(parameter.shape))


def _experts(path: str, module: Any, name: str, shape: tuple[int, ...]) -> Iterator[Linear]:
    """A parameter of one matrix for each expert. Where the module does not say it is transposed, its rows are outputs."""
    transposed = bool(getattr(module, "is_transposed", False))
    experts, *sides = shape
    d_out, d_in = reversed(sides) if transposed else sides
    role = name.removesuffix("_proj")
    parts: dict[str | None, Rows | None] = {role if role in ("gate", "up", "down") else None: None}
    if "gate_up" in name and d_out % 2 == 0:
        half = (d_out // 2, d_out) if getattr(module, "is_concatenated", True) else (1, 2)
        parts = {"gate": Rows(0, *half), "up": Rows(half[0], *half)}
    for part, rows in parts.items():
        whole = Linear(path, d_out // len(parts), d_in, "parameter", name, part, rows=rows)
        yield replace(whole, experts=experts, transposed=transposed)
