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
from tensorpeft.runtime.torch_internals import outputs_are_kept, without_dispatch_modes

Norms = Callable[
    [], dict[str, Tensor]
]  # of factors that are divided by something: by what, by the names of their blocks
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


class _Made:
    """Results, and what tells whether they are those of the factors as they are."""

    def __init__(self, prepared: Prepared, places: list[Place], *, within_a_pass: bool) -> None:
        self.prepared = prepared
        self.guards: list[tuple[dict[str, Any], str, Tensor, int]] = []
        for holder, name in places:
            factor = holder[name]
            self.guards += [(holder, name, factor, -1 if factor.is_inference() else factor._version)]
        self.pointers: list[int] | None = None
        if not within_a_pass:
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
    """The results of a program's prologue. The model's forward starts by forgetting them.

    Within that, the versions of the factors guard them. A module that is called by itself, and checkpointing, which runs parts of
    the forward again during the backward pass and must meet the same tensors, also look at where the numbers lie. What is
    written through ``.data`` into the same place no one can see: after that, ``Adapter.refresh`` is to be called.
    """

    def __init__(self, program: Program, factors: Factors, norms: Norms) -> None:
        self.program, self.factors, self.norms = program, factors, norms
        self._places = [(factors.holder(name), name) for name in program.code.inputs]
        self._thread = 0  # of which a forward of the model is on
        self._distributed = False  # whether that is part of one of DistributedDataParallel
        self.forget()

    def begin(self, thread: int, *, distributed: bool) -> None:
        """A forward of the model begins."""
        self._made, self._thread, self._distributed = {}, thread, distributed

    def end(self) -> None:
        """It is over. Only a backward pass may want the results again."""
        self._thread = 0
        if not self._made:
            return
        self._made = {key: made for key, made in self._made.items() if key[2]}
        for made in self._made.values():
            if made.pointers is None:
                made.look_at_memory()

    def as_others(self, other: FactorCache) -> None:
        """It is made in the middle of a pass."""
        self._thread, self._distributed = other._thread, other._distributed

    def forget(self) -> None:
        """Drop the results."""
        self._made: dict[tuple[torch.dtype, torch.device, bool], _Made] = {}

    def prepared(self, y: Tensor, grad: bool) -> Prepared:
        """The results for a dtype and a device, with gradients or without.

        Raises:
            AdapterError: a factor that the spec freezes is to have a gradient, or the factors have no values.
        """
        key = y.dtype, y.device, grad
        try:
            made = self._made[key]
        except KeyError:  # not there, or another thread has just forgotten it
            return self._make(*key)
        for holder, name, factor, version in made.guards:
            if holder[name] is not factor or (version >= 0 and factor._version != version):
                return self._make(*key)
        if made.pointers is None or (self._thread == get_ident() and not y.is_cuda):
            return made.prepared
        return made.prepared if made.lies_where_it_lay() else self._make(*key)

    def _make(self, dtype: torch.dtype, device: torch.device, grad: bool) -> Prepared:
        factors = tuple([holder[name] for holder, name in self._places])
        self.factors.refuse_thawed(self.program.code.inputs)
        refuse_empty(factors, device)
        by_autograd = (self.program, dtype, device, factors, self.norms)
        prepared = self._by_hand(dtype, device, factors) if grad else recorded(*by_autograd)
        within = self._thread == get_ident() and device.type != "cuda"
        self._made[dtype, device, grad] = _Made(prepared, self._places, within_a_pass=within)
        return prepared

    def _by_hand(self, dtype: torch.dtype, device: torch.device, factors: tuple[Tensor, ...]) -> Prepared:
        """The results, of which autograd sees nothing but the token."""
        program = self.program
        with torch.no_grad(), without_dispatch_modes() if outputs_are_kept() else nullcontext():
            over, indices = divisors(program, self.norms), program.indices(factors[0].device)[0]
            stacks = stacked(program.code.prologue, dtype, device, factors, over, indices)
        gradients = Gradients(stacks, factors, distributed=self._distributed)

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
    found, names = norms(), program.code.inputs
    return tuple([found.get(name) for name in names]) if found else (None,) * len(names)


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
    divided = [factor if over is None else quotient(factor, over) for factor, over in zip(factors, norms, strict=True)]
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(
        kind
    ):  # it would round what the factors' own dtype is to be
        with torch.autocast(kind, enabled=False):
            found = code.forward(dtype, *divided, *indices)
    else:
        found = code.forward(dtype, *divided, *indices)
    return found if factors[0].device == device else tuple([stack.to(device) for stack in found])


def _given(program: Program, stacks: tuple[Tensor, ...], device: torch.device) -> list[dict[str, Any]]:
    """For each input set the tensors that its code is given: rows of the stacks, and constant indices."""
    rows, found = [stack.unbind() for stack in stacks], []
    for call, constants in zip(program.sets, program.indices(device)[1], strict=True):
        mine: dict[str, Any] = {**constants}
        for name, (stack, row) in call.named_arguments:
            mine[name] = rows[stack][row]
        found += [mine]
    return found
