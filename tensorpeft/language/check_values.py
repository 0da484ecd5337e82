"""Checks of what a spec says of its factors: sizes, initialisers, masks, the scale, and how it starts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sized

from tensorpeft.language.errors import Problem, SpecError, did_you_mean, listing
from tensorpeft.language.nodes import Table
from tensorpeft.language.source import Span
from tensorpeft.language.spec import BASE_WEIGHT, SITE_MODES, Spec
from tensorpeft.language.start import dead_factors, nonzero_products, zero_factors
from tensorpeft.language.syntax import Call, Choice, Expression, Name, Operation, Product, Spectral
from tensorpeft.language.words import (
    ARITY,
    BUILT_IN_MODES,
    INITIALISERS,
    MASK_RULES,
    SIZE_NAMES,
    TASK_MODE,
    Signature,
)

MAX_RANK = 1 << 20
MAX_SIZE = 1 << 31


def rank_expressions(spec: Spec, table: Table) -> Iterator[Problem]:
    """Ranks speak of sizes and of each other, never in a circle; a constant one is a whole number in range."""
    ranks = dict(spec.ranks)
    for size in dict.fromkeys(each for rank in ranks.values() for each in alternatives(rank)):
        yield from _size(size, (*ranks, *spec.free, *SIZE_NAMES), f"rank `{size}`", MAX_RANK)
    circle = next((bond for bond in ranks if bond in _reached(bond, ranks)), None)
    if circle is not None:
        yield Problem(f"the rank of `{circle}` is `{ranks[circle]}`, which depends on itself", ranks[circle].span)


def _reached(bond: str, ranks: dict[str, Expression]) -> set[str]:
    """The bonds that a rank depends on, directly or not."""
    reached: set[str] = set()
    ahead = [bond]
    while ahead:
        for name in ranks[ahead.pop()].names & ranks.keys():
            if name not in reached:
                reached.add(name)
                ahead.append(name)
    return reached


def part_sizes(spec: Spec, table: Table) -> Iterator[Problem]:
    """The sizes of the parts of a side speak of ranks and of the model's sizes."""
    for definition in spec.modes:
        for part in definition.parts:
            if part.size is not None:
                names = (*dict(spec.ranks), *spec.free, *SIZE_NAMES)
                yield from _size(part.size, names, f"the size of `{part}`", MAX_SIZE)


def _size(size: Expression, names: Iterable[str], subject: str, largest: int) -> Iterator[Problem]:
    """A size is sound arithmetic, and a whole number in range where it names nothing."""
    problems = list(_arithmetic(size, names))
    yield from problems
    if problems or size.names:
        return
    value, error = _constant(size)
    if error:
        yield error
    elif value != int(value) or not 1 <= value <= largest:
        shown = int(value) if value == int(value) else value
        yield Problem(f"{subject} is {shown}; expected a whole number from 1 to {largest}", size.span)


def initialisers(spec: Spec, table: Table) -> Iterator[Problem]:
    """Every initialiser is known, and is given what it takes."""
    modes = {reference.factor: reference.modes for product in spec.update.products for reference in product.factors}
    for name, rule in spec.factors:
        if isinstance(rule.init, Spectral):
            continue
        signature = INITIALISERS.get(rule.init.name)
        if signature is None:
            yield _unknown("initialiser", rule.init, INITIALISERS)
            continue
        yield from _signature(rule.init, signature)
        for key, value in rule.init.options:
            if key == "fan" and not (isinstance(value, Name) and value.name in modes[name]):
                message = f"`fan` is `{value}`; expected a mode of `{name}`, one of {listing(modes[name])}"
                yield Problem(message, value.span)
            elif key == "a":
                yield from filter(None, _constant(value)[1:])
        for value in rule.init.args:
            if rule.init.name not in ("start", "formula") and not value.names:
                yield from _drawn(rule.init, value)


def _drawn(init: Call, value: Expression) -> Iterator[Problem]:
    number, error = _constant(value)
    if error:
        yield error
    elif init.name == "constant" and number == 0:
        yield Problem("`constant(0)` is `zeros`; expected that name", init.span)
    elif init.name in ("uniform", "normal") and number <= 0:
        yield Problem(f"`{init}` draws nothing; expected a {INITIALISERS[init.name].values[0]} above 0", init.span)


