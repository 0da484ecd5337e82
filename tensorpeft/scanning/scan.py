"""A live torch model -> ModelShape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from tensorpeft.network.architecture import Architecture, architecture, families, together
from tensorpeft.network.shapes import Linear, ModelShape, Site
from tensorpeft.network.sites import resolve
from tensorpeft.runtime.adapter import Adapter
from tensorpeft.scanning.heads import with_heads
from tensorpeft.scanning.matrices import linears
from tensorpeft.scanning.parameters import head_of, parameters
from tensorpeft.scanning.readers import read_modules


def scan(model: nn.Module) -> ModelShape:
    """The adaptable sites of a model, its sizes, and the number of its parameters (tied ones once).

    Where the model, or a module inside it, has a config of a known family, the family's table names the roles and the
    heads, behind the module's name if there are several; elsewhere the paths of the modules give the names (see
    ``network.sites.resolve``). A model without a table has the sizes ``layers`` (how many its paths count) and ``width``
    (the commonest d_in inside the layers).
    Adapters that the model has already are no part of it.

    Raises:
        ModelError: a module does not have the sides that the config says, or the config makes no sense.
    """
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    own = {id(module) for adapter in adapters for module in adapter.modules()}
    modules = {path: module for path, module in model.named_modules() if id(module) not in own}
    known = _architecture(modules)
    sites = resolve(_linears(modules, known), known)
    if known is None:
        sites = tuple(with_heads(site, modules) for site in sites)
    sizes = known.sizes if known else _sizes(sites)
    found = parameters(modules, head_of(modules, sites, dict(sizes)))
    return ModelShape(
        name=type(model).__name__,
        sites=sites,
        sizes=sizes,
        n_parameters=sum(parameter.count for parameter in found),
        family=known.family if known else None,
        model_class=type(model).__name__,
        parameters=found,
    )


def _linears(modules: Mapping[str, nn.Module], known: Architecture | None) -> list[Linear]:
    attentions = [module for module in modules.values() if isinstance(module, nn.MultiheadAttention)]
    apart = {id(module.out_proj) for module in attentions}  # its weight is one that the attention reads
    found = [linear for path, module in modules.items() if id(module) not in apart for linear in linears(path, module)]
    return [linear.read() if _is_read(linear, modules, known) else linear for linear in found]


def _is_read(linear: Linear, modules: Mapping[str, nn.Module], known: Architecture | None) -> bool:
    """Whether the module around a module says in its source that it reads its weight; of what a family knows, that says so."""
    parent, _, name = linear.module.rpartition(".")
    is_told = known is not None and (known.find(linear.path) is not None or known.is_read(linear.path))
    if is_told or linear.kind not in ("linear", "embedding") or not linear.module:
        return False
    reader: Any = type(modules[parent])
    return name in read_modules(reader)


def _architecture(modules: Mapping[str, nn.Module]) -> Architecture | None:
    """What the config of the model says; or those of the outermost modules with a known config."""
    known = families()
    outermost: dict[str, Any] = {}  # by the start of the paths inside
    for name, module in modules.items():
        config = getattr(module, "config", None)
        if getattr(config, "model_type", None) in known and not name.startswith(tuple(outermost)):
            outermost[f"{name}." if name else ""] = config
    found = {start.removesuffix("."): architecture(config.to_dict()) for start, config in outermost.items()}
    return together(found) if len(found) > 1 else next(iter(found.values()), None)


def _sizes(sites: Iterable[Site]) -> tuple[tuple[str, int], ...]:
    linear = [site for site in sites if site.is_linear]
    inside = [site for site in linear if site.stack is not None] or linear
    widths = Counter(site.d_in for site in inside).most_common(1)
    return (*(("width", width) for width, _ in widths), ("layers", len({site.layer for site in inside})))
