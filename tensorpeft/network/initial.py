"""The numbers a factor starts from, key by key, in float64. A masked factor has the numbers of the unmasked one."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import numpy as np

from tensorpeft.language.errors import fail
from tensorpeft.language.spec import Spec
from tensorpeft.language.syntax import Call, Name, Spectral
from tensorpeft.network import random
from tensorpeft.network.network import Block
from tensorpeft.network.shapes import Key

CONSTANTS = ("zeros", "ones", "constant")


def origin(spec: Spec, factor: str) -> str:
    """The factor whose numbers a factor starts from: of one that is ``start(F)``, those of F."""
    seen = {factor}
    while isinstance(init := spec.factor(factor).init, Call) and init.name == "start":
        (source,) = init.args
        assert isinstance(source, Name)
        if source.name in seen:
            raise fail(f"`{init}` leads back to `{source.name}` itself", init.span)
        factor = source.name
        seen.add(factor)
    return factor


def initial_values(block: Block, seed: int) -> Iterator[tuple[Key, np.ndarray | float]]:
    """For each key of a block: its values, as an array of the key's shape or as one number for all of it."""
    init = block.rule.init
    if isinstance(init, Spectral):
        raise fail(f"`{init}` is not supported yet", init.span)
    if init.name in CONSTANTS:
        value = 0.0 if init.name == "zeros" else 1.0 if init.name == "ones" else float(init.args[0].evaluate({}))
        yield from ((key, value) for key in block.keys)
        return
    draw = random.standard_normal if init.name == "normal" else random.uniform
    scale = _scale(init, block)
    for key in block.keys:
        drawn = draw(random.stream(seed, block.factor, key), _indices(block, key))
        yield key, drawn * scale if init.name == "normal" else (2.0 * drawn - 1.0) * scale


def _indices(block: Block, key: Key) -> list[np.ndarray]:
    kept = (None,) * len(block.free_axes) if block.kept is None else block.kept[key]
    axes = zip(block.free_axes, kept, strict=True)
    return [np.arange(axis.size) if some is None else some for axis, some in axes]


def _scale(init: Call, block: Block) -> float:
    """The standard deviation of a normal initialiser, the bound of a uniform one.

    Kaiming: sqrt(6 / ((1 + a^2) fan)) (He et al., 2015); Xavier: sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio, 2010).
    The fan is the size of the last written mode, as in torch for an (out, in) matrix, unless ``fan=`` names another.
    """
    options = dict(init.options)
    sizes = {axis.mode: axis.size for axis in block.free_axes}
    order = list(sizes)
    match init.name:
        case "kaiming_uniform":
            a = float(options["a"].evaluate({})) if "a" in options else 0.0
            chosen = options.get("fan")
            fan = sizes[chosen.name] if isinstance(chosen, Name) else sizes[order[-1]] if order else 1
            return sqrt(6.0 / ((1.0 + a * a) * fan))
        case "xavier_uniform":
            return sqrt(6.0 / sum(sizes[mode] for mode in order[-2:])) if order else 1.0
        case _:  # uniform(bound), normal(std)
            return float(init.args[0].evaluate({})) if init.args else 1.0
