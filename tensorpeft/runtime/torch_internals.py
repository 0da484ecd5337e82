"""Every private name of torch that this library uses, in one place.

They are good for the versions of torch that pyproject.toml names. A test asks for each of them, so that a release of torch that
lacks one is told by that name, and not by a crash somewhere in a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, Variable
from torch.utils import checkpoint
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

# Bound here, since they are asked for at every site, and each look-up of a long dotted name costs as much as the call.
is_dynamo_compiling: Callable[[], bool] = torch.compiler.is_dynamo_compiling
transforms_are_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
tracing_state: Callable[[], object] = torch._C._get_tracing_state
backward_pass: Callable[[], int] = torch._C._current_graph_task_id  # the number of the engine's run; -1 in none
is_batched_gradient: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
without_dispatch_modes = _disable_current_modes

# Attributes of torch's that stand where they are needed, since a function around them would be a call at every site. The state
# of a module is in the dictionaries of nn.Module, which ``_apply`` casts and moves; a tensor tells its version and what it is a view of.
ATTRIBUTES: dict[type, tuple[str, ...]] = {
    Tensor: ("_base", "_version"),
    nn.Module: ("_apply", "_buffers", "_modules", "_non_persistent_buffers_set", "_parameters"),
}


def is_traced() -> bool:
    """Whether a compiler or a transform of torch.func follows what is done; then autograd's own formulas are used."""
    return torch.compiler.is_compiling() or transforms_are_active() or tracing_state() is not None


def outputs_are_kept() -> bool:
    """Whether selective checkpointing looks on: it keeps outputs of some kernels, and hands them out again in their order.

    What it keeps must stay as it is, and what is done once for several segments is none of its business.
    """
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(type(mode).__module__ == checkpoint.__name__ for mode in _get_current_dispatch_mode_stack())


def apply_of(function: type[Function]) -> Callable[..., Any]:
    """The ``apply`` of an autograd function without the dozen calls by which torch asks for transforms of torch.func first.

    Where one is at work (``is_traced``), these functions are not used.
    """
    apply: Callable[..., Any] = super(Function, function).apply  # type: ignore[misc]
    return apply


def gradients_of(
    outputs: Sequence[Tensor], gradients: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """``torch.autograd.grad`` without its questions about shapes, which are right here: they take a hundred calls for one."""
    found: tuple[Tensor | None, ...] = Variable._execution_engine.run_backward(
        tuple(outputs), tuple(gradients), False, False, tuple(leaves), allow_unreachable=True, accumulate_grad=False
    )
    return found


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Let the engine call something when the backward pass that is on ends, however that may be."""
    Variable._execution_engine.queue_callback(callback)


def remove_forward_hooks(module: nn.Module, is_ours: Callable[[object], bool]) -> None:
    """Remove forward hooks of a module, with or without a handle to them: an interrupt may have come before there was one."""
    for hooks, marks in (
        (module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
        (module._forward_hooks, (module._forward_hooks_with_kwargs, module._forward_hooks_always_called)),
    ):
        for number in [number for number, hook in hooks.items() if is_ours(hook)]:
            for mark in marks:
                mark.pop(number, None)
            hooks.pop(number, None)


def padding_of(module: Any) -> list[int]:
    """How a convolution pads its input before it runs, as ``functional.pad`` takes it."""
    found: list[int] = module._reversed_padding_repeated_twice
    return found


def is_in_distributed_forward() -> bool:
    """Whether a forward pass of DistributedDataParallel is on."""
    parallel = torch.nn.parallel.DistributedDataParallel
    return parallel._get_active_ddp_module() is not None
