"""The public names: all there, none paid for before it is used."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
import tomllib
from errno import ENOSPC
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner

import tensorpeft
from tensorpeft import cli

ROOT = Path(__file__).resolve().parents[1]


def run(script: str) -> str:
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_importing_the_package_imports_nothing_else():
    script = (
        "import sys; before = set(sys.modules); import tensorpeft; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    assert run(script).split() == ["tensorpeft"]


@pytest.mark.parametrize("name", tensorpeft.__all__)
def test_public_names(name):
    found = getattr(tensorpeft, name)
    assert name == "__version__" or found.__name__ == name
    assert name in dir(tensorpeft)


def test_a_name_that_is_not_public():
    with pytest.raises(AttributeError, match="module `tensorpeft` has no attribute `atach`"):
        tensorpeft.atach  # noqa: B018


@pytest.mark.parametrize(
    "imports",
    [
        "import tensorpeft; import tensorpeft.reporting.report",
        "import tensorpeft.reporting.report; import tensorpeft",
        "import tensorpeft; tensorpeft.report; import tensorpeft.cli, tensorpeft.reporting.report",
    ],
)
def test_report_stays_the_function(imports):
    assert run(f"{imports}; print(tensorpeft.report.__name__, callable(tensorpeft.report))") == "report True\n"


def test_the_version_is_that_of_the_project():
    assert tensorpeft.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "tensorpeft").rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    failed, tried = doctest.testmod(import_module(name))
    assert tried
    assert not failed


def without_torch(*command: str) -> str:
    """What the command line prints, in a process of its own, in which no torch was imported."""
    script = (
        f"import sys; from tensorpeft.cli import main; main({list(command)}, standalone_mode=False); "
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)"
    )
    return run(script)


def test_a_report_needs_no_torch():
    """Not even the command line's, on a model of 70 billion parameters."""
    found = json.loads(without_torch("report", "lorta", "--model", "llama-3-70b", "--format", "json"))
    assert found["trainable"] == 8 * (4 + 80 + 64 + 8 + 128 + 8192)
    assert found["base"] == 70_553_706_496


@pytest.mark.parametrize(
    "command",
    [
        ["sweep", "--model", "llama-2-7b", "--budget", "20k"],
        ["catalogue"],
        ["explain", "lorta", "--model", "llama-3-70b", "--format", "svg"],
        ["expand", "vera"],
        ["check", "lora"],
    ],
    ids=" ".join,
)
def test_no_command_needs_torch_to_count_or_draw(command):
    assert without_torch(*command)


def test_python_dash_m():
    command = [sys.executable, "-m", "tensorpeft", "--version"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown == f"tensorpeft, version {tensorpeft.__version__}\n"


def test_a_full_disk_is_told_without_a_traceback(monkeypatch):
    def full(*args, **options):
        raise OSError(ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "_deliver", full)
    done = CliRunner().invoke(cli.main, ["catalogue"])
    assert (done.exit_code, done.stderr) == (1, "Error: No space left on device\n")
