"""The tensors of links at some sites, from the factors as they are when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from tensorpeft.emission.index import Index
from tensorpeft.emission.lowering import Argument
from tensorpeft.emission.prologue import PrologueCode, Rows
from tensorpeft.language.spec import BASE_WEIGHT
from tensorpeft.network.network import Group, Term
from tensorpeft.planning.chain import Chain, Link

Value = Callable[[str], Tensor]  # the tensor of a block, by its name; that of W is (sites, d_out, d_in)


@dataclass(frozen=True)
class ProductTensors:
    """The tensors of one product's links, each (sites, one axis for each of the link's modes), and what multiplies it."""

    term: Term
    chain: Chain
    alpha: float
    tensors: tuple[Tensor, ...]

    def dense(self) -> Tensor:  # shape: (sites, rows, columns)
        """The whole product, of a chain of one link, where it has one task at most."""
        (tensor,) = self.matrices((*self.term.d_out, *self.term.d_in))
        matrix = tensor.reshape(len(tensor), self.term.size(self.term.d_out), -1)
        return matrix if self.alpha == 1 else matrix * self.alpha

    def matrices(self, *last: tuple[str, ...]) -> list[Tensor]:  # shapes: (sites, *other modes, *last)
        """The tensors with their axes in another order, for each the modes that come last."""
        found = []
        for link, tensor, modes in zip(self.chain.links, self.tensors, last, strict=True):
            order = [*(mode for mode in link.modes if mode not in modes), *modes]
            found.append(tensor.permute(0, *(1 + link.modes.index(mode) for mode in order)))
        return found


class SiteTensors:
    """The code for the tensors of chains, one for each product of a group, at all of its sites."""

    def __init__(self, group: Group, chains: tuple[Chain, ...]) -> None:
        self.group, self.chains = group, chains
        bundles = tuple((number,) for number in range(len(group.sites)))
        used = [term.operands[i] for term, each in zip(group.terms, chains, strict=True) for i in _operands(each)]
        code = PrologueCode(dict.fromkeys(operand.block.name for operand in used))
        self._tensors = [
            [_StackRows(*code.stack([code.part(group, term, link, _argument(link), bundles)])) for link in each.links]
            for term, each in zip(group.terms, chains, strict=True)
        ]
        self._code: fx.GraphModule = code.finish()
        self.inputs = tuple(code.inputs)
        self.has_base = BASE_WEIGHT in self.inputs  # whether W is one of the factors
        self._indices = tuple(index for _, index in code.indices.values())

    def constants(self) -> Iterator[Index]:
        """The positions that it reads at every call."""
        yield from self._indices
        yield from (tensor.index for tensors in self._tensors for tensor in tensors)

    def __call__(self, value: Value, dtype: torch.dtype) -> Iterator[ProductTensors]:
        """The tensors for factors that ``value`` gives; autograd records how they come about."""
        factors = [value(name) for name in self.inputs]
        device = factors[0].device if factors else None
        with not_cast(device):
            indices = [index.on(device) for index in self._indices] if device is not None else []
            stacks = self._code.forward(dtype, *factors, *indices)
        for term, each, tensors in zip(self.group.terms, self.chains, self._tensors, strict=True):
            yield ProductTensors(term, each, each.sign * self.group.scale, tuple(found(stacks) for found in tensors))


def not_cast(device: torch.device | None) -> AbstractContextManager[object]:
    """A context in which torch computes in the dtypes that it is given, also under autocast."""
    if device is None or not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def quotient(magnitude: Tensor, norms: Tensor) -> Tensor:
    """A magnitude over its norms, as it stands in products; one where the norm is zero, and no gradient there."""
    norms = norms.to(magnitude.dtype)
    zero = norms == 0
    return (magnitude / norms.masked_fill(zero, 1)).masked_fill(zero, 1)


def _operands(found: Chain) -> Iterator[int]:
    return (i for link in found.links for i in link.operands)


def _argument(link: Link) -> Argument:
    return Argument(link.operands, tuple((mode,) for mode in link.modes), link.trainable, False)


class _StackRows:
    """Which stack has the tensors of a link, and which of its rows is each site's; several may share one."""

    def __init__(self, stack: int, rows: Rows) -> None:
        self.stack, self.rows, self.index = stack, rows, Index.of(np.array(rows))

    def __call__(self, stacks: tuple[Tensor, ...]) -> Tensor:  # shape: (sites, ...)
        stack = stacks[self.stack]
        if self.rows == tuple(range(len(stack))):
            return stack
        if len({*self.rows}) == 1:
            return stack[self.rows[0]].expand(len(self.rows), *stack.shape[1:])
        return stack.index_select(0, self.index.on(stack.device))
