"""Mask rules: which indices of a mode of a factor exist."""

from __future__ import annotations

import numpy as np

from tensorpeft.language.errors import fail
from tensorpeft.language.spec import MaskRule
from tensorpeft.network import random
from tensorpeft.network.shapes import Key, is_named


def kept_indices(rule: MaskRule, key: Key, size: int, seed: int) -> np.ndarray:
    """The indices, ascending, that a rule keeps of a mode for one key of its factor: never none.

    ``bernoulli(p)`` keeps each index with probability p, ``keep(k)`` the k indices (or, below 1, that fraction of them) with the
    smallest draws. Either takes another value for one matrix: ``bernoulli(0.1, query=0.2)``.
    Each draw depends on the seed, the factor, the mode, the key and the index alone.
    """
    draws = random.uniform(random.stream(seed, f"{rule.factor}[{rule.mode}]", key), [np.arange(size)])
    value = _value(rule, key)
    if rule.rule.name == "bernoulli":
        kept = np.flatnonzero(draws < value)
        return kept if len(kept) else np.array([int(draws.argmin())])
    count = round(value * size) if value < 1 else int(value)
    if count > size:
        raise fail(f"`{rule.rule}` keeps {count} indices of `{rule.mode}`, which has only {size}", rule.span)
    return np.sort(np.argsort(draws, kind="stable")[: max(1, count)])


def _value(rule: MaskRule, key: Key) -> float:
    for name, value in rule.rule.options:
        if any(isinstance(label, str) and is_named(label, name) for label in key):
            return float(value.evaluate({}))
    return float(rule.rule.args[0].evaluate({}))
