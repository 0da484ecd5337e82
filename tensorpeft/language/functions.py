"""The functions of arithmetic, as data: what each computes, and how many arguments it takes."""

from __future__ import annotations

import math
from collections.abc import Callable


def _mod(a: float, b: float) -> float:
    return a % b  # of the sign of b


def _gcd(a: float, b: float) -> float:
    if a != int(a) or b != int(b):
        raise ValueError("only whole numbers have a common divisor")
    return math.gcd(int(a), int(b))


FUNCTIONS: dict[str, Callable[..., float]] = {
    "sqrt": math.sqrt,
    "min": min,
    "max": max,
    "ceil": math.ceil,
    "floor": math.floor,
    "gcd": _gcd,
    "mod": _mod,
    "exp": math.exp,
    "cos": math.cos,
    "sin": math.sin,
    "equal": lambda a, b: int(a == b),
    "less": lambda a, b: int(a < b),
}
ARITY = {  # fewest, most arguments of a function
    **dict.fromkeys(("sqrt", "ceil", "floor", "exp", "cos", "sin"), (1, 1)),
    **dict.fromkeys(("gcd", "mod", "equal", "less"), (2, 2)),
    **dict.fromkeys(("min", "max"), (2, 64)),
}
