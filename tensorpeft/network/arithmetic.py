"""Arithmetic of a spec over whole arrays: the numbers of a ``formula``, the entries of a ``where``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from tensorpeft.language.errors import did_you_mean, fail, listing
from tensorpeft.language.syntax import CONSTANTS, Call, Choice, Expression, Name, Number, Operation
from tensorpeft.network import elementary

_Names = TypeVar("_Names")
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
    "min": lambda *values: np.minimum.reduce(np.broadcast_arrays(*values)),
    "max": lambda *values: np.maximum.reduce(np.broadcast_arrays(*values)),
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
    with np.errstate(all="ignore"):
        values = _evaluate(expression, indices, sizes)
    if not np.isfinite(values).all():
        raise fail(f"`{expression}` has no finite value at some index", expression.span)
    return np.broadcast_to(values, np.broadcast_shapes(values.shape, *(index.shape for index in indices.values())))


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
