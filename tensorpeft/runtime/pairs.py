"""The update at a convolution or an embedding: the module's own operation with a tensor over its input, then perhaps one more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tensorpeft.emission import ops
from tensorpeft.emission.index import Index
from tensorpeft.language.spec import BASE_WEIGHT
from tensorpeft.network.network import Group
from tensorpeft.planning.plan import GroupPlan
from tensorpeft.planning.weight_sites import chain_beforehand, some_sites
from tensorpeft.runtime.base_weight import base_weight
from tensorpeft.runtime.site_tensors import ProductTensors, SiteTensors
from tensorpeft.runtime.state import State
from tensorpeft.runtime.torch_internals import padding_of

_CONVOLVE = (functional.conv1d, functional.conv2d, functional.conv3d)


class PairUpdate:
    """The update at one site."""

    def __init__(self, state: State, planned: GroupPlan, number: int) -> None:
        self.state = state
        group: Group = some_sites(planned.group, (number,))
        orders = (tuple(link.operands for link in each.links) for each in planned.chains)
        chains = (chain_beforehand(group, term, order, 1) for term, order in zip(group.terms, orders, strict=True))
        self.code = SiteTensors(group, tuple(chains))
        self.site = group.sites[0]
        self._indices = [
            tuple(None if some is None else Index.of(some) for some in (term.columns, term.rows))
            for term in group.terms
        ]

    def constants(self) -> Iterator[Index]:
        """The positions that it reads at every call."""
        yield from self.code.constants()
        yield from (index for each in self._indices for index in each if index is not None)

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The output of the module for its input, with the update added."""
        factors = self.state.factors

        def value(name: str) -> Tensor:
            if name != BASE_WEIGHT:
                return factors[name]
            return base_weight(self.state, module, self.site).to(factors.tensors()[0]).unsqueeze(0)

        for built, (columns, rows) in zip(self.code(value, y.dtype), self._indices, strict=True):
            y = self._added(module, built, columns, rows, x, y)
        return y

    def _added(
        self, module: nn.Module, built: ProductTensors, columns: Index | None, rows: Index | None, x: Tensor, y: Tensor
    ) -> Tensor:
        """The output with one product added."""
        channel = -1 if self.site.kind == "embedding" else -1 - len(module.kernel_size)  # type: ignore[arg-type]
        h = self._first(module, _first_matrix(built, columns, self.site.d_in), x, y.dtype).movedim(channel, -1)
        if len(built.tensors) > 1:
            h = _second(built, h)
        if rows is not None:
            h = h.new_zeros(*h.shape[:-1], self.site.d_out).index_copy(-1, rows.on(y.device), h)
        return y + h.movedim(-1, channel)

    def _first(self, module: Any, matrix: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The module's own operation with a matrix (features, columns) for its weight."""
        if self.site.kind == "embedding":
            return functional.embedding(x, matrix.t(), module.padding_idx)
        weight = matrix.reshape(len(matrix), module.in_channels, *module.kernel_size)
        padding = module.padding
        if module.padding_mode != "zeros":
            x, padding = functional.pad(x, padding_of(module), module.padding_mode), 0
        convolve = _CONVOLVE[len(module.kernel_size) - 1]
        return convolve(x.to(dtype), weight, None, module.stride, padding, module.dilation)


def _first_matrix(built: ProductTensors, columns: Index | None, d_in: int) -> Tensor:  # shape: (features, d_in)
    """The tensor that the input meets first; it is zero in columns that masks leave out."""
    term, link, tensor = built.term, built.chain.links[0], built.tensors[0]
    if len(built.tensors) == 1:
        matrix = built.dense()[0]
    else:
        order = [link.modes.index(mode) for mode in (*link.new, *term.d_in)]
        matrix = tensor[0].permute(order).reshape(-1, term.size(term.d_in))
    if columns is None:
        return matrix
    return matrix.new_zeros(len(matrix), d_in).index_copy(1, columns.on(matrix.device), matrix)


def _second(built: ProductTensors, h: Tensor) -> Tensor:  # shape: (..., features) -> (..., rows)
    """The activation behind the second tensor."""
    term, (first, second) = built.term, built.chain.links
    h = h.unflatten(-1, [term.sizes[mode] for mode in first.new])
    equation = ops.equation([(..., *first.new), second.modes], (..., *term.d_out))
    return torch.einsum(equation, h, built.tensors[1][0]).flatten(-len(term.d_out)) * built.alpha
