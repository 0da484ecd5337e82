"""Calls of the interpreter that an adapter adds at each adapted module, decoding and training, beside peft's, kept as JSON.

On small batches and in decoding a step is bound by the interpreter, not by kernels. Counted are the calls of functions, Python's
and C's, by ``sys.setprofile``, in one forward pass without gradients (2 rows of 1 token) and in one training step (2 rows of 16
tokens), over the bare base, divided by the number of adapted modules. The models are warm: three passes come first.

    python tests/benchmarks/calls.py
"""

from __future__ import annotations

import copy
import json
import platform
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tensorpeft as tp

LAYERS = 4
ROLES = ["query", "key", "value", "out", "gate", "up", "down"]
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = ["query", "value"]
ONE, MANY = torch.arange(2).view(2, 1), torch.arange(32).view(2, 16)
# modules a layer, the spec with its settings, and peft's config; then the most calls: decoding, training
ROWS: dict[str, tuple[int, str, dict[str, Any], tuple[str, dict[str, Any]] | None, tuple[int, int]]] = {
    "lora q,v": (
        2,
        "lora",
        {"rank": 8, "matrices": QV},
        ("LoraConfig", {"r": 8, "target_modules": NAMES[:3:2]}),
        (20, 80),
    ),
    "lora all": (
        7,
        "lora",
        {"rank": 8, "matrices": ROLES},
        ("LoraConfig", {"r": 8, "target_modules": NAMES}),
        (20, 75),
    ),
    "lorta q,k,v,o": (4, "lorta", {"rank": 8}, None, (24, 90)),
    "partial_lora q,v": (2, "partial_lora", {"rank": 8, "matrices": QV}, None, (30, 100)),
    "vera q": (
        1,
        "vera",
        {"rank": 32, "matrices": ["query"]},
        ("VeraConfig", {"r": 32, "target_modules": NAMES[:1]}),
        (30, 110),
    ),
    "loha q,v": (
        2,
        "loha",
        {"rank": 8, "matrices": QV},
        ("LoHaConfig", {"r": 8, "target_modules": NAMES[:3:2]}),
        (30, 110),
    ),
    "ia3 k,v,down": (
        3,
        "ia3",
        {},
        ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
        (25, 70),
    ),
    "dora q,v": (
        2,
        "dora",
        {"rank": 8, "matrices": QV},
        ("LoraConfig", {"r": 8, "use_dora": True, "target_modules": NAMES[:3:2]}),
        (80, 220),
    ),
}


def base() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=LAYERS, vocab_size=64))


def decode(model: nn.Module) -> None:
    with torch.no_grad():
        model(input_ids=ONE, use_cache=False)


def train(model: nn.Module) -> None:
    model(input_ids=MANY, labels=MANY, use_cache=False).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


def calls(step: Callable[[nn.Module], None], model: nn.Module, warm: int = 3) -> int:
    """The calls in one step, after some that are not counted."""
    for _ in range(warm):
        step(model)
    found = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        step(model)
    finally:
        sys.setprofile(None)
    return found


def per_module(adapt: Callable[[nn.Module], nn.Module], modules: int) -> tuple[float, float]:
    """The calls that an adapter adds at each module: decoding, training."""
    bare = base()
    adapted = adapt(copy.deepcopy(bare))
    bare.eval(), adapted.eval()
    decoding = calls(decode, adapted) - calls(decode, bare)
    bare.train(), adapted.train()
    training = calls(train, adapted) - calls(train, bare)
    return decoding / modules / LAYERS, training / modules / LAYERS


def ours(name: str) -> tuple[float, float]:
    modules, spec, settings, _, _ = ROWS[name]

    def adapt(model: nn.Module) -> nn.Module:
        tp.attach(model, tp.load_spec(spec, **settings))
        return model

    return per_module(adapt, modules)


def theirs(name: str) -> tuple[float, float] | None:
    import peft

    modules, _, _, config, _ = ROWS[name]
    if config is None:
        return None
    kind, settings = config
    return per_module(lambda model: peft.get_peft_model(model, getattr(peft, kind)(**settings)), modules)


def main() -> None:
    import peft

    rows = {name: {"ours": ours(name), "peft": theirs(name), "at most": ROWS[name][4]} for name in ROWS}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "peft": peft.__version__}
    kept = {"machine": platform.machine(), "versions": versions, "calls per adapted module (decoding, training)": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    print(f"{'calls per adapted module, over the base':<40} {'peft':>16} {'ours':>16}   (decoding, training)")
    for name, row in rows.items():
        shown = [f"{each[0]:6.0f} {each[1]:6.0f}" if each else "-" for each in (row["peft"], row["ours"])]
        print(f"{name:<40} {shown[0]:>16} {shown[1]:>16}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
