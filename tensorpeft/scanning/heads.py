"""The heads of attentions in models of no known family, as their modules and configs tell them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from tensorpeft.model.shape import Site

_HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_KEYS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", *_HEADS)
_OF_ROLE = {"query": ("d_out", _HEADS), "key": ("d_out", _KEYS), "value": ("d_out", _KEYS), "out": ("d_in", _HEADS)}


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
