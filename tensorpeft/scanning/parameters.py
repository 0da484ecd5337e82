"""The parameters of a live model, and which of them are biases, of norms, or of its head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from tensorpeft.model.cards import head_modules
from tensorpeft.model.family import families
from tensorpeft.model.shape import Parameter, Site
from tensorpeft.scanning.matrices import is_norm

IsHead = Callable[[str], bool]


def parameters(modules: Mapping[str, nn.Module], is_head: IsHead) -> tuple[Parameter, ...]:
    """The parameters of modules, each once: under its first path, with the kinds and the paths of all that share it."""
    found: dict[int, Parameter] = {}
    for module_path, module in modules.items():
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{module_path}.{name}".removeprefix(".")
            told = {"norms": is_norm(module), "biases": "bias" in name, "head": is_head(path)}
            first = found.setdefault(id(parameter), Parameter(path, parameter.numel()))
            others = (*first.others, *[path] * (path != first.path))
            kinds = first.kinds.union(kind for kind, true in told.items() if true)
            found[id(parameter)] = replace(first, kinds=kinds, others=others)
    return tuple(found.values())


def head_of(modules: Mapping[str, nn.Module], sites: Iterable[Site], sizes: Mapping[str, int]) -> IsHead:
    """A test of a parameter's path: whether it belongs to the head of the model.

    The head is all that lies outside the body, where a module tells its body (``base_model_prefix``) or lies inside another;
    else what the family's table gives the model's class; else the linear modules outside the layers that read the width.
    """
    path, model = next(((path, module) for path, module in modules.items() if hasattr(module, "config")), ("", None))
    start = f"{path}." if path else ""
    prefix = getattr(model, "base_model_prefix", "")
    body = start + prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else path
    if body:
        return lambda parameter: not parameter.startswith(f"{body}.")
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) in families():
        heads = head_modules(config.to_dict(), type(model).__name__)
    else:
        outside = (site for site in sites if site.is_linear and site.stack is None)
        heads = tuple(site.module for site in outside if site.d_in == sizes.get("width"))
    return lambda parameter: parameter.startswith(tuple(f"{head}." for head in heads))
