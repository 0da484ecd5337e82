"""Arithmetic of a spec over whole arrays: the numbers of a ``formula``, the entries of a ``where``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import numpy as np

from tensorpeft.language.errors import did_you_mean, fail, listing
from tensorpeft.language.syntax import CONSTANTS, Call, Choice, Expression, Name, Number, Operation
from tensorpeft.numerics import elementary

_CHUNK = 1 << 16  # numbers at a time, so that what is between stays in the cache
_OPERATIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "+": np.add,
    "-": np.subtract,
    "*": np.multiply,
    "/": np.divide,
    "**": elementary.power,
}
_FUNCTIONS: dict[str, Callable[..., np.ndarray]] = {
    "sqrt": np.sqrt,
    "ceil": np.ceil,
    "floor": np.floor,
    "min": lambda *values: reduce(np.minimum, values),
    "max": lambda *values: reduce(np.maximum, values),
    "mod": np.mod,
    "gcd": lambda a, b: np.gcd(a.astype(np.int64), b.astype(np.int64)).astype(np.float64),
    "exp": elementary.exp,
    "cos": elementary.cos,
    "sin": elementary.sin,
    "equal": lambda a, b: np.equal(a, b).astype(np.float64),
    "less": lambda a, b: np.less(a, b).astype(np.float64),
}


def evaluate(expression: Expression, indices: Mapping[str, np.ndarray], sizes: Mapping[str, float]) -> np.ndarray:
    """The values of an expression, in float64: ``indices`` are arrays that broadcast, ``size(name)`` and other names are sizes.

    Raises:
        SpecError: a name means nothing here, or a value is not finite.
    """
    shape = np.broadcast_shapes(*(index.shape for index in indices.values()))
    found = np.empty(shape)
    rows = max(1, _CHUNK // max(1, found[:1].size)) if shape else 1
    with np.errstate(all="ignore"):
        for first in range(0, shape[0] if shape else 1, rows):
            part = slice(first, first + rows)
            here = {name: _rows(index, part, len(shape)) for name, index in indices.items()}
            found[part if shape else ()] = _evaluate(expression, here, sizes)
    if not np.isfinite(found).all():
        raise fail(f"`{expression}` has no finite value at some index", expression.span)
    return found


def _rows(index: np.ndarray, part: slice, n_axes: int) -> np.ndarray:
    """Some rows of an array, the first of so many axes; all of one that has no such axis of its own."""
    return index[part] if index.ndim == n_axes and index.shape[0] > 1 else index


def _evaluate(expression: Expression, indices: Mapping[str, np.ndarray], sizes: Mapping[str, float]) -> np.ndarray:
    match expression:
        case Number(value):
            return np.array(value, dtype=np.float64)
        case Name(name) if name in indices:
            return indices[name].astype(np.float64)
        case Name(name) if name in CONSTANTS or name in sizes:
            return np.array(CONSTANTS.get(name, sizes.get(name)), dtype=np.float64)
        case Name(name, span):
            known = (*indices, *sizes)
            raise fail(
                f"unknown name `{name}`{did_you_mean(name, known) or f'; expected one of {listing(known)}'}", span
            )
        case Operation(op, left, right):
            return _OPERATIONS[op](_evaluate(left, indices, sizes), _evaluate(right, indices, sizes))
        case Call("size", (Name(mode, span),)):
            if mode not in sizes:
                raise fail(f"`{mode}` has no size of its own here{did_you_mean(mode, sizes)}", span)
            return np.array(sizes[mode], dtype=np.float64)
        case Call(name, args):
            return _FUNCTIONS[name](*(_evaluate(arg, indices, sizes) for arg in args))
        case Choice():
            raise fail(f"`{expression}` differs from site to site", expression.span)
