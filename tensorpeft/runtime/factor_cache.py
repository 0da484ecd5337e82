"""The prologue at run time: work on factors alone, once per forward of the model, for all sites together.

Emitted code is called by ``forward``, past ``nn.Module.__call__``: it is no layer of the model, and hooks that tools set on
every module (``FlopCounterMode``'s, say) have nothing to find in it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, fx

from tensorpeft.language.errors import AdapterError
from tensorpeft.runtime.factors import Factors
from tensorpeft.runtime.gradients import Gradients, token_of
from tensorpeft.runtime.program_cache import Program
from tensorpeft.runtime.site_tensors import quotient
from tensorpeft.runtime.torch_internals import (
    backward_pass,
    is_in_distributed_forward,
    is_traced,
    outputs_are_kept,
    without_dispatch_modes,
)

Norms = Callable[[], dict[str, Tensor]]  # what some factors are divided by, by the names of their blocks
Divisors = tuple[Tensor | None, ...]  # the same, for each factor that the prologue takes
Place = tuple[dict[str, Any], str]  # where torch keeps a factor


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the prologue made of the factors: for each input set what its code is given, by name.

    In training ``token`` stands for the factors: what uses a row takes it as an input, and leaves the row's gradient in
    ``gradients`` instead of returning it. Otherwise the rows carry their gradients themselves, or there are none.
    """

    given: list[dict[str, Any]]
    token: Tensor | None = None
    gradients: Gradients | None = None


class ForwardPass:
    """The forward pass of a model that is on."""

    def __init__(self) -> None:
        self.number, self.thread = 0, 0
        self.is_traced = False  # whether something follows every step of it
        self.distributed = False  # whether it is part of one of DistributedDataParallel

    def begin(self) -> None:
        """A pass begins, in this thread."""
        self.number, self.thread = self.number + 1, get_ident()
        self.is_traced, self.distributed = is_traced(), is_in_distributed_forward()

    def end(self) -> None:
        """It is over."""
        self.thread, self.is_traced = 0, False


class _Made:
    """Results, and what tells whether they are those of the factors as they are."""

    def __init__(self, prepared: Prepared, places: list[Place], now: ForwardPass, *, guarded: bool) -> None:
        self.prepared, self.number = prepared, now.number
        self.guards: list[tuple[dict[str, Any], str, Tensor, int]] = []
        for holder, name in places:
            try:
                version = holder[name]._version
            except RuntimeError:  # a tensor of inference mode counts none
                version = -1
            self.guards += [(holder, name, holder[name], version)]
        self.pointers: list[int] | None = None
        self.within_a_pass = now.thread != 0
        if guarded:
            self.look_at_memory()

    def look_at_memory(self) -> None:
        """Note where the numbers lie, for what comes outside of a pass; and hold them, so that no others come to lie there."""
        self.held = [guard[2].detach() for guard in self.guards]
        self.pointers = [factor.data_ptr() for factor in self.held]
        self.captured = _is_captured()

    def lies_where_it_lay(self) -> bool:
        """Whether nobody put other numbers in the place of a factor's, which no version counts."""
        return self.pointers == [guard[2].data_ptr() for guard in self.guards] and self.captured == _is_captured()


