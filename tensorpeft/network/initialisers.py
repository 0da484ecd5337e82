"""The numbers a factor starts from, key by key, in float64: those that depend on the spec and the model's sizes alone."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import numpy as np

from tensorpeft.language.errors import InternalError, fail, listing
from tensorpeft.language.spec import Spec
from tensorpeft.language.syntax import Call, Name
from tensorpeft.model.shape import Key
from tensorpeft.network.network import Block
from tensorpeft.numerics import generator as random
from tensorpeft.numerics.arrays import evaluate

CONSTANTS = ("zeros", "ones", "constant")


def origins(spec: Spec, factor: str) -> tuple[str, ...]:
    """A factor, and where it is ``start(F)`` the factor F, and so on: the last one's numbers are those of the first.

    Raises:
        SpecError: they lead in a circle.
    """
    found = [factor]
    while isinstance(init := spec.factor(found[-1]).init, Call) and init.name == "start":
        (source,) = init.args
        assert isinstance(source, Name)
        if source.name in found:
            raise fail(f"`{init}` leads back to `{source.name}` itself", init.span)
        found.append(source.name)
    return tuple(found)


def initial_values(block: Block, seed: int) -> Iterator[tuple[Key, np.ndarray | float]]:
    """For each key of a block: its values, as an array of the key's shape or as one number for all of it.

    A masked factor has the numbers of the whole one where masks leave it. Not for a block that is data-dependent.

    Raises:
        SpecError: the initialiser's arithmetic has no value, or none that draws anything.
    """
    init = block.init
    assert isinstance(init, Call)
    if init.name in CONSTANTS:
        fixed = {"zeros": 0.0, "ones": 1.0}.get(init.name)
        for key in block.keys:
            yield key, float(init.args[0].evaluate(block.names[key])) if fixed is None else fixed
        return
    for key in block.keys:
        places = _places(block, key)
        state = random.stream(seed, ".".join(filter(None, (block.origin, block.stack))), key)
        match init.name:
            case "formula":
                yield key, _formula(block, key, places)
            case "identity":
                rows, columns = _matrix(block, places)
                values = np.equal(rows, columns).astype(np.float64)
                yield key, np.broadcast_to(values, np.broadcast_shapes(*(place.shape for place in places))).copy()
            case "orthogonal":
                _matrix(block, places)
                shape = tuple(axis.size for axis in block.free_axes)
                yield key, orthonormal(random.standard_normal(state, np.ix_(*map(np.arange, shape))))[tuple(places)]
            case "normal":
                yield key, random.standard_normal(state, places) * _scale(init, block, key)
            case "uniform" | "kaiming_uniform" | "xavier_uniform":
                yield key, (2.0 * random.uniform(state, places) - 1.0) * _scale(init, block, key)
            case _:
                raise InternalError(f"`{init}` of `{block.name}` is an initialiser that draws nothing")


def _places(block: Block, key: Key) -> list[np.ndarray]:
    """The indices of a key's numbers on the free axes; the arrays broadcast to the key's shape."""
    sizes = [axis.size for axis in block.free_axes]
    if block.entries is not None:
        return list(np.unravel_index(block.entries[key].positions, sizes))
    kept = (None,) * len(sizes) if block.kept is None else block.kept[key]
    return list(np.ix_(*(np.arange(size) if some is None else some for size, some in zip(sizes, kept, strict=True))))


def _formula(block: Block, key: Key, places: list[np.ndarray]) -> np.ndarray:  # shape: the key's
    """Arithmetic over the indices on the free axes."""
    assert isinstance(block.init, Call)
    indices = dict(zip((axis.mode for axis in block.free_axes), places, strict=True))
    return evaluate(block.init.args[0], indices, block.names[key])


def _matrix(block: Block, places: list[np.ndarray]) -> list[np.ndarray]:
    """The indices on the last two free axes."""
    if len(places) < 2:
        message = f"`{block.init}` needs two modes that are not bound to sites, and `{block.factor}` has {len(places)}"
        raise fail(message, block.init.span)
    return places[-2:]


def orthonormal(matrices: np.ndarray) -> np.ndarray:  # shape: (..., rows, columns)
    """Orthonormal columns, of a wide matrix rows, of the same spans.

    Gram and Schmidt's way, twice for accuracy, by sums in a fixed order: the same numbers on every machine.
    """
    # no LAPACK: its last bits differ between machines, and a frozen factor must be the same when it is made again
    wide = matrices.shape[-2] < matrices.shape[-1]
    columns = (matrices if wide else matrices.swapaxes(-1, -2)).copy()  # shape: (..., vectors, entries)
    for _ in range(2):
        for i in range(columns.shape[-2]):
            vector = columns[..., i, :]
            vector /= np.sqrt(_sum(vector * vector))[..., None]
            later = columns[..., i + 1 :, :]
            later -= _sum(later * vector[..., None, :])[..., None] * vector[..., None, :]
    return columns if wide else columns.swapaxes(-1, -2)


def _sum(x: np.ndarray) -> np.ndarray:  # shape: (..., n) -> (...)
    """The sum over the last axis, by halves."""
    while (n := x.shape[-1]) > 1:
        half = n // 2
        folded = x[..., :half] + x[..., half : 2 * half]
        x = folded if n % 2 == 0 else np.concatenate([folded, x[..., -1:]], axis=-1)
    return x[..., 0]


def _scale(init: Call, block: Block, key: Key) -> float:
    """The standard deviation of a normal initialiser, the bound of a uniform one.

    Kaiming: sqrt(6 / ((1 + a^2) fan)) (He et al., 2015); Xavier: sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio, 2010).
    The fan is the size of the last written mode, as in torch for an (out, in) matrix, unless ``fan=`` names another.
    """
    options = dict(init.options)
    sizes = {axis.mode: axis.size for axis in block.free_axes}
    order = list(sizes)
    if init.name == "kaiming_uniform":
        a = float(options["a"].evaluate({})) if "a" in options else 0.0
        chosen = options.get("fan")
        if isinstance(chosen, Name) and chosen.name not in sizes:
            message = f"`fan` is `{chosen}`, which is bound to sites; expected one of {listing(order)}"
            raise fail(message, chosen.span)
        fan = sizes[chosen.name] if isinstance(chosen, Name) else sizes[order[-1]] if order else 1
        return sqrt(6.0 / ((1.0 + a * a) * fan))
    if init.name == "xavier_uniform":
        return sqrt(6.0 / sum(sizes[mode] for mode in order[-2:])) if order else 1.0
    value = float(init.args[0].evaluate(block.names[key]))
    if value <= 0:
        raise fail(f"`{init}` is {value:g} for `{block.name}` and draws nothing; expected more than 0", init.span)
    return value
