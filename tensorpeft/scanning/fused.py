"""Weights of query, key and value together in models of no known family, where the class around them is known to cut them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from torch import nn

from tensorpeft.model.roles import fused_layouts
from tensorpeft.model.shape import Linear, Rows

_HEADS = ("num_heads", "num_attention_heads")


def parts(linear: Linear, modules: Mapping[str, nn.Module]) -> Iterator[Linear]:
    """The weight as it is, or its parts (``specs/models/conventions/fused.yaml``)."""
    path, _, name = linear.module.rpartition(".")
    owner: Any = modules[path]
    owner_class: Any = type(owner)
    layout = _layout(owner_class, name) if linear.module and linear.kind == "linear" else None
    blocks = _blocks(layout["blocks"], owner) if layout else 0
    if layout is None or not blocks or linear.d_out % (len(layout["order"]) * blocks):
        yield linear
        return
    count = linear.d_out // (len(layout["order"]) * blocks)
    for n, part in enumerate(layout["order"]):
        rows = Rows(n * count, count, linear.d_out // blocks)
        yield Linear(linear.module, blocks * count, linear.d_in, part=part, rows=rows)


@cache
def _layout(module_class: type[nn.Module], name: str) -> Mapping[str, Any] | None:
    """How the classes of transformers, and what is made of them, cut the output of a module of some name."""
    known = {each.__name__ for each in module_class.__mro__ if each.__module__.startswith("transformers.")}
    return next((layout for layout in fused_layouts() if not known.isdisjoint(layout["of"].get(name, ()))), None)


def _blocks(told: int | str, owner: Any) -> int:
    if isinstance(told, int):
        return told
    return next((number for name in _HEADS if isinstance(number := getattr(owner, name, None), int)), 0)