class FactorCache:
    """The results of a program's prologue. A forward of the model believes none that was there before.

    Within that, the versions of the factors guard them. A module that is called by itself, and checkpointing, which runs parts of
    the forward again during the backward pass and must meet the same tensors, also look at where the numbers lie. What is
    written through ``.data`` into the same place no one can see: after that, ``Adapter.refresh`` is to be called.
    """

    def __init__(self, program: Program, factors: Factors, norms: Norms | None, now: ForwardPass) -> None:
        self.program, self.factors, self.norms, self.now = program, factors, norms, now
        self._places = [(factors.holder(name), name) for name in program.code.inputs]
        self._made: dict[tuple[torch.dtype, torch.device, bool], _Made] = {}

    def end(self) -> None:
        """A pass is over. Only a backward pass may want its results again."""
        if self._made:
            left = {}
            for key in self._made:
                if key[2] and self._made[key].number == self.now.number:
                    left[key] = self._made[key]
            self._made = left
            for key in left:
                if left[key].pointers is None:
                    left[key].look_at_memory()

    def forget(self) -> None:
        """Drop the results."""
        self._made = {}

    def prepared(self, y: Tensor, grad: bool) -> Prepared:
        """The results for a dtype and a device, with gradients or without.

        Raises:
            AdapterError: a factor that the spec freezes is to have a gradient, or the factors have no values.
        """
        key, now = (y.dtype, y.device, grad), self.now
        try:
            made = self._made[key]
        except KeyError:  # not there, or another thread has just dropped it
            return self._make(*key)
        if made.number != now.number:
            return self._make(*key)
        for holder, name, factor, version in made.guards:
            if holder[name] is not factor or (version >= 0 and factor._version != version):
                return self._make(*key)
        if made.pointers is None or (now.thread and now.thread == get_ident() and not y.is_cuda):
            return made.prepared
        is_left_over = made.within_a_pass and not now.thread and backward_pass() == -1  # of a pass that is over
        return made.prepared if made.lies_where_it_lay() and not is_left_over else self._make(*key)

    def _make(self, dtype: torch.dtype, device: torch.device, grad: bool) -> Prepared:
        for holder, name in self._places:
            if holder is self.factors._buffers and holder[name].requires_grad:
                self.factors.refuse_thawed(name)
        factors = tuple([holder[name] for holder, name in self._places])
        if factors[0].is_meta:
            refuse_empty(device)
        by_autograd = (self.program, dtype, device, factors, self.norms)
        prepared = self._by_hand(dtype, device, factors) if grad else recorded(*by_autograd)
        guarded = self.now.thread != get_ident() or device.type == "cuda"
        self._made[dtype, device, grad] = _Made(prepared, self._places, self.now, guarded=guarded)
        return prepared

    def _by_hand(self, dtype: torch.dtype, device: torch.device, factors: tuple[Tensor, ...]) -> Prepared:
        """The results, of which autograd sees nothing but the token."""
        program = self.program
        with torch.no_grad(), without_dispatch_modes() if outputs_are_kept() else nullcontext():
            over, indices = divisors(program, self.norms), program.indices(factors[0].device)[0]
            stacks = stacked(program.code.prologue, dtype, device, factors, over, indices)
        gradients = Gradients(stacks, factors, distributed=self.now.distributed)

        def again(leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return stacked(program.code.prologue, dtype, device, leaves, over, indices)

        return Prepared(_given(program, stacks, device), token_of(gradients, again, *factors), gradients)


def refuse_empty(device: torch.device) -> None:
    """Factors on the meta device have nothing to compute with.

    Raises:
        AdapterError: the input is on another one.
    """
    if device.type != "meta":
        raise AdapterError(
            "the adapter's factors are on the meta device and have no values; "
            "attach it when the model's weights are loaded, and to a model that is not offloaded"
        )


def _is_captured() -> bool:
    """Whether what is done now is recorded into a CUDA graph, whose replay fills memory of its own."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def recorded(
    program: Program, dtype: torch.dtype, device: torch.device, factors: tuple[Tensor, ...], norms: Norms | None
) -> Prepared:
    """The results by autograd's own record, where there is one."""
    over, indices = divisors(program, norms), program.indices(factors[0].device)[0]
    stacks = stacked(program.code.prologue, dtype, device, factors, over, indices)
    return Prepared(_given(program, stacks, device))


def divisors(program: Program, norms: Norms | None) -> Divisors | None:
    """What each block that the prologue takes is divided by; None where nothing is."""
    if norms is None:
        return None
    found = norms()
    return tuple([found.get(name) for name in program.code.inputs])


def stacked(
    code: fx.GraphModule,
    dtype: torch.dtype,
    device: torch.device,
    factors: tuple[Tensor, ...],
    norms: Divisors | None,
    indices: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """The stacks as they are, (rows, ...) each."""
    kind = factors[0].device.type
    if norms is not None:
        pairs = zip(factors, norms, strict=True)
        factors = tuple([factor if over is None else quotient(factor, over) for factor, over in pairs])
    if kind != "meta" and torch.is_autocast_enabled(kind):  # it would round the factors
        with torch.autocast(kind, enabled=False):
            found = code.forward(dtype, *factors, *indices)
    else:
        found = code.forward(dtype, *factors, *indices)
    return found if factors[0].device == device else tuple([stack.to(device) for stack in found])


def _given(program: Program, stacks: tuple[Tensor, ...], device: torch.device) -> list[dict[str, Any]]:
    """For each input set the tensors that its code is given: rows of the stacks, and constant indices."""
    rows, found = [stack.unbind() for stack in stacks], []
    for arguments, constants in zip(program.arguments, program.indices(device)[1], strict=True):
        mine: dict[str, Any] = {**constants}
        for name, (stack, row) in arguments:
            mine[name] = rows[stack][row]
        found += [mine]
    return found
