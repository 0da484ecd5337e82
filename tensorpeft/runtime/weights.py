"""The weight of the base at a site: as the module holds it, and as an update may read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tensorpeft.language.errors import AdapterError
from tensorpeft.network.shapes import Site
from tensorpeft.runtime.hooks import adapters

if TYPE_CHECKING:
    from tensorpeft.runtime.adapter import Adapter


def held_weight(module: nn.Module) -> tuple[nn.Parameter, bool] | None:
    """A module's weight, and whether it is stored (d_in, d_out), as Conv1D stores it; None if it is no plain matrix."""
    weight = module.weight
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or weight.dim() != 2:
        return None
    return weight, hasattr(module, "nf")


def base_weight(adapter: Adapter, module: nn.Module, site: Site) -> Tensor:  # shape: (d_out, d_in) of the site
    """W, which an update multiplies: the rows of a site, and the values that they had before anything was merged.

    Raises:
        AdapterError: the weight is quantised.
    """
    held = held_weight(module)
    if held is None:
        raise AdapterError(
            f"adapter `{adapter.name}` multiplies by the base weight `W`, but that of `{site.module}` "
            f"({type(module).__name__}) is no plain matrix of numbers"
        )
    weight = _before_merges(adapter, site.module, held[0].detach())
    weight = weight.t() if held[1] else weight
    if site.rows is None:
        return weight
    rows = site.rows
    return weight.unflatten(0, (-1, rows.period)).narrow(1, rows.offset, rows.count).flatten(0, 1)


def _before_merges(adapter: Adapter, path: str, weight: Tensor) -> Tensor:
    """The values of a weight that the first merge of it replaced, if there was one."""
    if adapter.attachment is None or torch.compiler.is_compiling():
        return weight
    merges = [other.merged for other in adapters(adapter.attachment.model)]
    saved = [merged for merged in merges if merged is not None and path in merged.weights]
    return min(saved, key=lambda merged: merged.order).weights[path] if saved else weight
