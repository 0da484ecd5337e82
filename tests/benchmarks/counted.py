"""What one training step of a Llama layer costs over the frozen base, in figures that no machine changes; PEFT beside it.

Launches are dispatched ATen operators that are neither views nor bare allocations. Saved bytes are the distinct storages packed
for backward, parameters and buffers left out. FLOPs are torch's FlopCounterMode, which does not know the products that are
added in place; ``all FLOPs`` counts these too. The peak is the most that a step has allocated at once. The base has nothing that
trains; its gradient flows to the token embeddings, as for any adapter. Figures are those of one layer at the margin, bfloat16
with float32 adapter parameters, batch 2 x 128.

Prints a table, and keeps it beside this file with the versions.
"""

from __future__ import annotations

import json
import platform
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import tensorpeft as tp

Adapt = Callable[[nn.Module], object]
NO_KERNEL = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"
}  # allocations, and views that say otherwise  # fmt: skip
QV = ["q_proj", "v_proj"]
ALL = [*QV, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KVD = ["k_proj", "v_proj", "down_proj"]
FEW, MANY = 2, 4  # layers, of which the difference is taken


@dataclass(frozen=True)
class Counts:
    """Of one step, or of one layer in it."""

    launches: float
    saved: float  # bytes
    flops: float  # of FlopCounterMode
    all_flops: float
    peak: float  # bytes, the most that a step has allocated at once


class Launches(TorchDispatchMode):
    """Counts kernels by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returns = function._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        name = function._schema.name.removeprefix("aten::")
        if not is_view and name not in NO_KERNEL:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


def _product(into: torch.Size, a: torch.Size, b: torch.Size, **_: Any) -> int:
    return 2 * a.numel() * b[-1]


IN_PLACE = {torch.ops.aten.addmm_: _product, torch.ops.aten.baddbmm_: _product}


def llama(layers: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512,
        num_hidden_layers=layers,
        intermediate_size=1408,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1024,
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def frozen_base(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    return model


def measure(model: nn.Module, shape: tuple[int, int] = (2, 128)) -> Counts:
    ids = torch.randint(0, 1024, shape, generator=torch.Generator().manual_seed(0))

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def step() -> None:
        loss().backward()
        model.zero_grad(set_to_none=True)

    step()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = loss()
    kept.backward()
    model.zero_grad(set_to_none=True)
    with FlopCounterMode(display=False) as flops, Launches() as launches:
        step()
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as all_flops:
        step()
    counts = sum(launches.seen.values()), sum(saved.values()), flops.get_total_flops(), all_flops.get_total_flops()
    return Counts(*map(float, counts), peak=float(peak_bytes(step)))


def peak_bytes(step: Callable[[], None]) -> int:
    """The most bytes that a step has allocated at once beyond what was there before, by torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def per_layer(adapt: Adapt, shape: tuple[int, int] = (2, 128)) -> Counts:
    """What a layer costs at the margin, with so many rows and tokens."""
    found = []
    for layers in (FEW, MANY):
        model = llama(layers)
        adapted = adapt(model)
        is_model = isinstance(adapted, nn.Module) and not isinstance(adapted, tp.Adapter)
        found.append(measure(adapted if is_model else model, shape))
    few, many = found
    return Counts(*((getattr(many, f) - getattr(few, f)) / (MANY - FEW) for f in Counts.__dataclass_fields__))


def over_base(adapt: Adapt, base: Counts) -> dict[str, float]:
    """Launches more than the base has, and the other figures as shares of its own."""
    found = per_layer(adapt)
    return {
        "launches": found.launches - base.launches,
        "saved": found.saved / base.saved - 1,
        "flops": found.flops / base.flops - 1,
        "all_flops": found.all_flops / base.all_flops - 1,
        "peak": found.peak / base.peak - 1,
    }


def ours(name: str, matrices: list[str], rank: int | None = None) -> Adapt:
    ranked = {} if rank is None else {"rank": rank}
    return lambda model: tp.attach(model, tp.load_spec(name, matrices=matrices, **ranked))


def theirs(config: peft.PeftConfig) -> Adapt:
    return lambda model: peft.get_peft_model(model, config)


CASES: dict[str, tuple[Adapt, Adapt | None]] = {
    "LoRA r=8, q and v": (ours("lora", QV, 8), theirs(peft.LoraConfig(r=8, target_modules=QV))),
    "LoRA r=8, all seven": (ours("lora", ALL, 8), theirs(peft.LoraConfig(r=8, target_modules=ALL))),
    "LoRTA r=8, q and v": (ours("lorta", QV, 8), None),
    "VeRA r=256, q and v": (ours("vera", QV, 256), theirs(peft.VeraConfig(r=256, target_modules=QV))),
    "LoHa r=8, q and v": (ours("loha", QV, 8), theirs(peft.LoHaConfig(r=8, target_modules=QV))),
    "LoKr r=8, q and v": (ours("lokr", QV, 8), theirs(peft.LoKrConfig(r=8, target_modules=QV))),
    "DoRA r=8, q and v": (
        ours("dora", QV, 8),
        theirs(peft.LoraConfig(r=8, use_dora=True, target_modules=QV)),
    ),
    "IA3, k, v and down": (ours("ia3", KVD), theirs(peft.IA3Config(target_modules=KVD, feedforward_modules=KVD[2:]))),
}


def main() -> None:
    warnings.filterwarnings("ignore")
    base = per_layer(frozen_base)
    print(
        f"base, a layer: {base.launches:.0f} launches, {base.saved / 1e6:.2f} MB saved, "
        f"{base.peak / 1e6:.2f} MB at the peak, {base.flops / 1e9:.3f} GFLOP"
    )
    result: dict[str, Any] = {"base": vars(base), "cases": {}}
    for name, (our, their) in CASES.items():
        for whose, adapt in (("tensorpeft", our), ("peft", their)):
            if adapt is None:
                continue
            found = over_base(adapt, base)
            result["cases"].setdefault(name, {})[whose] = {key: round(value, 5) for key, value in found.items()}
            print(
                f"{name:22s} {whose:10s} launches {found['launches']:+6.1f}   saved {found['saved']:+8.2%}   "
                f"FLOPs {found['flops']:+7.2%}   all FLOPs {found['all_flops']:+7.2%}   "
                f"peak {found['peak']:+7.2%}"
            )
    result["versions"] = {m.__name__: m.__version__ for m in (tp, peft, torch, transformers)}
    result["versions"]["python"] = platform.python_version()
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
