"""What the README shows is what happens: its specs are the shipped ones, its commands print this, its Python runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
MAIN = "import sys; from tensorpeft.cli import main; sys.exit(main())"


def blocks(language: str) -> list[str]:
    found = [code for kind, code in BLOCKS if kind == language]
    assert found, f"the README has no {language} block"
    return found


@pytest.mark.parametrize("block", blocks("console"))
def test_commands_print_what_the_readme_shows(block, tmp_path):
    for call in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, shown = call.partition("\n")
        program, *arguments = shlex.split(command)
        assert program == "tensorpeft"
        done = subprocess.run(
            [sys.executable, "-c", MAIN, *arguments],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stderr == ""
        assert [line.rstrip() for line in done.stdout.strip().splitlines()] == shown.strip().splitlines()


def test_its_table_of_costs_is_what_was_counted():
    counted = json.loads((ROOT / "tests" / "benchmarks" / "counted.json").read_text())["cases"]
    rows = []
    for name, found in counted.items():
        ours, theirs = (_costs(found[whose]) if whose in found else None for whose in ("tensorpeft", "peft"))
        cells = ours if theirs is None else [f"{a} ({b})" for a, b in zip(ours, theirs, strict=True)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    assert "\n".join(rows) in (ROOT / "README.md").read_text()


def _costs(found: dict[str, float]) -> list[str]:
    return [f"{found['launches']:+.0f}", *(f"{found[what]:+.1%}" for what in ("saved", "peak", "all_flops"))]


def test_python_runs_and_leaves_the_base_as_it_was(tmp_path, monkeypatch):
    """In the order of the README, in one namespace, on a small random model."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokens = torch.randint(64, (2, 8))
    namespace = {"model": model, "batches": [{"input_ids": tokens, "labels": tokens}] * 2}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), namespace)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_specs_are_the_shipped_ones(block):
    name, _, body = block.removeprefix("# specs/").partition("\n")
    shipped = (ROOT / "specs" / name).read_text()
    assert body == "".join(line for line in shipped.splitlines(keepends=True) if not line.startswith("#"))


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for block in blocks("sh") for target in re.findall(r"make (\w+)", block)}
    assert {"demo", "test"} <= named <= targets