def stored_factors(spec: Spec, table: Table) -> Iterator[Problem]:
    """Only a frozen factor is stored by choice."""
    for name, rule in spec.factors:
        if rule.stored and not rule.frozen:
            message = f"`{name}` is trained, so it is stored in any case; expected `stored` for frozen factors only"
            yield Problem(message, rule.span)


def masks(spec: Spec, table: Table) -> Iterator[Problem]:
    """A mask is on a mode that its factor carries, and its values are probabilities or numbers of indices."""
    modes = {reference.factor: reference.modes for product in spec.update.products for reference in product.factors}
    modes.pop(BASE_WEIGHT, None)
    seen: dict[tuple[str, frozenset[str]], Span | None] = {}
    for mask in spec.masks:
        where = f"{mask.factor}[{', '.join(mask.modes)}]"
        if mask.factor not in modes:
            hint = did_you_mean(mask.factor, modes) or f"; the update has {listing(modes)}"
            yield Problem(f"unknown factor `{mask.factor}`{hint}", mask.span)
        elif missing := next((mode for mode in mask.modes if mode not in modes[mask.factor]), None):
            hint = did_you_mean(missing, modes[mask.factor]) or f"; it carries {listing(modes[mask.factor])}"
            yield Problem(f"`{mask.factor}` carries no mode `{missing}`{hint}", mask.span)
        elif {*mask.modes} & {*SITE_MODES, TASK_MODE}:
            message = f"`{where}` would mask whole matrices, layers or tasks; choose these under `target`"
            yield Problem(message, mask.span)
        elif seen.setdefault((mask.factor, frozenset(mask.modes)), mask.span) != mask.span:
            yield Problem(f"`{where}` is masked twice", mask.span)
        yield from _mask_rule(mask.rule)


def _mask_rule(rule: Call) -> Iterator[Problem]:
    signature = MASK_RULES.get(rule.name)
    if signature is None:
        yield _unknown("mask rule", rule, MASK_RULES)
        return
    if rule.name == "where":
        return
    yield from _signature(rule, Signature(signature.values, tuple(key for key, _ in rule.options)))
    for value in (*rule.args, *(value for _, value in rule.options)):
        number, error = _constant(value)
        if error:
            yield error
        elif rule.name == "bernoulli" and not 0 < number <= 1:
            yield Problem(f"`{value}` is no probability; expected a number above 0 and at most 1", value.span)
        elif rule.name in ("keep", "top", "sample") and not (0 < number < 1 or (number >= 1 and number == int(number))):
            message = f"cannot keep `{value}`; expected a fraction between 0 and 1, or a whole number of indices"
            yield Problem(message, value.span)


def scale(spec: Spec, table: Table) -> Iterator[Problem]:
    """The scale speaks of ``alpha``, ranks and sizes, and is not zero."""
    if "alpha" in spec.scale.names and spec.alpha is None:
        yield Problem(f"`scale` is `{spec.scale}`, and `alpha` is missing; expected a key `alpha`", spec.scale.span)
        return
    carried = {mode for product in spec.update.products for reference in product.factors for mode in reference.modes}
    unsized = carried - {*BUILT_IN_MODES, *dict(spec.ranks)}  # of these, it is told already that they need a rank
    for scale in alternatives(spec.scale):
        problems = list(_arithmetic(scale, ("alpha", *dict(spec.ranks), *spec.free, *unsized, *SIZE_NAMES)))
        yield from problems
        if not problems and not scale.names:
            value, error = _constant(scale)
            zero = "`scale` is 0, so the update is always zero; expected another number"
            if error or value == 0:
                yield error or Problem(zero, scale.span)


def used_alpha(spec: Spec, table: Table) -> Iterator[Problem]:
    """An ``alpha`` has an effect."""
    if spec.alpha is not None and "alpha" not in spec.scale.names:
        message = f"`alpha` has no effect, since `scale` is `{spec.scale}`"
        yield Problem(f"{message}; expected a `scale` such as `alpha / r`, or no `alpha`", table.where("alpha"))


def patterns(spec: Spec, table: Table) -> Iterator[Problem]:
    """The braces of a pattern name the layer or the matrix."""
    for entry in (*spec.target.matrices, *spec.target.exclude):
        bare = re.sub(r"\{(layer|matrix)\}", "", entry)
        if "{" in bare or "}" in bare:
            span = spec.target.span(entry)
            yield Problem(f"`{entry}` has braces around something else; expected `{{layer}}` or `{{matrix}}`", span)


