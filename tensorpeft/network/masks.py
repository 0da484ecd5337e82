"""Mask rules: which indices of a mode of a factor exist, or which entries over several of its modes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import numpy as np

from tensorpeft.language.errors import InternalError, fail
from tensorpeft.language.spec import MaskRule
from tensorpeft.language.syntax import Expression
from tensorpeft.model.shape import Key, Site
from tensorpeft.model.target import fits
from tensorpeft.numerics import generator as random
from tensorpeft.numerics.arrays import evaluate
from tensorpeft.numerics.elementary import log


@dataclass(frozen=True)
class Mask:
    """A rule as it counts at one site: over which free axes of its factor, and with which value."""

    rule: MaskRule
    axes: tuple[int, ...]
    value: float

    @property
    def said(self) -> tuple[str, float]:
        """Equal for two masks of the same axes that mean the same."""
        return str(self.rule.rule.args[0]) if self.rule.rule.name == "where" else self.rule.rule.name, self.value

    @property
    def counts(self) -> bool:
        """Whether its value alone says how many it keeps."""
        return self.rule.rule.name in ("keep", "top", "sample")

    def count(self, size: int) -> int:
        """How many of so many it keeps; at least one.

        Raises:
            SpecError: it asks for more than there are.
        """
        count = round(self.value * size) if self.value < 1 else int(self.value)
        if count > size:
            modes = self.rule.modes
            entries = f"entries of `{self.rule.factor}[{', '.join(modes)}]`"
            told = f"indices of `{modes[0]}`" if len(modes) == 1 else entries
            raise fail(f"`{self.rule.rule}` keeps {count} {told}, which has only {size}", self.rule.span)
        return max(1, count)


def masks_at(rules: Sequence[tuple[MaskRule, tuple[int, ...]]], site: Site) -> tuple[Mask, ...]:
    """The masks that count at a site: of the rules for the same axes, the last that fits."""
    found = {axes: Mask(rule, axes, _value(rule, site)) for rule, axes in rules if fits(rule.at, site)}
    return tuple(found.values())


def _value(rule: MaskRule, site: Site) -> float:
    if rule.rule.name == "where":
        return 0.0
    named = next((value for name, value in rule.rule.options if site.is_named(name)), rule.rule.args[0])
    return float(named.evaluate({}))


def kept_indices(
    mask: Mask,
    key: Key,
    shape: tuple[int, ...],  # of the grid of the masked modes
    seed: int,
    *,
    scores: np.ndarray | None = None,  # shape: that of the grid
    sizes: Mapping[str, float] | None = None,
) -> np.ndarray:  # shape: (kept,)
    """The positions in the grid of its modes, ascending, that a mask keeps for one key of its factor: never none.

    ``bernoulli(p)`` keeps each with probability p, ``keep(k)`` k of them (or, below 1, that fraction) at random, ``top(k)``
    those of the largest scores, ``sample(k)`` k drawn with probabilities proportional to the scores, ``where(e)`` those at
    which arithmetic over their indices is not 0. Every random number depends on the seed, the factor, the modes, the key
    and the position alone.

    Raises:
        SpecError: there are not so many, or nothing is left.
    """
    rule, size = mask.rule, prod(shape)
    state = random.stream(seed, f"{rule.factor}[{', '.join(rule.modes)}]", key)
    match rule.rule.name:
        case "bernoulli":
            return _bernoulli(state, size, mask.value, alone=len(shape) == 1)
        case "keep":
            return _keep(state, size, mask.count(size), alone=len(shape) == 1)
        case "top":
            assert scores is not None
            return _top(scores.ravel(), mask.count(size))
        case "sample":
            assert scores is not None
            return _sample(mask, state, scores.ravel(), mask.count(size))
        case "where":
            return _where(mask, shape, sizes or {})
        case _:
            raise InternalError(f"`{rule.rule}` of `{rule.factor}` is a mask rule that keeps nothing")


def _bernoulli(state: int, size: int, p: float, *, alone: bool) -> np.ndarray:  # shape: (kept,)
    """Of one mode each index has a draw of its own; of the many entries of several modes, each gap between two kept ones."""
    if alone:
        draws = _draws(state, size)
        kept = np.flatnonzero(draws < p)
        return kept if len(kept) else np.array([int(draws.argmin())])
    if p == 1:
        return np.arange(size)
    found, at, drawn, rate = [np.empty(0, np.int64)], -1, 0, log(np.array(1.0 - p))
    while at < size:
        n = int((size - at) * p * 1.1) + 16
        gaps = np.floor(log(1.0 - random.uniform(state, [np.arange(drawn, drawn + n)])) / rate) + 1.0
        positions = at + np.cumsum(np.minimum(gaps, size + 1.0)).astype(np.int64)
        found.append(positions[positions < size])
        at, drawn = int(positions[-1]), drawn + n
    kept = np.concatenate(found)
    return kept if len(kept) else random.bits(state, [np.arange(1)]).astype(np.int64) % size


def _keep(state: int, size: int, count: int, *, alone: bool) -> np.ndarray:  # shape: (count,)
    """Of one mode the indices of the smallest draws; of the many entries of several, the first distinct positions drawn."""
    if alone:
        return np.sort(np.argsort(_draws(state, size), kind="stable")[:count])
    if count == size:
        return np.arange(size)
    if 2 * count > size:  # drawing until nearly all are met would take ever longer: what is left out is drawn
        return np.setdiff1d(np.arange(size), _keep(state, size, size - count, alone=False))
    drawn = 2 * count + 16
    while True:
        positions = (random.bits(state, [np.arange(drawn)]) % np.uint64(size)).astype(np.int64)
        distinct, first = np.unique(positions, return_index=True)
        if len(distinct) >= count:
            return np.sort(positions[np.sort(first)[:count]])
        drawn *= 2


@lru_cache(maxsize=4096)
def _draws(state: int, size: int) -> np.ndarray:  # shape: (size,)
    return random.uniform(state, [np.arange(size)])


def _top(scores: np.ndarray, count: int) -> np.ndarray:  # shape: (size,) -> (count,)
    """The positions of the largest scores; of equal ones the first."""
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    above, equal = np.flatnonzero(scores > least), np.flatnonzero(scores == least)
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))


def _sample(mask: Mask, state: int, scores: np.ndarray, count: int) -> np.ndarray:  # (size,) -> (count,)
    """Draws without replacement: the positions of the smallest exponential numbers of these rates.

    Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006.
    """
    possible = np.flatnonzero(scores > 0)
    if scores.min() < 0 or len(possible) < count:
        found = "some are negative" if scores.min() < 0 else f"only {len(possible)} are above 0"
        raise fail(f"`{mask.rule.rule}` draws {count} by their scores, and {found}", mask.rule.span)
    times = -log(1.0 - random.uniform(state, [possible])) / scores[possible]
    return np.sort(possible[np.argpartition(times, count - 1)[:count]])


def _where(mask: Mask, shape: tuple[int, ...], sizes: Mapping[str, float]) -> np.ndarray:
    rule = mask.rule
    kept = _nonzero(rule.rule.args[0], rule.modes, shape, tuple(sorted(sizes.items())))
    if not len(kept):
        raise fail(f"`{rule.rule}` keeps nothing of `{rule.factor}[{', '.join(rule.modes)}]`", rule.span)
    return kept


@lru_cache(maxsize=16)  # it is the same for every key
def _nonzero(
    expression: Expression, modes: tuple[str, ...], shape: tuple[int, ...], sizes: tuple[tuple[str, float], ...]
) -> np.ndarray:  # shape: (kept,)
    indices = dict(zip(modes, np.ix_(*map(np.arange, shape)), strict=True))
    return np.flatnonzero(evaluate(expression, indices, {**dict(sizes), **dict(zip(modes, shape, strict=True))}))
