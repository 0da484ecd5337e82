"""The prologue at run time: work on factors alone, once per forward of the model, for all sites together.

Emitted code is called by ``forward``, past ``nn.Module.__call__``: it is no layer of the model, and hooks that tools set on
every module (``FlopCounterMode``'s, say) have nothing to find in it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, fx

from tensorpeft.language.errors import AdapterError
from tensorpeft.runtime.factors import Factors
from tensorpeft.runtime.gradients import Gradients, token_of
from tensorpeft.runtime.program_cache import Program
from tensorpeft.runtime.torch_internals import outputs_are_kept, without_dispatch_modes

Norms = Callable[
    [], dict[str, Tensor]
]  # of factors that are divided by something: by what, by the names of their blocks
Divisors = tuple[Tensor | None, ...]  # the same, for each factor that the prologue takes


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the prologue made of the factors: for each input set what its code is given, by name.

    In training ``token`` stands for the factors: what uses a row takes it as an input, and leaves the row's gradient in
    ``gradients`` instead of returning it. Otherwise the rows carry their gradients themselves, or there are none.
    """

    given: list[dict[str, Any]]
    token: Tensor | None = None
    gradients: Gradients | None = None


@dataclass(eq=False)
class _Made:
    """Results, and what tells whether they are those of the factors as they are."""

    prepared: Prepared
    guards: list[tuple[dict[str, Any], str, Tensor, int]]  # where each factor is, and what was found there
    pointers: list[int]
    captured: bool
    held: list[Tensor] = field(repr=False)  # so that no other numbers come to lie in the same place


class FactorCache:
    """The results of a program's prologue. The model's forward starts by forgetting them.

    Within that, the versions of the factors guard them. A module that is called by itself, and checkpointing, which runs parts of
    the forward again during the backward pass and must meet the same tensors, also look at where the numbers lie. What is
    written through ``.data`` into the same place no one can see: after that, ``Adapter.refresh`` is to be called.
    """

    def __init__(self, program: Program, factors: Factors, norms: Norms) -> None:
        self.program, self.factors, self.norms = program, factors, norms
        self._places = [(factors.holder(name), name) for name in program.code.inputs]
        self.thread = 0  # of which a forward of the model is on
        self.distributed = False  # whether that is part of one of DistributedDataParallel
        self.forget()

    def forget(self) -> None:
        """Drop the results."""
        self._made: dict[tuple[torch.dtype, torch.device, bool, bool], _Made] = {}

    def prepared(self, y: Tensor, grad: bool) -> Prepared:
        """The results for a dtype and a device, with gradients or without.

        Raises:
            AdapterError: a factor that the spec freezes is to have a gradient, or the factors have no values.
        """
        key = y.dtype, y.device, grad, torch.is_inference_mode_enabled()
        try:
            made = self._made[key]
        except KeyError:
            return self._make(key)
        for holder, name, factor, version in made.guards:
            if holder[name] is not factor or (version >= 0 and factor._version != version):
                return self._make(key)
        if self.thread == get_ident() and not y.is_cuda:
            return made.prepared
        same = made.pointers == [guard[2].data_ptr() for guard in made.guards] and made.captured == _is_captured()
        return made.prepared if same else self._make(key)

    def _make(self, key: tuple[torch.dtype, torch.device, bool, bool]) -> Prepared:
        dtype, device, grad, _ = key
        factors = tuple(holder[name] for holder, name in self._places)
        self.factors.refuse_thawed(self.program.code.inputs)
        refuse_empty(factors, device)
        prepared = (
            self._run(dtype, device, factors) if grad else recorded(self.program, dtype, device, factors, self.norms)
        )
        versions = [-1 if factor.is_inference() else factor._version for factor in factors]
        guards = [
            (*place, factor, version) for place, factor, version in zip(self._places, factors, versions, strict=True)
        ]
        pointers = [factor.data_ptr() for factor in factors]
        captured = _is_captured()
        self._made[key] = _Made(prepared, guards, pointers, captured, [factor.detach() for factor in factors])
        return prepared

    def _run(self, dtype: torch.dtype, device: torch.device, factors: tuple[Tensor, ...]) -> Prepared:
        """The results by hand: autograd sees nothing but the token."""
        program = self.program
        with torch.no_grad(), without_dispatch_modes() if outputs_are_kept() else nullcontext():
            over, indices = divisors(program, self.norms), program.indices(factors[0].device)[0]
            stacks = stacked(program.code.prologue, dtype, device, factors, over, indices)
        gradients = Gradients(stacks, factors, distributed=self.distributed)

        def again(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return stacked(program.code.prologue, dtype, device, leaves, over, indices)

        return Prepared(_given(program, stacks, device), token_of(gradients, again, *factors), gradients)


def refuse_empty(factors: tuple[Tensor, ...], device: torch.device) -> None:
    """Factors on the meta device have nothing to compute with.

    Raises:
        AdapterError: they are there, and the input is not.
    """
    if factors[0].is_meta and device.type != "meta":
        raise AdapterError(
            "the adapter's factors are on the meta device and have no values; "
            "attach it when the model's weights are loaded, and to a model that is not offloaded"
        )


def _is_captured() -> bool:
    """Whether what is done now is recorded into a CUDA graph, whose replay fills memory of its own."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def recorded(
    program: Program, dtype: torch.dtype, device: torch.device, factors: tuple[Tensor, ...], norms: Norms
) -> Prepared:
    """The results by autograd's own record, where there is one."""
    over, indices = divisors(program, norms), program.indices(factors[0].device)[0]
    stacks = stacked(program.code.prologue, dtype, device, factors, over, indices)
    return Prepared(_given(program, stacks, device))


def divisors(program: Program, norms: Norms) -> Divisors:
    """What each block that the prologue takes is divided by."""
    found = norms()
    return tuple([found.get(name) for name in program.code.inputs])


def stacked(
    code: fx.GraphModule,
    dtype: torch.dtype,
    device: torch.device,
    factors: tuple[Tensor, ...],
    norms: Divisors,
    indices: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """The stacks as they are, (rows, ...) each."""
    kind = factors[0].device.type
    divided = [factor if over is None else factor / over for factor, over in zip(factors, norms, strict=True)]
    if torch.is_autocast_enabled(kind):  # it would round what the factors' own dtype is to be
        with torch.autocast(kind, enabled=False):
            found = code.forward(dtype, *divided, *indices)
    else:
        found = code.forward(dtype, *divided, *indices)
    return found if factors[0].device == device else tuple([stack.to(device) for stack in found])


def _given(program: Program, stacks: tuple[Tensor, ...], device: torch.device) -> list[dict[str, Any]]:
    """For each input set the tensors that its code is given: rows of the stacks, and constant indices."""
    rows = [stack.unbind() for stack in stacks]
    constants = program.indices(device)[1]
    found = []
    for call, given in zip(program.sets, constants, strict=True):
        mine: dict[str, Any] = {**given}
        for name, (stack, row) in call.named_arguments:
            mine[name] = rows[stack][row]
        found.append(mine)
    return found
