"""Checks of masks: on which factors and modes they are, and what their rules are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from tensorpeft.language import names
from tensorpeft.language.checks.calls import arithmetic, constant, signature
from tensorpeft.language.errors import Problem, did_you_mean, listing, unknown
from tensorpeft.language.keywords import MASK_RULES, SCORED, Signature
from tensorpeft.language.nodes import MappingNode
from tensorpeft.language.source import Span
from tensorpeft.language.spec import BASE_WEIGHT, MaskRule, Spec
from tensorpeft.language.syntax import Call


def masks(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """A mask is on modes that its factor carries, and its rule is given what it takes."""
    modes = names.first_modes(spec)
    seen: dict[tuple[str, frozenset[str]], Span | None] = {}
    for mask in spec.masks:
        first = seen.setdefault((mask.factor, frozenset(mask.modes)), mask.span)
        if message := _misplaced(spec, mask, modes):
            yield Problem(message, mask.span)
        elif first != mask.span:
            yield Problem(f"`{_where(mask)}` is masked twice", mask.span)
        if mask.rule.name == "where":
            yield from _where_rule(mask)
        else:
            yield from _count_rule(mask.rule)
        if mask.rule.name in SCORED and "scores" not in table:
            message = f"`{mask.rule}` goes by scores, which are missing"
            yield Problem(f"{message}; expected a key `scores` with their file", mask.rule.span)


def scores(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """A file of scores is read by a rule."""
    if spec.scores is not None and not any(mask.rule.name in SCORED for mask in spec.masks):
        message = f"`scores` is given, but no mask goes by them; expected one of the rules {listing(SCORED)}"
        yield Problem(message, table.where("scores"))


def _where(mask: MaskRule) -> str:
    return f"{mask.factor}[{', '.join(mask.modes)}]"


def _misplaced(spec: Spec, mask: MaskRule, modes: Mapping[str, tuple[str, ...]]) -> str | None:
    """Why nothing is masked by this name; ``modes`` are those of every factor."""
    if message := names.no_factor(mask.factor, [factor for factor in modes if factor != BASE_WEIGHT]):
        return message
    mine = modes[mask.factor]
    for mode in mask.modes:
        if mode not in mine:
            hint = did_you_mean(mode, mine) or f"; it carries {listing(mine)}"
            return f"`{mask.factor}` carries no mode `{mode}`{hint}"
        if names.is_bound(spec, mode):
            return f"`{_where(mask)}` would mask whole matrices, layers or tasks; choose these under `target`"
        if mask.modes.count(mode) > 1:
            return f"`{_where(mask)}` names `{mode}` twice; expected each mode once"
    init = spec.factor(mask.factor).init
    if isinstance(init, Call) and init.name == "start":
        return f"`{mask.factor}` is `{init}`, and exists where that does; expected the mask there"
    return None


def _where_rule(mask: MaskRule) -> Iterator[Problem]:
    problems = list(signature(mask.rule, MASK_RULES["where"]))
    yield from problems
    if not problems:
        (value,) = mask.rule.args
        yield from arithmetic(value, mask.modes, mask.modes)
        if not value.names & {*mask.modes}:
            message = f"`{mask.rule}` does not depend on the index; expected it to speak of {listing(mask.modes)}"
            yield Problem(message, mask.rule.span)


def _count_rule(rule: Call) -> Iterator[Problem]:
    takes = MASK_RULES.get(rule.name)
    if takes is None:
        yield Problem(unknown("mask rule", rule.name, MASK_RULES), rule.span)
        return
    yield from signature(rule, Signature(takes.values, tuple(key for key, _ in rule.options)))
    for value in (*rule.args, *(value for _, value in rule.options)):
        number, error = constant(value)
        if error:
            yield error
        elif rule.name == "bernoulli" and not 0 < number <= 1:
            yield Problem(f"`{value}` is no probability; expected a number above 0 and at most 1", value.span)
        elif rule.name != "bernoulli" and not (0 < number < 1 or (number >= 1 and number == int(number))):
            message = f"cannot keep `{value}`; expected a fraction between 0 and 1, or a whole number of indices"
            yield Problem(message, value.span)
