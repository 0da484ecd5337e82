"""Attach LoRA to all linears of a 70B Llama on the meta device, and peft's LoRA to its twin, in turn.

Prints CPU seconds and their ratio, and keeps them beside this file with the machine and the versions.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers
from tqdm import trange
from transformers import LlamaConfig, LlamaForCausalLM

import tensorpeft as tp

PAIRS = 5
CONFIG = LlamaConfig(
    hidden_size=8192, num_hidden_layers=80, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8
)


def seconds(attach: Callable[[torch.nn.Module], object]) -> float:
    """CPU seconds that attaching to a fresh model takes."""
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG)
    began = time.process_time()
    attach(model)
    return time.process_time() - began


def with_peft(model: torch.nn.Module) -> object:
    config = peft.LoraConfig(r=8, target_modules="all-linear")
    return peft.get_peft_model(model, config, low_cpu_mem_usage=True)


def main() -> None:
    spec = tp.load_spec("lora", matrices=["all-linear"])
    seconds(lambda model: tp.attach(model, spec))  # imports and caches, of both
    seconds(with_peft)
    pairs = [(seconds(lambda model: tp.attach(model, spec)), seconds(with_peft)) for _ in trange(PAIRS, leave=False)]
    result = {
        "tensorpeft_s": [round(ours, 4) for ours, _ in pairs],
        "peft_s": [round(theirs, 4) for _, theirs in pairs],
        "median_ratio": round(statistics.median(ours / theirs for ours, theirs in pairs), 4),
        "machine": f"{platform.machine()}, {platform.system()}, CPU",
        "versions": {m.__name__: m.__version__ for m in (tp, peft, torch, transformers)}
        | {"python": platform.python_version()},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
