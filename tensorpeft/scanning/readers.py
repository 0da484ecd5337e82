"""Which modules a class reads the weights of, by its own source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache

from torch import nn

_ABOUT = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "data", "is_meta", "requires_grad"}  # no numbers
_SET_UP = ("__init__", "_init", "init", "reset", "tie")  # how names of methods that set a class up begin


@cache
def read_modules(module_class: type[nn.Module], *, called: bool) -> frozenset[str]:
    """The attributes ``x`` of which a class has ``self.x.weight``; those without a call ``self.x(...)``, or with one too.

    What is added to the output of such a module has no effect where the weight is read: in a fused kernel that does the work
    of a call, say. (Torch's own classes take theirs only where no module has a hook.) A weight is replaced for the time of the
    class's forward, so of what is called too, what other methods read does not count. Of a class without a source nothing is
    known.
    """
    methods: dict[str, set[str]] = {}  # what each mentions, weights apart
    readers: dict[str, set[str]] = {}  # whose weights each reads
    for each in module_class.__mro__:
        if each is nn.Module:
            break
        mentions = _mentions(each)
        by_torch = each.__module__.startswith("torch.")
        called_here = {name for _, name, is_read in mentions if not is_read}
        for method, name, is_read in mentions:
            if not is_read:
                methods.setdefault(method, set()).add(name)
            elif not (by_torch and name in called_here):
                readers.setdefault(method, set()).add(name)
    used = set().union(*methods.values())
    read = set().union(*(readers.get(name, set()) for name in _reached(methods)))
    never = set().union(*readers.values()) - used
    return frozenset(never | read if called else never)


def _reached(methods: Mapping[str, set[str]]) -> set[str]:
    """The methods that the forward calls, and those that these call."""
    reached, new = set(), {"forward"}
    while new:
        reached |= new
        new = set().union(*(methods.get(name, set()) for name in new)) - reached
    return reached


@cache
def _mentions(module_class: type) -> frozenset[tuple[str, str, bool]]:
    """Each method with each ``self.x`` in it, outside of what sets a class up, and whether numbers of its weight are read.

    Cached, since the classes of a library have long ancestors in common.
    """
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(module_class))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return frozenset()
    functions = (each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef))
    methods = [each for each in functions if not each.name.startswith(_SET_UP)]
    return frozenset((method.name, name, is_read) for method in methods for name, is_read in _of_function(method))


def _of_function(function: ast.FunctionDef) -> Iterator[tuple[str, bool]]:
    outer = {inner: node for node in ast.walk(function) for inner in ast.iter_child_nodes(node)}
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            around = outer[node]
            part = around.attr if isinstance(around, ast.Attribute) else ""
            is_weight = part == "weight"
            if part not in ("bias", "training") and not (is_weight and _is_about(outer.get(around))):
                yield node.attr, is_weight


def _is_about(use: ast.AST | None) -> bool:
    """Whether a use of a weight asks for no number of it: ``weight.dtype``, ``isinstance(weight, Tensor)``."""
    if isinstance(use, ast.Call):
        return isinstance(use.func, ast.Name) and use.func.id == "isinstance"
    return isinstance(use, ast.Attribute) and use.attr in _ABOUT
