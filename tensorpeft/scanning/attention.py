"""Attentions of models of no known family: the parts of fused weights, and the heads, as their modules and configs tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

from torch import nn

from tensorpeft.model.roles import fused_layouts
from tensorpeft.model.shape import Linear, Rows, Site

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_KEYS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", *_HEADS)
_OF_ROLE = {"query": ("d_out", _HEADS), "key": ("d_out", _KEYS), "value": ("d_out", _KEYS), "out": ("d_in", _HEADS)}


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
    numbers = [told] if isinstance(told, int) else [getattr(owner, name, None) for name in _HEADS]
    return next((number for number in numbers if isinstance(number, int)), 0)


def with_heads(site: Site, modules: Mapping[str, nn.Module]) -> Site:
    """A site of an attention with the heads that the nearest module around it tells, where their number divides the side."""
    role = site.matrix.rpartition(".")[2]
    if site.heads is not None or role not in _OF_ROLE:
        return site
    side, keys = _OF_ROLE[role]
    heads = _told(site.module, modules, keys)
    if heads is None or getattr(site, side) % heads:
        return site
    return replace(site, heads=heads, head_side=side)


def _told(path: str, modules: Mapping[str, nn.Module], keys: tuple[str, ...]) -> int | None:
    """The first of some keys in the innermost module around a path that has any of them, itself or in its config."""
    while True:
        sources = (modules[path], getattr(modules[path], "config", None))
        found = next((number for key in keys for source in sources if (number := _number(source, key))), None)
        if found or not path:
            return found
        path = path.rpartition(".")[0]


def _number(source: Any, key: str) -> int | None:
    """A number of a module or a config; None if it has none, or refuses to tell one for all of its layers."""
    try:
        number = getattr(source, key, None)
    except Exception:  # a class of transformers' own, no AttributeError
        return None
    return number if isinstance(number, int) and number > 0 else None
