"""Time of a training step and of a decoding step, beside a rival and the frozen base in one run.

Every round takes one step of the base, of the contender and of its rival, each time in another order; what is kept are ratios
within a round, so that a slow moment of the machine hits all alike, and their medians. The rival is PEFT's own of the same
method, or our LoRA where PEFT has none.

On a GPU the blocks have the shape of Llama-3-8B's, in bfloat16, and times are the wall's; on a CPU they are scaled down, in
float32, and times are CPU seconds of one thread. The figures, the machine and the versions go into the JSON file beside this
one, the training step's medians into a picture.

    python tests/benchmarks/step_time.py [--rounds 25]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import tensorpeft as tp

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
SIZES: dict[str, Any] = (
    {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    if GPU
    else {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2}
) | {"num_hidden_layers": 4 if GPU else 2, "vocab_size": 256, "use_cache": False}
TRAINED = (8, 1024) if GPU else (2, 128)  # batch, tokens
DECODED = (64, 1)
QV = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_UP = 3  # steps: plans, caches, kernels
Adapt = Callable[[nn.Module], nn.Module]
Step = Callable[[nn.Module, Tensor], None]


@dataclass(frozen=True)
class Contest:
    """One of our adapters, and what it is compared with beside the frozen base."""

    name: str
    ours: Adapt
    rival_name: str
    rival: Adapt


def ours(name: str, matrices: list[str], rank: int | None = None) -> Adapt:
    def adapt(model: nn.Module) -> nn.Module:
        ranked = {} if rank is None else {"rank": rank}
        tp.attach(model, tp.load_spec(name, matrices=matrices, **ranked))
        return model

    return adapt


def against_peft(name: str, mine: Adapt, config: peft.PeftConfig) -> Contest:
    return Contest(name, mine, "peft", lambda model: peft.get_peft_model(model, config))


def against_lora(name: str, mine: Adapt) -> Contest:
    return Contest(name, mine, "our lora r=8", ours("lora", QV))


def frozen(model: nn.Module) -> nn.Module:
    """The base alone, its gradient flowing to the embeddings: the part of the backward pass that any adapter needs."""
    model.requires_grad_(False)
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
    return model


CONTESTS = (
    against_peft("lora r=8 qv", ours("lora", QV), peft.LoraConfig(r=8, target_modules=QV)),
    against_peft("lora r=16 all", ours("lora", LINEAR, 16), peft.LoraConfig(r=16, target_modules=LINEAR)),
    against_peft("vera r=256 qv", ours("vera", QV), peft.VeraConfig(r=256, target_modules=QV)),
    against_peft("loha r=8 qv", ours("loha", QV), peft.LoHaConfig(r=8, target_modules=QV)),
    against_peft("lokr r=8 qv", ours("lokr", QV), peft.LoKrConfig(r=8, target_modules=QV)),
    against_peft(
        "randlora r=32 q", ours("randlora", QV[:1], 32), peft.RandLoraConfig(r=32, target_modules=QV[:1])
    ),
    against_lora("lorta r=8 qv", ours("lorta", QV)),
    against_lora("fact_tt a=b=16 qv", ours("fact_tt", QV)),
    against_lora("lotr a=b=8 qv", ours("lotr", QV)),
)  # fmt: skip


def built(adapt: Adapt, *, compiled: bool) -> nn.Module:
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
    """Of the wall on a GPU, when it is done; of the CPU else, which does not count what other processes do."""
    if not GPU:
        began = time.process_time()
        step()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_bytes(step: Callable[[], None]) -> int | None:
    """The most memory that a step takes beyond what was there before; on a GPU alone can it be told."""
    if not GPU:
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return int(torch.cuda.max_memory_allocated()) - before


def contest(step: Step, base: nn.Module, one: Contest, ids: Tensor, rounds: int, *, compiled: bool) -> dict[str, Any]:
    """Ratios of the three, round by round: three models at a time are in memory."""
    models = {"base": base, "ours": built(one.ours, compiled=compiled), "rival": built(one.rival, compiled=compiled)}
    steps = {name: partial(step, model, ids) for name, model in models.items()}
    for _ in range(WARM_UP):
        for each in steps.values():
            each()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for n in range(rounds):
        order = list(steps)[n % 3 :] + list(steps)[: n % 3]
        for name in order:
            times[name].append(seconds(steps[name]))

    def ratios(over: str, under: str) -> list[float]:
        return [round(a / b, 4) for a, b in zip(times[over], times[under], strict=True)]

    rounded = {"ours": ratios("ours", "base"), "rival": ratios("rival", "base"), "to_rival": ratios("ours", "rival")}
    return {
        "rival": one.rival_name,
        "medians": {name: round(statistics.median(each), 4) for name, each in rounded.items()},
        "rounds": rounded,
        "base_s": round(statistics.median(times["base"]), 5),
        "peak_bytes": {name: peak_bytes(each) for name, each in steps.items()},
    }


def run(step: Step, shape: tuple[int, int], rounds: int, *, compiled: bool) -> dict[str, dict[str, Any]]:
    """All contests at one kind of step."""
    ids = torch.randint(SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    base = built(frozen, compiled=compiled)
    bar = tqdm(CONTESTS, desc=f"{step.__name__}{', compiled' * compiled}", leave=False)
    return {one.name: contest(step, base, one, ids, rounds, compiled=compiled) for one in bar}


def picture(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars of the medians, longer is slower; the line at 1 is the frozen base."""
    figure = Figure(figsize=(8, 0.55 * len(found) + 1.2), layout="constrained")
    axes = figure.subplots()
    for n, one in enumerate(found.values()):
        axes.barh(n - 0.2, one["medians"]["ours"], 0.38, color="tab:blue", label="tensorpeft" if n == 0 else None)
        colour = "tab:gray" if one["rival"] == "peft" else "tab:cyan"
        axes.barh(n + 0.2, one["medians"]["rival"], 0.38, color=colour)
        axes.text(one["medians"]["rival"], n + 0.2, f" {one['rival']}", va="center", fontsize=8)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.axvline(1, color="tab:red", linestyle="--", label="frozen base")
    axes.set_xlabel("time of a training step, as a ratio to the frozen base's")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    figure.savefig(path, metadata={"Date": None})


