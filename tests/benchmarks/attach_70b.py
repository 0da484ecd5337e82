"""Attach and compile every spec of the catalogue for a 70B Llama on the meta device, and peft's LoRA on the same, in turn.

Every measurement is made in a process of its own, forked where imports and the first attachment of either library are behind it:
of the spec nothing has been read, planned or emitted before. CPU seconds,

    attach   of ``tensorpeft.attach`` by the spec's name
    compile  of what a first training step and a first decoding step then plan and emit
    peft     of ``get_peft_model`` with LoRA on all linear modules
    alike    of the same with LoRA on the modules that the spec adapts; no spec without sites has it

and ratios, (attach + compile) / peft and (attach + compile) / alike. Prints medians, and keeps everything beside this file
with the machine and the versions.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

import tensorpeft as tp
from tensorpeft.language.shipped import method_paths

PAIRS = 3
WARM = ("lora", "vera")  # a shorthand and an update, so that both grammars are read
CONFIG = LlamaConfig(
    hidden_size=8192, num_hidden_layers=80, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8
)
LEFT_OUT = {"targeted_lora": "it reads a score for every element of the weights of query and value, 6 billion"}
COLUMNS = ("attach", "compile", "peft", "alike")


def fresh() -> nn.Module:
    with torch.device("meta"):
        return LlamaForCausalLM(CONFIG)


def ours(model: nn.Module, name: str) -> tuple[float, float]:
    """To attach, and to compile what then runs."""
    began = time.process_time()
    adapter = tp.attach(model, tp.load_spec(name))
    attached = time.process_time()
    for call in (call for program in adapter.engine.programs.made() for call in program.sets):
        call.program.epilogues, call.program.whole  # noqa: B018
    return attached - began, time.process_time() - attached


def theirs(model: nn.Module, modules: str | list[str]) -> float:
    """To attach."""
    began = time.process_time()
    peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=modules), low_cpu_mem_usage=True)
    return time.process_time() - began


def modules_of(model: nn.Module, name: str) -> list[str] | str:
    """The last names of the modules that a spec adapts; or why it cannot be attached."""
    try:
        return sorted({site.module.rpartition(".")[2] for site in tp.attach(model, name).sites})
    except tp.SpecError as error:
        return str(error).splitlines()[0]


def apart(measure: Callable[..., Any], *args: object) -> Any:
    """What a function returns in a process of its own."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    gc.collect()
    child = fork.Process(target=lambda: sender.send(measure(*args)))
    child.start()
    sender.close()
    found = receiver.recv()
    child.join()
    return found


def measured(model: nn.Module, name: str, modules: list[str]) -> tuple[float, float, float, float | None]:
    """One number for each column."""
    attach, compiled = apart(ours, model, name)
    return attach, compiled, apart(theirs, model, "all-linear"), apart(theirs, model, modules) if modules else None


def summed_up(rows: list[tuple[float, float, float, float | None]]) -> dict[str, Any]:
    """All seconds of a spec, and the medians of its ratios."""
    found: dict[str, Any] = {
        key: [each and round(each, 4) for each in column]
        for key, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)
    }
    for key, at in (("ratio", 2), ("ratio_alike", 3)):
        ratios = [(row[0] + row[1]) / other for row in rows if (other := row[at])]
        found[key] = round(statistics.median(ratios), 3) if ratios else None
    return found


def table(specs: dict[str, dict[str, Any]]) -> str:
    """Medians, the dearest specs first."""
    lines = [f"{'':24}" + "".join(f"{key:>9}" for key in (*COLUMNS, "ratio", "alike"))]
    for name, found in sorted(specs.items(), key=lambda item: -item[1]["ratio"]):
        medians = [statistics.median(found[key]) if None not in found[key] else None for key in COLUMNS]
        cells = [*medians, found["ratio"], found["ratio_alike"]]
        lines.append(f"{name:24}" + "".join(f"{'-':>9}" if cell is None else f"{cell:9.3f}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    for name in WARM:
        ours(fresh(), name)
    theirs(fresh(), "all-linear")
    model = fresh()
    adapted = {name: apart(modules_of, model, name) for name in method_paths() if name not in LEFT_OUT}
    refused = {name: reason for name, reason in adapted.items() if isinstance(reason, str)}
    names = [name for name in adapted if name not in refused]
    rows: dict[str, list[Any]] = {name: [] for name in names}
    for name in tqdm([name for _ in range(PAIRS) for name in names], leave=False):
        rows[name].append(measured(model, name, adapted[name]))
    specs = {name: summed_up(rows[name]) for name in names}
    result = {
        "specs": specs,
        "largest_ratio": max(found["ratio"] for found in specs.values()),
        "left_out": {**LEFT_OUT, **refused},
        "machine": f"{platform.machine()}, {platform.system()}, CPU",
        "versions": {m.__name__: m.__version__ for m in (tp, peft, torch, transformers)}
        | {"python": platform.python_version()},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(specs))


if __name__ == "__main__":
    main()
