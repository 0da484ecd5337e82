"""The weight of the base at a site: where it is, how the matrix lies in it, and what an update may read of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tensorpeft.language.errors import AdapterError
from tensorpeft.model.shape import Rows, Site
from tensorpeft.runtime.ledger import known
from tensorpeft.runtime.state import State


@dataclass(frozen=True)
class WeightPlace:
    """A weight: the parameter ``name`` of a module, in which the matrix may lie turned, as (d_in, d_out)."""

    module: nn.Module
    name: str
    is_turned: bool

    @property
    def parameter(self) -> Any:
        """What the module has there: of a quantised one it may be no parameter."""
        return getattr(self.module, self.name, None)

    @property
    def is_plain(self) -> bool:
        """Whether it is a tensor of plain numbers: in a replica or a functional call it is no parameter."""
        return isinstance(self.parameter, Tensor) and self.parameter.is_floating_point()

    def matrix(self, stored: Tensor) -> Tensor:  # shape: (..., d_out, d_in)
        """The values of the weight, or others like them, as a matrix; as one for each expert where there are several."""
        if self.is_turned:
            return stored.mT
        is_convolution = isinstance(self.module, _CONVOLUTIONS)
        return stored.reshape(stored.shape[0], -1) if is_convolution else stored

    def stored(self, matrix: Tensor) -> Tensor:
        """A matrix as the module stores it."""
        return matrix.mT if self.is_turned else matrix.reshape(self.parameter.shape)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def weight_place(module: nn.Module, site: Site) -> WeightPlace:
    """Where the weight of a site is, whose module is given."""
    *inside, name = (site.parameter or "weight").split(".")
    owner = module.get_submodule(".".join(inside))
    return WeightPlace(owner, name, site.transposed or site.kind == "embedding" or hasattr(owner, "nf"))


def base_weight(state: State, module: nn.Module, site: Site) -> Tensor:  # shape: (d_out, d_in) of the site
    """W, which an update multiplies: the rows of a site, and the values that they had before anything was merged.

    Raises:
        AdapterError: the weight is quantised.
    """
    found = weight_place(module, site)
    if not found.is_plain:
        raise AdapterError(
            f"adapter `{state.name}` multiplies by the base weight `W`, but that of `{site.path}` "
            f"({type(module).__name__}) is no plain matrix of numbers"
        )
    weight = found.matrix(own_bits(found.parameter))
    if weight.dim() == 3:
        weight = weight[site.expert]
    if site.rows is None:
        return weight
    return _rows(weight.t(), site.rows).t()


def attached_weight(state: State) -> Callable[[Site], Tensor]:
    """``base_weight`` at the sites of the model that an adapter is attached to.

    Raises:
        AdapterError: when it is called, the adapter is not attached.
    """

    def found(site: Site) -> Tensor:
        module = state.module_of(site)
        if module is None:
            raise AdapterError(f"adapter `{state.name}` is not attached to a model, so there is no `W`")
        return base_weight(state, module, site)

    return found


def own_bits(parameter: Tensor) -> Tensor:
    """The values of a weight without what is merged into it."""
    entry = None if torch.compiler.is_compiling() else known(parameter)
    return parameter.detach() if entry is None else entry.bits


def product_of(module: nn.Module, site: Site, y: Tensor) -> Tensor:  # shape: (..., d_out) of the site
    """W x of a site, from the output y of its module: its rows, in memory of their own, less the bias."""
    own = module._parameters
    bias: Any = own["bias"] if "bias" in own else getattr(module, "bias", None)
    found = y if site.rows is None else _rows(y, site.rows)
    if bias is None:
        return found.clone()
    return found - (bias if site.rows is None else _rows(bias, site.rows)).to(y.dtype)


def _rows(tensor: Tensor, rows: Rows) -> Tensor:
    """The part of the last axis that is a site's."""
    return tensor.unflatten(-1, (-1, rows.period)).narrow(-1, rows.offset, rows.count).flatten(-2)
