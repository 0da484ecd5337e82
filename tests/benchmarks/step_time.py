"""Time of a training step and of a decoding step, beside PEFT and the frozen base in one run.

Every round times the base, then each contender, one step each; what is kept is the ratio to the base of the same round, so that a
slow moment of the machine hits all alike. Medians of at least nine rounds. On a GPU the blocks have the shape of Llama-3-8B's, in
bfloat16; on a CPU they are scaled down and in float32. The figures, the machine and the versions go into the JSON file beside
this one, the medians into a picture.

    python tests/benchmarks/step_time.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import tensorpeft as tp

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
SIZES = (
    {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    if GPU
    else {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2}
) | {"num_hidden_layers": 4 if GPU else 2, "vocab_size": 256, "use_cache": False}
TRAINED = (8, 1024) if GPU else (2, 128)  # batch, tokens
DECODED = (64, 1)
QV = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Adapt = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Contender:
    """One way to adapt the model."""

    name: str
    adapt: Adapt


def ours(name: str, matrices: list[str], **settings: object) -> Adapt:
    def adapt(model: nn.Module) -> nn.Module:
        tp.attach(model, tp.load_spec(name, matrices=matrices, **settings))
        return model

    return adapt


def theirs(config: peft.PeftConfig) -> Adapt:
    return lambda model: peft.get_peft_model(model, config)


def frozen(model: nn.Module) -> nn.Module:
    """The base alone, its gradient flowing to the embeddings: the part of the backward pass that any adapter needs."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    return model


CONTENDERS = (
    Contender("lora r=8 qv", ours("lora", QV)),
    Contender("lora r=8 qv, peft", theirs(peft.LoraConfig(r=8, target_modules=QV))),
    Contender("lorta r=8 qv", ours("lorta", QV)),
    Contender("lora r=16 all", ours("lora", LINEAR, rank=16)),
    Contender("lora r=16 all, peft", theirs(peft.LoraConfig(r=16, target_modules=LINEAR))),
    Contender("vera r=256 qv", ours("vera", QV)),
    Contender("vera r=256 qv, peft", theirs(peft.VeraConfig(r=256, target_modules=QV))),
    Contender("loha r=8 qv", ours("loha", QV)),
    Contender("loha r=8 qv, peft", theirs(peft.LoHaConfig(r=8, target_modules=QV))),
    Contender("lokr r=8 qv", ours("lokr", QV)),
    Contender("lokr r=8 qv, peft", theirs(peft.LoKrConfig(r=8, target_modules=QV))),
    Contender("randlora r=32 q", ours("randlora", QV[:1], rank=32)),
    Contender("randlora r=32 q, peft", theirs(peft.RandLoraConfig(r=32, target_modules=QV[:1]))),
    Contender("fact_tt a=b=16 qv", ours("fact_tt", QV)),
    Contender("lotr a=b=8 qv", ours("lotr", QV)),
)


def built(adapt: Adapt, compiled: bool) -> nn.Module:
    torch.manual_seed(0)
    model = adapt(LlamaForCausalLM(LlamaConfig(**SIZES)).to(DEVICE, DTYPE))
    return torch.compile(model) if compiled else model


def training_step(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def decoding_step(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids)


def seconds(step: Callable[[], None]) -> float:
    if GPU:
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_bytes(step: Callable[[], None]) -> int | None:
    """The most memory that a step holds; on a GPU alone can it be told."""
    if not GPU:
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    return int(torch.cuda.max_memory_allocated())


def ratios(
    step: Callable[[nn.Module, Tensor], None], shape: tuple[int, int], rounds: int, compiled: bool
) -> dict[str, dict[str, object]]:
    """For each contender, its times as ratios to the base's, round by round: two models at a time are in memory."""
    ids = torch.randint(SIZES["vocab_size"], shape, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    base = built(frozen, compiled)
    found: dict[str, dict[str, object]] = {}
    for contender in tqdm(CONTENDERS, desc=f"{step.__name__}{', compiled' * compiled}", leave=False):
        model = built(contender.adapt, compiled)
        for _ in range(3):  # warm up: plans, caches, kernels
            step(base, ids)
            step(model, ids)
        pairs = [
            (seconds(lambda: step(base, ids)), seconds(lambda model=model: step(model, ids))) for _ in range(rounds)
        ]
        each = [mine / its for its, mine in pairs]
        found[contender.name] = {
            "median": round(statistics.median(each), 4),
            "rounds": [round(ratio, 4) for ratio in each],
            "peak_bytes": peak_bytes(lambda model=model: step(model, ids)),
            "base_s": round(statistics.median(its for its, _ in pairs), 5),
        }
    return found


def picture(medians: dict[str, float], title: str) -> str:
    """Horizontal bars, longer is slower; the line at 1 is the frozen base."""
    left, unit, row = 190, 220, 22
    height = row * len(medians) + 50
    bars = []
    for at, (name, ratio) in enumerate(medians.items()):
        y = 40 + row * at
        colour = "#b8b8b8" if name.endswith("peft") else "#3b6ea8"
        bars.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{name}</text>')
        bars.append(f'<rect x="{left}" y="{y}" width="{unit * ratio:.1f}" height="{row - 6}" fill="{colour}"/>')
        bars.append(f'<text x="{left + unit * ratio + 6:.1f}" y="{y + 13}">{ratio:.2f}</text>')
    line = f'<line x1="{left + unit}" x2="{left + unit}" y1="34" y2="{height - 8}" stroke="#c03028" stroke-dasharray="4 3"/>'
    width = left + unit * max(medians.values()) + 60
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" font-family="sans-serif" '
        f'font-size="12"><text x="8" y="20" font-size="14">{title}</text>{"".join(bars)}{line}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = max(9, parser.parse_args().rounds)
    cases = {"training, eager": (training_step, TRAINED, False), "decoding, eager": (decoding_step, DECODED, False)}
    if GPU:
        cases |= {
            "training, compiled": (training_step, TRAINED, True),
            "decoding, compiled": (decoding_step, DECODED, True),
        }
    results = {name: ratios(step, shape, rounds, compiled) for name, (step, shape, compiled) in cases.items()}
    kept = {
        "ratios_to_the_frozen_base": results,
        "model": SIZES,
        "tokens": {"training": TRAINED, "decoding": DECODED},
        "machine": torch.cuda.get_device_name() if GPU else f"{platform.machine()}, {torch.get_num_threads()} threads",
        "dtype": str(DTYPE),
        "versions": {m.__name__: m.__version__ for m in (tp, peft, torch, transformers)},
    }
    here = Path(__file__).with_name(f"step_time_{'gpu' if GPU else 'cpu'}")
    here.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    medians = {name: float(str(entry["median"])) for name, entry in results["training, eager"].items()}
    here.with_suffix(".svg").write_text(picture(medians, "A training step, as a ratio to the frozen base's"))
    for case, found in results.items():
        print(case, *(f"  {name:24s} {entry['median']}" for name, entry in found.items()), sep="\n")


if __name__ == "__main__":
    main()
