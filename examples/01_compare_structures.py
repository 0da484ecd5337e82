"""One budget, five structures: what does each buy with the parameters of a LoRA of rank 1?

Torch is not needed. For every structure the largest rank that fits is found by asking for reports.
"""

from __future__ import annotations

import sys

from tabulate import tabulate

import tensorpeft as tp

MODEL = "llama-2-7b"
SPEC = """
tensorpeft: 1
name: {name}
target: {{matrices: [query, value]}}
rank: 1
{update}
"""
SHARED_A = """\
update: B[matrix, layer, d_out, r] * A[r, d_in]
factors: {A: {init: kaiming_uniform}, B: {init: zeros}}
"""
STRUCTURES = {
    "lora": "structure: matrix",
    "lora, A shared": SHARED_A,
    "tensor train": "structure: tt\nmodes: [d_out, matrix, layer, d_in]",
    "tucker": "structure: tucker",
    "cp": "structure: cp",
}


def report(name: str, update: str, rank: int) -> tp.Report:
    text = SPEC.format(name=name.replace(", ", "_").replace(" ", "_").lower(), update=update)
    return tp.report(tp.load_spec(text, rank=rank), model=MODEL)


def largest(name: str, update: str, budget: int) -> tuple[int, tp.Report]:
    """The largest rank that trains at most `budget` parameters, by bisection, and its report."""
    fits, exceeds = 1, 2
    while report(name, update, exceeds).trainable <= budget:
        fits, exceeds = exceeds, 2 * exceeds
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        fits, exceeds = (middle, exceeds) if report(name, update, middle).trainable <= budget else (fits, middle)
    return fits, report(name, update, fits)


def main() -> None:
    budget = report("lora", STRUCTURES["lora"], 1).trainable
    print(f"{budget:,} trained parameters on query and value of {MODEL}\n")
    rows = []
    for name, update in STRUCTURES.items():
        rank, best = largest(name, update, budget)
        rows.append((name, rank, f"{best.trainable:,}", best.lora_rank, f"{best.flops_per_token:,}"))
    headers = ["structure", "rank", "trained", "rank of dW", "FLOPs a token"]
    print(tabulate(rows, headers, disable_numparse=True))
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
