"""The counter-based generator behind every random number of an adapter.

A number depends on (seed, factor name, index) and on nothing else: not on the device, the dtype, the version of torch or
numpy, the other factors, or which other sites are adapted. An index is a tuple of coordinates, strings (a matrix) or
integers (a layer, a row, a column). The state absorbs one coordinate after the other::

    state = mix(mix(seed) ^ word(name));  state = mix(state + GOLDEN * (word(coordinate) + 1))  for each coordinate

``mix`` is the finaliser of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014);
``word`` is an integer itself, or the first eight bytes of a string's SHA-256, little-endian. All of it is integer arithmetic
modulo 2^64, so it is exact everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np

from tensorpeft.numerics.elementary import log

GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def word(coordinate: str | int) -> int:
    """A coordinate as a 64-bit integer."""
    if isinstance(coordinate, str):
        return int.from_bytes(sha256(coordinate.encode()).digest()[:8], "little")
    return coordinate & _MASK


def stream(seed: int, name: str, coordinates: Sequence[str | int] = ()) -> int:
    """The state after absorbing a seed, a name and leading coordinates."""
    state = _mix_int(_mix_int(seed & _MASK) ^ word(name))
    for coordinate in coordinates:
        state = _mix_int((state + GOLDEN * (word(coordinate) + 1)) & _MASK)
    return state


def bits(state: int, indices: Sequence[np.ndarray]) -> np.ndarray:  # shape: that of the indices together
    """64 random bits for every index: one integer array per axis; these broadcast, so ``np.ix_`` makes a grid of them."""
    states = np.array(state, dtype=np.uint64)
    for axis in indices:
        step = np.uint64(GOLDEN) * (axis.astype(np.uint64) + np.uint64(1))
        states = _mix(states + step)
    return states


def uniform(state: int, indices: Sequence[np.ndarray]) -> np.ndarray:  # shape: that of the indices together
    """Float64 numbers in [0, 1), multiples of 2^-53."""
    return (bits(state, indices) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def standard_normal(state: int, indices: Sequence[np.ndarray]) -> np.ndarray:  # shape: that of the indices together
    """Float64 normal numbers: the quantile function at the midpoints of the 2^52 uniform cells.

    Algorithm AS 241, PPND16 (Wichura, Applied Statistics 37, 1988), about 16 digits.
    """
    p = ((bits(state, indices) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    q = p - 0.5
    central = 0.180625 - q * q
    middle = q * _ratio(central, _A, _B)
    r = np.sqrt(-log(np.minimum(p, 1.0 - p)))
    near = _ratio(r - 1.6, _C, _D)
    far = _ratio(r - 5.0, _E, _F)
    tail = np.copysign(np.where(r <= 5.0, near, far), q)
    return np.where(np.abs(q) <= 0.425, middle, tail)


def _mix_int(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _ratio(x: np.ndarray, above: tuple[float, ...], below: tuple[float, ...]) -> np.ndarray:
    top, bottom = np.full_like(x, above[-1]), np.full_like(x, below[-1])
    for a, b in zip(above[-2::-1], below[-2::-1], strict=True):
        top, bottom = top * x + a, bottom * x + b
    return top / bottom


# The coefficients of PPND16, constant term first.
_A = (3.3871328727963666080e0, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
      4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3)  # fmt: skip
_B = (1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
      2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3)  # fmt: skip
_C = (1.42343711074968357734e0, 4.63033784615654529590e0, 5.76949722146069140550e0, 3.64784832476320460504e0,
      1.27045825245236838258e0, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4)  # fmt: skip
_D = (1.0, 2.05319162663775882187e0, 1.67638483018380384940e0, 6.89767334985100004550e-1,
      1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9)  # fmt: skip
_E = (6.65790464350110377720e0, 5.46378491116411436990e0, 1.78482653991729133580e0, 2.96560571828504891230e-1,
      2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7)  # fmt: skip
_F = (1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
      7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15)  # fmt: skip