def trained(spec: Spec, table: Table) -> Iterator[Problem]:
    """Something is trained."""
    if spec.factors and all(rule.frozen for _, rule in spec.factors):
        yield Problem("every factor is frozen, so nothing is trained; expected a factor that is not", spec.update.span)


def start(spec: Spec, table: Table) -> Iterator[Problem]:
    """Zero at the start with every factor able to move, or a declared start that is not zero."""
    zero, dead, moving = zero_factors(spec), dead_factors(spec), nonzero_products(spec)
    for product in spec.update.products:
        stuck = [reference.factor for reference in product.factors if reference.factor in dead]
        if len(stuck) == 1 and spec.factor(stuck[0]).frozen:
            message = f"`{stuck[0]}` is zero and frozen, so its product stays zero"
            yield Problem(f"{message}; expected it to be trained, or another `init`", product.span)
        elif stuck:
            message = f"the product has {len(stuck)} zero factors, {listing(stuck)}, so none would ever get a gradient"
            yield Problem(f"{message}; expected one", product.span)
        elif product in moving and spec.start == "zero":
            yield Problem(_not_zero(product), product.span)
    if spec.start != "zero" and spec.update.products and not moving and zero:
        yield Problem(f"`start` is `{spec.start}`, but every product starts at zero", table.where("start"))


def _not_zero(product: Product) -> str:
    names = dict.fromkeys(reference.factor for reference in product.factors)
    own = [name for name in names if name != BASE_WEIGHT]
    candidates = f"one of {listing(own)}" if len(own) > 1 else listing(own) or "a factor of its own"
    return f"this product does not start at zero; expected `init: zeros` for {candidates}, or `start: nonzero`"


def alternatives(expression: Expression) -> tuple[Expression, ...]:
    """What an expression can be: itself, or what it is for each choice of sites."""
    return tuple(value for _, value in expression.entries) if isinstance(expression, Choice) else (expression,)


def _count(values: Sized) -> str:
    return f"{len(values) or 'no'} value{'' if len(values) == 1 else 's'}"


def _unknown(noun: str, call: Call, known: Iterable[str]) -> Problem:
    hint = did_you_mean(call.name, known) or f"; expected one of {listing(known)}"
    return Problem(f"unknown {noun} `{call.name}`{hint}", call.span)


def _signature(call: Call, signature: Signature) -> Iterator[Problem]:
    """The values and options that a call is given are those it takes."""
    if len(call.args) != len(signature.values):
        takes = f"one, the {signature.values[0]}" if signature.values else "none without a name"
        yield Problem(f"`{call}` is given {_count(call.args)}; expected {takes}", call.span)
    for key, value in call.options:
        if key not in signature.options:
            hint = did_you_mean(key, signature.options)
            hint = hint or (f"; it has {listing(signature.options)}" if signature.options else "; it has none")
            yield Problem(f"`{call.name}` has no option `{key}`{hint}", value.span)


def _arithmetic(expression: Expression, names: Iterable[str]) -> Iterator[Problem]:
    """Every name and every function in an expression is known."""
    names = tuple(names)
    match expression:
        case Name(name, span) if name not in names:
            hint = did_you_mean(name, names) or f"; expected one of {listing(names, 20)}"
            yield Problem(f"unknown name `{name}`{hint}", span)
        case Operation(_, left, right):
            yield from _arithmetic(left, names)
            yield from _arithmetic(right, names)
        case Call(name, args, _, span) if name not in ARITY:
            hint = did_you_mean(name, ARITY) or f"; expected one of {listing(ARITY)}"
            yield Problem(f"unknown function `{name}`{hint}", span)
        case Call(name, args, _, span):
            fewest, most = ARITY[name]
            if not fewest <= len(args) <= most:
                expected = f"{fewest}" if fewest == most else f"{fewest} to {most}"
                yield Problem(f"`{name}` is given {_count(args)}; expected {expected}", span)
            for arg in args:
                yield from _arithmetic(arg, names)


def _constant(expression: Expression) -> tuple[float, Problem | None]:
    """The value of an expression without names, or what is wrong with it."""
    if expression.names:
        return 0.0, Problem(f"`{expression}` is not a number; names mean nothing here", expression.span)
    try:
        return expression.evaluate({}), None
    except SpecError as error:
        return 0.0, error.problems[0]
