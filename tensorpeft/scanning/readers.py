"""Which modules a class reads the weights of, and never calls, by its own source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

from torch import nn

_ABOUT = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "data", "is_meta", "requires_grad"}  # no numbers


@cache
def read_modules(module_class: type[nn.Module]) -> frozenset[str]:
    """The attributes ``x`` of which a class has ``self.x.weight`` and no call ``self.x(...)``, nor any other use.

    What is added to the output of such a module would have no effect. Of a class without a source nothing is known.
    """
    read: set[str] = set()
    used: set[str] = set()
    for each in module_class.__mro__:
        if each is nn.Module:
            break
        for name, is_read in _mentions(each):
            (read if is_read else used).add(name)
    return frozenset(read - used)


def _mentions(module_class: type) -> Iterator[tuple[str, bool]]:
    """Each ``self.x`` of a class, outside of what sets it up, and whether the numbers of its weight are read there."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(module_class))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef) and not function.name.startswith(
            ("__init__", "_init", "init", "reset", "tie")
        ):
            yield from _of_function(function)


def _of_function(function: ast.FunctionDef) -> Iterator[tuple[str, bool]]:
    outer = {inner: node for node in ast.walk(function) for inner in ast.iter_child_nodes(node)}
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            around = outer.get(node)
            if not isinstance(around, ast.Attribute):
                yield node.attr, False
            elif around.attr == "weight":
                beyond = outer.get(around)
                if not (isinstance(beyond, ast.Attribute) and beyond.attr in _ABOUT):
                    yield node.attr, True
            elif around.attr not in ("bias", "training"):
                yield node.attr, False
