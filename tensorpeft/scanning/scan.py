"""A live torch model -> ModelShape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tensorpeft.language.errors import ModelError, clip
from tensorpeft.model.family import Architecture, architecture, families, together
from tensorpeft.model.naming import has_roles
from tensorpeft.model.shape import Linear, ModelShape, Site
from tensorpeft.model.sites import resolve
from tensorpeft.runtime.adapter import Adapter
from tensorpeft.scanning.attention import parts, with_heads
from tensorpeft.scanning.matrices import linears
from tensorpeft.scanning.parameters import head_of, parameters
from tensorpeft.scanning.readers import read_modules


def scan(model: nn.Module) -> ModelShape:
    """The adaptable sites of a model, its sizes, and the number of its parameters (tied ones once).

    Where the model, or a module inside it, has a config of a known family, the family's table names the roles and the
    heads, behind the module's name if there are several; elsewhere the paths of the modules give the names (see
    ``model.sites.resolve``). A model without a table has the sizes ``layers`` (how many its paths count) and ``width``
    (the commonest d_in inside the layers).
    Adapters that the model has already are no part of it.

    Raises:
        ModelError: it is no torch model, a module does not have the sides that the config says, or the config makes no sense.
    """
    _refuse(model)
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    own = {id(module) for adapter in adapters for module in adapter.modules()}
    modules = {path: module for path, module in model.named_modules() if id(module) not in own}
    found = _linears(modules)
    known = _architecture(modules, found)
    sites = resolve([linear.read() if _is_read(linear, modules, known) else linear for linear in found], known)
    sites = tuple(site if known and known.find(site.path) else with_heads(site, modules) for site in sites)
    sizes = known.sizes if known else _sizes(sites)
    of_base = parameters(modules, head_of(modules, sites, dict(sizes)))
    return ModelShape(
        name=type(model).__name__,
        sites=sites,
        sizes=sizes,
        n_parameters=sum(parameter.count for parameter in of_base),
        family=known.family if known else None,
        model_class=type(model).__name__,
        parameters=of_base,
    )


def _refuse(model: object) -> None:
    """Refuse what is no torch model, what has no weights yet, and what TorchScript has compiled."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch model, found {clip(repr(model))} of type `{type(model).__name__}`")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("the model is one of TorchScript, which cannot be adapted; compile it afterwards")
    for path, module in model.named_modules():
        if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            told = f"`{path}` ({type(module).__name__}) has no weight yet"
            raise ModelError(f"{told}; call the model once, then adapt it")


def _linears(modules: Mapping[str, nn.Module]) -> list[Linear]:
    """The weights that act as matrices; one without any numbers is none, nor one that TorchScript has compiled."""
    attentions = [module for module in modules.values() if isinstance(module, nn.MultiheadAttention)]
    apart = {id(module.out_proj) for module in attentions}  # its weight is one that the attention reads
    apart |= {id(module) for module in modules.values() if isinstance(module, torch.jit.ScriptModule)}
    whole = (linear for path, module in modules.items() if id(module) not in apart for linear in linears(path, module))
    return [part for linear in whole if linear.d_out and linear.d_in for part in parts(linear, modules)]


def _is_read(linear: Linear, modules: Mapping[str, nn.Module], known: Architecture | None) -> bool:
    """Whether the module around a module says in its source that it reads its weight; of what a family knows, that says so."""
    parent, _, name = linear.module.rpartition(".")
    is_told = known is not None and (known.find(linear.path) is not None or known.is_read(linear.path))
    if is_told or linear.kind not in ("linear", "embedding") or not linear.module:
        return False
    reader: Any = type(modules[parent])
    return name in read_modules(reader, called=linear.kind == "linear")  # of an embedding a whole new weight is much


def _architecture(modules: Mapping[str, nn.Module], found: Iterable[Linear]) -> Architecture | None:
    """The layers by the config of the model; or by those of the outermost modules with a known config.

    The latter's names stand before the roles where there are several, or other modules that have roles by common names too.
    """
    outermost: dict[str, dict[str, Any]] = {}  # by the start of the paths inside
    for name, module in modules.items():
        if not name.startswith(tuple(outermost)) and (config := _known_config(module)):
            outermost[f"{name}." if name else ""] = config
    known = {start.removesuffix("."): architecture(config) for start, config in outermost.items()}
    if not known or "" in known:
        return known.get("")
    others = [linear for linear in found if not linear.path.startswith(tuple(outermost))]
    roles = {matrix.role for each in known.values() for matrix in each.matrices}
    clash = not roles.isdisjoint(linear.name for linear in others)
    return together(known, named=len(known) > 1 or clash or has_roles(others))


def _known_config(module: nn.Module) -> dict[str, Any] | None:
    """The config of a module, if its family has a table."""
    config: Any = getattr(module, "config", None)
    if getattr(config, "model_type", None) not in families():
        return None
    told: dict[str, Any] = config.to_dict()
    return told if told.get("model_type") in families() else None


def _sizes(sites: Iterable[Site]) -> tuple[tuple[str, int], ...]:
    linear = [site for site in sites if site.is_linear]
    inside = [site for site in linear if site.stack is not None] or linear
    widths = Counter(site.d_in for site in inside).most_common(1)
    return (*(("width", width) for width, _ in widths), ("layers", len({site.layer for site in inside})))
