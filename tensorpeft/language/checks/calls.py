"""Checks of arithmetic and calls: every name and function is known, every call is given what it takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized

from tensorpeft.language.errors import Problem, SpecError, did_you_mean, listing, unknown
from tensorpeft.language.keywords import Signature
from tensorpeft.language.syntax import ARITY, CONSTANTS, Call, Choice, Expression, Name, Operation


def alternatives(expression: Expression) -> tuple[Expression, ...]:
    """The expression itself, or that of each entry where it differs from site to site."""
    return tuple(value for _, value in expression.entries) if isinstance(expression, Choice) else (expression,)


def arithmetic(expression: Expression, names: Iterable[str], modes: Iterable[str] = ()) -> Iterator[Problem]:
    """Every name and every function in an expression is known; where it is over modes, ``size(mode)`` is too."""
    names, modes = tuple(names), tuple(modes)
    match expression:
        case Name(name, span) if name not in names and name not in CONSTANTS:
            yield Problem(unknown("name", name, names, 20), span)
        case Operation(_, left, right):
            yield from arithmetic(left, names, modes)
            yield from arithmetic(right, names, modes)
        case Call("size", args, _, span) if modes:
            if len(args) != 1 or not isinstance(args[0], Name) or args[0].name not in modes:
                yield Problem(f"`{expression}` is the size of no mode; expected one of {listing(modes)}", span)
        case Call(name, args, _, span) if name not in ARITY:
            yield Problem(unknown("function", name, ARITY), span)
        case Call(name, args, _, span):
            fewest, most = ARITY[name]
            if not fewest <= len(args) <= most:
                expected = f"{fewest}" if fewest == most else f"{fewest} to {most}"
                yield Problem(f"`{name}` is given {_count(args)}; expected {expected}", span)
            for arg in args:
                yield from arithmetic(arg, names, modes)


def constant(expression: Expression) -> tuple[float, Problem | None]:
    """The value of an expression without names, or what is wrong with it."""
    if expression.names:
        return 0.0, Problem(f"`{expression}` is not a number; names mean nothing here", expression.span)
    try:
        return expression.evaluate({}), None
    except SpecError as error:
        return 0.0, error.problems[0]


def size(expression: Expression, names: Iterable[str], subject: str, largest: int) -> Iterator[Problem]:
    """A size is sound arithmetic, and a whole number in range where it names nothing."""
    problems = list(arithmetic(expression, names))
    yield from problems
    if problems or expression.names:
        return
    value, error = constant(expression)
    if error:
        yield error
    elif value != int(value) or not 1 <= value <= largest:
        shown = int(value) if value == int(value) else value
        yield Problem(f"{subject} is {shown}; expected a whole number from 1 to {largest}", expression.span)


def signature(call: Call, takes: Signature) -> Iterator[Problem]:
    """The values and options that a call is given are those it takes."""
    if len(call.args) != len(takes.values):
        expected = f"one, the {takes.values[0]}" if takes.values else "none without a name"
        yield Problem(f"`{call}` is given {_count(call.args)}; expected {expected}", call.span)
    for key, value in call.options:
        if key not in takes.options:
            hint = did_you_mean(key, takes.options) or f"; it has {listing(takes.options) or 'none'}"
            yield Problem(f"`{call.name}` has no option `{key}`{hint}", value.span)


def _count(values: Sized) -> str:
    return f"{len(values) or 'no'} value{'' if len(values) == 1 else 's'}"
