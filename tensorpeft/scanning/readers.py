"""Which modules a class reads the weights of, by its own source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

from torch import nn

_ABOUT = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "data", "is_meta", "requires_grad"}  # no numbers


@cache
def read_modules(module_class: type[nn.Module], *, called: bool) -> frozenset[str]:
    """The attributes ``x`` of which a class has ``self.x.weight``; those without a call ``self.x(...)``, or with one too.

    What is added to the output of such a module has no effect where the weight is read: in a fused kernel that does the work
    of a call, say. (Torch's own classes take theirs only where no module has a hook.) Of a class without a source nothing is
    known.
    """
    read: set[str] = set()
    used: set[str] = set()
    for each in module_class.__mro__:
        if each is nn.Module:
            break
        mentions = set(_mentions(each))
        used |= {name for name, is_read in mentions if not is_read}
        by_torch = each.__module__.startswith("torch.")
        read |= {name for name, is_read in mentions if is_read and not (by_torch and (name, False) in mentions)}
    return frozenset(read if called else read - used)


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
                if not _is_about(outer.get(around)):
                    yield node.attr, True
            elif around.attr not in ("bias", "training"):
                yield node.attr, False


def _is_about(use: ast.AST | None) -> bool:
    """Whether a use of a weight asks for no number of it: ``weight.dtype``, ``isinstance(weight, Tensor)``."""
    if isinstance(use, ast.Call):
        return isinstance(use.func, ast.Name) and use.func.id == "isinstance"
    return isinstance(use, ast.Attribute) and use.attr in _ABOUT
