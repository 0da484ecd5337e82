"""The private names of torch that the library relies on: each is there, and none is used that is not named."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from tensorpeft.runtime import torch_internals
from tensorpeft.runtime.torch_internals import ATTRIBUTES

PACKAGE = Path(torch_internals.__file__).parents[1]
SOURCE = Path(torch_internals.__file__).read_text()


def private_paths(code: str) -> set[str]:
    """Dotted names that start at torch and have a private part, and private names that are imported from it."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            if re.match(r"torch\.[\w.]*\b_\w+$", path):
                found.add(path)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found |= {f"{node.module}.{each.name}" for each in node.names if "._" in f"{node.module}.{each.name}"}
    return found


@pytest.mark.parametrize("path", sorted(private_paths(SOURCE)))
def test_a_private_name_is_there(path: str) -> None:
    """A release of torch that lacks one is told by that name."""
    found: object = torch
    for part in path.split(".")[1:]:
        assert hasattr(found, part), f"torch {torch.__version__} has no `{path}`"
        found = getattr(found, part)


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in ATTRIBUTES.items() for name in names])
def test_a_private_attribute_is_there(owner: type, name: str) -> None:
    assert hasattr(torch.zeros(1) if owner is torch.Tensor else nn.Linear(1, 1), name)


def test_no_other_file_uses_one() -> None:
    others = {
        str(path.relative_to(PACKAGE)): found
        for path in PACKAGE.rglob("*.py")
        if path.name != "torch_internals.py" and (found := private_paths(path.read_text()))
    }
    assert others == {}


def test_every_private_attribute_of_a_tensor_or_module_is_named() -> None:
    named = {name for names in ATTRIBUTES.values() for name in names}
    of_torch = {name for each in (torch.zeros(1), nn.Linear(1, 1)) for name in dir(each) if name.startswith("_")}
    used = {
        node.attr
        for path in PACKAGE.rglob("*.py")
        if path.name != "torch_internals.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id == "self")
    }
    assert {name for name in used & of_torch if not name.startswith("__")} == named