def table(found: dict[str, dict[str, Any]]) -> str:
    rows = [(name, *one["medians"].values(), one["rival"]) for name, one in found.items()]
    return tabulate(rows, headers=["", "ours / base", "rival / base", "ours / rival", "rival"], floatfmt=".3f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    rounds = max(9, parser.parse_args().rounds)
    if not GPU:
        torch.set_num_threads(1)
    cases = {"training, eager": (training_step, TRAINED, False), "decoding, eager": (decoding_step, DECODED, False)}
    if GPU:
        cases |= {
            "training, compiled": (training_step, TRAINED, True),
            "decoding, compiled": (decoding_step, DECODED, True),
        }
    results = {}
    for name, (step, shape, compiled) in cases.items():
        results[name] = run(step, shape, rounds, compiled=compiled)
        print(name, table(results[name]), sep="\n\n", end="\n\n")
    kept = {
        "steps": results,
        "model": SIZES,
        "tokens": {"training": TRAINED, "decoding": DECODED},
        "machine": torch.cuda.get_device_name() if GPU else f"{platform.machine()}, one thread, CPU seconds",
        "dtype": str(DTYPE),
        "versions": {m.__name__: m.__version__ for m in (tp, peft, torch, transformers)},
    }
    here = Path(__file__).with_name(f"step_time_{'gpu' if GPU else 'cpu'}")
    here.with_suffix(".json").write_text(json.dumps(kept, indent=1) + "\n")
    picture(results["training, eager"], here.with_suffix(".svg"))


if __name__ == "__main__":
    main()
