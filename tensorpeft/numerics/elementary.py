"""Elementary functions of float64 arrays that are the same numbers on every machine.

A library's functions may differ in their last bit from one machine to another, and then a frozen factor would not be what
it was when its seed was saved. These use IEEE additions, products and quotients alone.
"""

from __future__ import annotations

import numpy as np

_LN2 = 0.6931471805599453
_LN2_HEAD, _LN2_TAIL = 0.693147180369123816490, 1.90821492927058770002e-10  # the head has 33 bits: products are exact
_QUARTER = (1.57079632673412561417, 6.07710050630396597660e-11, 2.02226624879595063154e-21)  # of a turn, in three parts


def log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm: 2 atanh of (m - 1) / (m + 1) for the mantissa m, and a multiple of log 2 for the exponent."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    exponent = exponent - low
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square, series = s * s, np.zeros_like(s)
    for odd in range(27, 0, -2):
        series = series * square + 1.0 / odd
    return exponent * _LN2 + 2.0 * s * series


def exp(x: np.ndarray) -> np.ndarray:
    """The exponential: a power of 2, times a Taylor polynomial within half of log 2 of zero."""
    x = np.clip(np.asarray(x, dtype=np.float64), -745.0, 710.0)  # beyond is zero, or infinity
    power = np.rint(x / _LN2)
    rest = x - power * _LN2_HEAD - power * _LN2_TAIL
    series = np.ones_like(rest)
    for n in range(16, 0, -1):
        series = series * (rest / n) + 1.0
    with np.errstate(over="ignore", under="ignore"):
        return np.ldexp(series, power.astype(np.int64))


def sin(x: np.ndarray) -> np.ndarray:
    """The sine, of arguments up to about a million."""
    return _quarters(np.asarray(x, dtype=np.float64), 0)


def cos(x: np.ndarray) -> np.ndarray:
    """The cosine, of arguments up to about a million."""
    return _quarters(np.asarray(x, dtype=np.float64), 1)


def _quarters(x: np.ndarray, ahead: int) -> np.ndarray:
    """The sine of x and ``ahead`` quarter turns: Taylor polynomials within an eighth of a turn of zero."""
    turns = np.rint(x / (_QUARTER[0] + _QUARTER[1]))
    rest = x - turns * _QUARTER[0] - turns * _QUARTER[1] - turns * _QUARTER[2]
    square = rest * rest
    sine, cosine = np.ones_like(rest), np.ones_like(rest)
    for n in range(18, 0, -2):
        sine = 1.0 - sine * square / (n * (n + 1))
        cosine = 1.0 - cosine * square / (n * (n - 1))
    quarter = np.mod(turns + ahead, 4.0)
    value = np.where(np.mod(quarter, 2.0) == 0.0, rest * sine, cosine)
    return np.where(quarter < 2.0, value, -value)


def power(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``x ** y``: by products for a small whole y, by the root for 0.5, else by the logarithm; nan where it is not real."""
    x, y = np.broadcast_arrays(np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64))
    if y.size and y.min() == y.max() and (exponent := float(y.flat[0])) in (0.5, *range(-64, 65)):
        if exponent == 0.5:
            return np.sqrt(x)
        product = np.ones_like(x)
        for _ in range(int(abs(exponent))):
            product = product * x
        return product if exponent >= 0 else 1.0 / product
    positive = np.where(x > 0, x, 1.0)
    value = np.where(x > 0, exp(y * log(positive)), np.where(y > 0, 0.0, np.nan))
    return np.where((x < 0) | ((x == 0) & (y <= 0)), np.nan, value)
