"""Models of a few numbers, on which an operation of an adapter takes a millisecond, and all that can be seen of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import tensorpeft as tp

HEAD = "tensorpeft: 1\nname: {name}\ntarget: {{matrices: [{targets}]}}\n"
LORA = "rank: {r: 2}\nupdate: B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]\nfactors: {B: {init: zeros}}\n"
IA3 = "update: W[d_out, d_in] * u[matrix, layer, d_out]\nfactors: {u: {init: zeros}}\n"
DORA = (
    "rank: {r: 2}\n"
    "update: >-\n"
    "  m[matrix, layer, d_out] * B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]\n"
    "  + m[matrix, layer, d_out] * W[d_out, d_in] - one * W[d_out, d_in]\n"
    "factors: {m: {norm: true}, one: {init: ones, frozen: true}, B: {init: zeros}}\n"
)
EXPERTS = "rank: {r: 2}\nupdate: B[expert, d_out, r] * A[r, d_in]\nfactors: {B: {init: zeros}}\n"
PREFIX = "tensorpeft_"
Result = TypeVar("Result")


@cache
def spec(update: str, *targets: str, train: str = "", name: str = "lora") -> tp.Spec:
    text = HEAD.format(name=name, targets=", ".join(f"'{target}'" for target in targets)) + update
    return tp.load_spec(text + f"train: [{train}]\n" if train else text)


class TinyExperts(nn.Module):
    """Every row goes through all experts; their weights lie in one parameter, of which the names say what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.randn(3, 6, 6))  # shape: (experts, d_out, d_in)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,eoi->...o", x, self.down_proj).tanh()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)).double()


def mixture() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), TinyExperts(), nn.Linear(6, 6)).double()


def x() -> Tensor:  # shape: (5, 6)
    return torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def move(model: nn.Module, adapter: tp.Adapter, seed: int = 2) -> tp.Adapter:
    """Add random numbers to all that an adapter trains, of its own and of the model."""
    generator = torch.Generator().manual_seed(seed)
    own = {id(parameter) for parameter in adapter.factors.parameters()}
    theirs = [p for n, p in model.named_parameters() if p.requires_grad and PREFIX not in n and id(p) not in own]
    for parameter in (*adapter.factors.parameters(), *theirs):
        parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter), alpha=0.3)
    return adapter


def traces(model: nn.Module) -> dict[str, Any]:
    """All that an adapter could leave in a model: values and flags of its tensors, attributes, hooks and submodules."""
    seen: dict[str, Any] = {}
    for path, module in model.named_modules():
        if PREFIX not in path:
            names = sorted(vars(module))
            hooks = {name: len(value) for name, value in vars(module).items() if "hooks" in name and value is not None}
            seen[f"module {path}"] = (type(module), names, hooks, sorted(module._modules))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if PREFIX not in name:
            seen[f"tensor {name}"] = (
                tensor.requires_grad,
                tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes(),
            )
    return seen


def marks(model: nn.Module) -> list[object]:
    """What changes when an operation touches a model, without its values: cheap enough to be asked at every line."""
    found: list[object] = []
    for module in model.modules():
        found += [len(vars(module)), len(module._modules), len(module._forward_hooks), len(module._forward_pre_hooks)]
    for parameter in model.parameters():
        found += [parameter.requires_grad, parameter._version, parameter.data_ptr()]
    return found


def adapter_of(model: nn.Module, name: str = "lora") -> tp.Adapter | None:
    found: Any = getattr(model, PREFIX + name, None)
    return found


@torch.no_grad()
def seen(model: nn.Module, name: str = "lora") -> dict[str, Any]:
    """The traces of an adapter in a model, what the adapter says of itself, and the model's output."""
    adapter = adapter_of(model, name)
    found = {**traces(model), "output": model(x())}
    if adapter is not None:
        found |= {"enabled": adapter.enabled, "merged": adapter.merged is not None}
    return found


# The truth: dW of the specs above, and the output of net() with other weights


def change(adapter: tp.Adapter, weight: Tensor) -> Tensor:  # shape: (d_out, d_in)
    """dW of a spec above that has one site, with this weight."""
    factors = {name: value[0, 0] for name, value in adapter.factors.named_parameters()}
    if "u" in factors:
        return weight * factors["u"][:, None]
    pair = factors["B"] @ factors["A"]
    if "m" not in factors:
        return pair
    lengths = (weight + pair).norm(dim=1)
    quotients = torch.where(lengths > 0, factors["m"] / lengths, 1)
    return (weight + pair) * quotients[:, None] - weight


def with_changes(model: nn.Module, changes: dict[str, Tensor], rows: Tensor | None = None) -> Tensor:
    """The output of a model without adapters, with something added to its parameters."""
    weights = {name: parameter + changes.get(name, 0) for name, parameter in model.named_parameters()}
    return torch.func.functional_call(model, weights, (x() if rows is None else rows,))


def is_sentence(error: BaseException) -> bool:
    """Whether an error is one of tensorpeft's: one sentence, and in a spec below it the line that it is about."""
    text = str(error) if not isinstance(error, tp.SpecError) else str(error).splitlines()[0]
    raw = ("Traceback", "object at 0x", "Error(")
    return (
        isinstance(error, tp.TensorpeftError)
        and "\n" not in text
        and len(text) > 10
        and not any(w in text for w in raw)
    )


def or_refused(call: Callable[[], Result]) -> Result | None:
    """What a call returns; None where tensorpeft refuses, which it does in one sentence."""
    try:
        return call()
    except tp.TensorpeftError as error:
        if not is_sentence(error):
            raise AssertionError(f"no sentence: {error}") from error
        return None


def close(found: Tensor, truth: Tensor) -> bool:
    return torch.allclose(found, truth, rtol=1e-10, atol=1e-12)
