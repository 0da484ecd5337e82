"""The repository keeps what its documents say: layout, sizes, version, and a wheel that carries its data."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tensorpeft"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAX_LINES_OF_FILE, MAX_LINES_OF_FUNCTION = 400, 60


def test_layout_table_is_the_import_contract():
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    layers = next(c["layers"] for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    modules = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert table == layers
    assert set(layers) == modules - {"__init__", "__main__"}


def test_the_changelog_has_an_entry_for_this_version():
    assert f"## [{PROJECT['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_package_says_the_same_version():
    assert f'__version__ = "{PROJECT["project"]["version"]}"' in (PACKAGE / "version.py").read_text()


def test_every_dependency_is_pinned_for_the_tests():
    def name(requirement: str) -> str:
        return re.split(r"[\[<>=]", requirement)[0].replace("_", "-").lower()

    wanted = {name(r) for r in PROJECT["project"]["dependencies"]}
    wanted |= {name(r) for extra in PROJECT["project"]["optional-dependencies"].values() for r in extra}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    assert wanted - {"tensorpeft"} <= pinned


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    code = path.read_text()
    functions = [n for n in ast.walk(ast.parse(code)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: n for f in functions if (n := f.end_lineno - f.lineno + 1) > MAX_LINES_OF_FUNCTION}
    assert len(code.splitlines()) <= MAX_LINES_OF_FILE
    assert not long


def test_the_wheel_works_without_the_checkout(tmp_path):
    """The grammars and specs come along, and are the ones that an installed package reads."""
    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path)))
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    data = [path for folder in ("grammars", "specs") for path in (ROOT / folder).rglob("*") if path.is_file()]
    packed = installed / "tensorpeft" / "_data"
    assert {path.relative_to(ROOT) for path in data} == {
        path.relative_to(packed) for path in packed.rglob("*") if path.is_file()
    }

    script = (
        "import tensorpeft as tp; print(tp.__file__, tp.report(tp.load_spec('lora'), model='llama-2-7b').trainable)"
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", script]
    output = subprocess.run(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    where, trainable = output.rsplit(maxsplit=1)
    assert Path(where).is_relative_to(installed)
    assert trainable == "4194304"  # 32 layers x 2 matrices x 8 x (4096 + 4096)
