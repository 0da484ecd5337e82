"""A live torch model -> ModelShape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from tensorpeft.network.architecture import Architecture, architecture, families
from tensorpeft.network.shapes import Linear, ModelShape, Site
from tensorpeft.network.sites import resolve
from tensorpeft.runtime.adapter import Adapter


def scan(model: nn.Module) -> ModelShape:
    """The adaptable sites of a model, its sizes, and the number of its parameters (tied ones once).

    Where the model, or the one module inside it, has a config of a known family, the family's table names the roles and
    the heads; elsewhere the paths of the modules give the names (see ``network.sites.resolve``). A model without a
    table has the sizes ``layers`` (how many its paths count) and ``width`` (the commonest d_in inside the layers).
    Adapters that the model has already are no part of it.

    Raises:
        ModelError: a module does not have the sides that the config says, or the config makes no sense.
    """
    modules = dict(model.named_modules())
    adapters = [module for module in modules.values() if isinstance(module, Adapter)]
    known = _architecture(modules)
    sites = resolve(_linears(modules), known)
    return ModelShape(
        name=type(model).__name__,
        sites=sites,
        sizes=known.sizes if known else _sizes(sites),
        n_parameters=_n_parameters(model) - sum(map(_n_parameters, adapters)),
        family=known.family if known else None,
        model_class=type(model).__name__,
    )


def _n_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _linears(modules: Mapping[str, nn.Module]) -> list[Linear]:
    # nn.MultiheadAttention reads the weight of its out_proj and never calls it: an update there would have no effect
    uncalled = {id(module.out_proj) for module in modules.values() if isinstance(module, nn.MultiheadAttention)}
    found = ((name, _sides(module)) for name, module in modules.items() if id(module) not in uncalled)
    return [Linear(name, *sides) for name, sides in found if sides]


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


def _architecture(modules: Mapping[str, nn.Module]) -> Architecture | None:
    """What the config of the model says; or of the outermost module with a known config, if there is one alone."""
    known = families()
    outermost: dict[str, Any] = {}  # by the start of the paths inside
    for name, module in modules.items():
        config = getattr(module, "config", None)
        if getattr(config, "model_type", None) in known and not name.startswith(tuple(outermost)):
            outermost[f"{name}." if name else ""] = config
    return architecture(next(iter(outermost.values())).to_dict()) if len(outermost) == 1 else None


def _sizes(sites: Iterable[Site]) -> tuple[tuple[str, int], ...]:
    inside = [site for site in sites if site.stack is not None] or list(sites)
    widths = Counter(site.d_in for site in inside).most_common(1)
    return (*(("width", width) for width, _ in widths), ("layers", len({site.layer for site in inside})))
