"""A config's keys -> named sizes, by the arithmetic of a family's table."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from tensorpeft.language.errors import ModelError, did_you_mean
from tensorpeft.language.grammar import parse_arithmetic
from tensorpeft.language.nodes import Scalar
from tensorpeft.language.source import Source, Span
from tensorpeft.language.syntax import Expression

MAX_SIZE = 10**9  # beyond every model there is: a slip in a config must not fill the memory


class ConfigSizes:
    """Named sizes, each computed when it is asked for.

    A rule is arithmetic over other sizes and the config's keys (its own name stands for the key of that name); a list
    of rules, of which the first counts whose names are all known; or ``{key: text}``, which is 1 where the config's
    text or list under ``key`` holds ``text``, else 0.
    """

    def __init__(self, rules: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        self._rules, self._config, self._known = rules, config, dict[str, int]()

    def __getitem__(self, name: str) -> int:
        """Raises ModelError where the config lacks a key, or has one that is no whole number."""
        if name not in self._known:
            self._known[name] = self._compute(name, self._rules[name])
        return self._known[name]

    @property
    def config_keys(self) -> set[str]:
        """The keys of a config that the rules read."""
        keys = {key for rule in self._rules.values() if isinstance(rule, dict) for key in rule}
        named = (e.names for rule in self._rules.values() for e in _alternatives(rule))
        return keys.union(*named)

    def value(self, rule: str | int) -> int:
        """Arithmetic over the sizes."""
        expression = _expression(str(rule))
        return int(expression.evaluate({name: self[name] for name in expression.names}))

    def _compute(self, name: str, rule: Any) -> int:
        if isinstance(rule, dict):
            ((key, text),) = rule.items()
            return int(text in str(self._config.get(key)))
        missing: list[str] = []
        for expression in _alternatives(rule):
            keys = sorted(key for key in expression.names if key == name or key not in self._rules)
            unknown = [key for key in keys if self._config.get(key) is None]
            if not unknown:
                return self._whole(name, expression, {key: self._key(key) for key in keys})
            missing += unknown
        unread = self._config.keys() - self.config_keys
        raise ModelError(f"the config has no `{missing[0]}`{did_you_mean(missing[0], unread)}")

    def _whole(self, name: str, expression: Expression, keys: Mapping[str, int]) -> int:
        values = {**{other: self[other] for other in sorted(expression.names - keys.keys())}, **keys}
        value = expression.evaluate(values)
        if int(value) != value:
            given = " and ".join(f"{key} {number}" for key, number in values.items())
            raise ModelError(f"`{name}` is {expression}, which is no whole number for {given}")
        return int(value)

    def _key(self, key: str) -> int:
        """A config's value as a number; a mapping (``id2label``) counts its entries."""
        value = self._config[key]
        number = len(value) if isinstance(value, dict) else value
        if isinstance(number, float) and number.is_integer():
            number = int(number)
        if not isinstance(number, int) or abs(number) > MAX_SIZE:
            text = repr(value)
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            raise ModelError(f"`{key}` is {shown}, expected a whole number of at most {MAX_SIZE}")
        return int(number)


def _alternatives(rule: Any) -> list[Expression]:
    rules = rule if isinstance(rule, list) else [] if isinstance(rule, dict) else [rule]
    return [_expression(str(alternative)) for alternative in rules]


@cache
def _expression(text: str) -> Expression:
    span = Span(Source("family table", text), 0, len(text))
    return parse_arithmetic(Scalar(text, text, span, span))
