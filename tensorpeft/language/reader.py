"""Node tree -> Spec, each key read by its own function.

What does not fit the schema, or does not parse, reads as if it were absent; its key is spoiled, and nothing that depends on
it is judged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import NamedTuple

from tensorpeft.language.checks.start import origin
from tensorpeft.language.choices import entries, expression
from tensorpeft.language.desugar import WrittenUpdate, known_factor, read_update
from tensorpeft.language.diagnostics import Findings
from tensorpeft.language.errors import fail
from tensorpeft.language.grammar import parse_call, parse_init, parse_reference
from tensorpeft.language.keywords import BUILT_IN_MODES, LINEAR, ONES
from tensorpeft.language.names import side_parts
from tensorpeft.language.nodes import MappingNode, Plain, Scalar, pruned
from tensorpeft.language.source import Source, Span
from tensorpeft.language.spec import BUDGET, INPUT, FactorRule, Heads, MaskRule, Spec, Target
from tensorpeft.language.syntax import Expression, Initialiser, Name, Number, Operation, Reference, Spectral


def read_spec(table: MappingNode, source: Source, findings: Findings) -> Spec | None:
    """The spec that a table says, or None where its update cannot be told."""
    whole = pruned(table, findings.unreadable)
    form = read_update(whole, findings)
    scale = read_scale(whole, form, findings)
    target, masks = _target(whole, findings), tuple(read_masks(whole, form, findings))
    if form is None:
        return None
    alpha, tasks = _value(whole, "alpha"), _value(whole, "tasks")
    extras = _listed(whole, "train", "train", findings)
    sizes = read_sizes(whole, table, form, findings)
    return Spec(
        name=str(_value(whole, "name") or "adapter"),
        target=target,
        update=form.update,
        factors=tuple(read_factors(whole, form, findings).items()),
        ranks=sizes.ranks,
        modes=form.definitions,
        masks=masks,
        alpha=None if alpha is None else float(alpha),
        scale=scale,
        ragged=_ragged(whole),
        heads=_heads(whole),
        tasks=None if tasks is None else int(tasks),
        budget=sizes.budget,
        budget_span=sizes.span,
        free=sizes.free,
        dropout=_dropout(whole),
        train=tuple(entry.text for entry in extras),
        train_spans=tuple(entry.span for entry in extras),
        scores=_scores(whole, findings),
        seed=int(_value(whole, "seed") or 0),
        start=str(_value(whole, "start") or "zero"),
        source=source,
        span=table.span,
    )


def _value(table: MappingNode, key: str) -> Plain:
    node = table.scalar(key)
    return node.value if node else None


def _target(table: MappingNode, findings: Findings) -> Target:
    everywhere, target = table.scalar("target"), table.table("target")
    if everywhere:
        return Target((everywhere.text,), spans=(everywhere.span,))
    matrices, exclude, layers = (_listed(target, key, "target", findings) for key in ("matrices", "exclude", "layers"))
    return Target(
        matrices=tuple(entry.text for entry in matrices),
        exclude=tuple(entry.text for entry in exclude),
        layers=tuple(int(entry.text, 0) for entry in layers) or None,
        spans=tuple(entry.span for entry in (*matrices, *exclude, *layers)),
    )


def _listed(table: MappingNode, key: str, above: str, findings: Findings) -> tuple[Scalar, ...]:
    """The scalars of a list; one that is there twice is a finding under the top-level key ``above``."""
    first: dict[str, Scalar] = {}
    for entry in table.scalars(key):
        if first.setdefault(entry.text, entry) is not entry:
            findings.add(above, f"`{entry.text}` is listed twice", entry.span)
    return table.scalars(key)


def _ragged(table: MappingNode) -> tuple[tuple[str, str], ...]:
    """The policy of each mode; that of every other one last."""
    policies = {"*": "by_size"} | {mode: policy.text for mode, policy in _each(table, "ragged", "*")}
    return (*((mode, policy) for mode, policy in policies.items() if mode != "*"), ("*", policies["*"]))


def _dropout(table: MappingNode) -> tuple[tuple[str, float], ...]:
    """Pairs of a name and its probability; a number by itself is for the input."""
    found = ((name, float(str(probability.value))) for name, probability in _each(table, "dropout", INPUT))
    return tuple((name, probability) for name, probability in found if probability)


def _scores(table: MappingNode, findings: Findings) -> str | None:
    path = table.scalar("scores")
    if path and not path.text.isprintable():
        findings.add("scores", "the path under `scores` holds an unprintable character", path.span)
    return path.text if path else None


def _heads(table: MappingNode) -> Heads:
    heads = table.table("heads")
    sides, counts = (_each(heads, key, "*") for key in ("side", "count"))
    return Heads(
        side=tuple((matrix, side.text) for matrix, side in sides),
        count=tuple((matrix, int(count.text, 0)) for matrix, count in counts),
        spans=(*(heads.place("side", matrix) for matrix, _ in sides), *(heads.place("count", m) for m, _ in counts)),
    )


def _each(table: MappingNode, key: str, single: str) -> list[tuple[str, Scalar]]:
    """The values under a key by their names; one without a name stands for ``single``."""
    value, each = table.scalar(key), table.table(key)
    return [(single, value)] if value else [(name.text, v) for name, v in each.items if isinstance(v, Scalar)]


def read_factors(table: MappingNode, form: WrittenUpdate, findings: Findings) -> dict[str, FactorRule]:
    """The rule of each factor of the update, in its order.

    A frozen factor whose numbers come from the base weight is stored: they cannot be drawn again from the seed.
    """
    for key, _ in table.table("factors").items:
        known_factor(key, form, "factors", findings)
    frozen = {key.text for key in table.scalars("frozen") if known_factor(key, form, "frozen", findings)}
    inits = dict(_inits(table, form, findings))
    rules = {}
    for name, reference in form.factors.items():
        said = table.table("factors").table(name)
        is_frozen = _is_true(said, "frozen") or name in frozen
        from_weight = isinstance(inits.get(origin(name, inits) or name), Spectral)
        stored = _is_true(said, "stored") or (is_frozen and from_weight)
        lr = said.scalar("lr")
        span = table.table("factors").where(name) if name in table.table("factors") else reference.span
        rate, norm = float(str(lr.value)) if lr else 1.0, _is_true(said, "norm")
        rules[name] = FactorRule(inits[name], is_frozen, stored, rate, norm, span)
    return rules


def _is_true(said: MappingNode, key: str) -> bool:
    node = said.scalar(key)
    return node is not None and bool(node.value)


def _inits(table: MappingNode, form: WrittenUpdate, findings: Findings) -> Iterator[tuple[str, Initialiser]]:
    for name in form.factors:
        init: Initialiser = form.inits.get(name, LINEAR)
        if _is_true(table.table("factors").table(name), "norm"):  # as it stands in a product, over the norms
            init = ONES
        elif text := table.table("factors").table(name).scalar("init"):
            with findings.under("factors"):
                init = parse_init(text)
        yield name, init


def read_masks(table: MappingNode, form: WrittenUpdate | None, findings: Findings) -> Iterator[MaskRule]:
    """The rules in order; the modes of each in the order in which its factor carries them."""
    masks = table.table("mask")
    for key, node in masks.items:
        with findings.under("mask"):
            masked = parse_reference(key)
            if not masked.modes:
                example = f"`{masked.factor}[d_out]`"
                raise fail(f"expected a factor with the modes that are masked, such as {example}", key.span)
            modes = _in_order(masked, form)
            for selector, rule in entries(node, "mask", findings):
                with findings.under("mask"):
                    yield MaskRule(masked.factor, modes, parse_call(rule), selector, key.span)


def _in_order(masked: Reference, form: WrittenUpdate | None) -> tuple[str, ...]:
    carried = form.factors[masked.factor].modes if form and masked.factor in form.factors else ()
    known = {*masked.modes} <= {*carried}
    return tuple(sorted(masked.modes, key=carried.index)) if known else masked.modes


MAX_BUDGET = 10**15
_COUNT = re.compile(r"([0-9]{1,16}(?:\.[0-9]{1,16})?)([kmg]?)", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


class BondSizes(NamedTuple):
    """The size of each bond; or the budget of trained numbers, and the bonds that it sizes."""

    ranks: tuple[tuple[str, Expression], ...]
    budget: int | None = None
    free: tuple[str, ...] = ()
    span: Span | None = None  # of the budget


def read_sizes(table: MappingNode, written: MappingNode, form: WrittenUpdate, findings: Findings) -> BondSizes:
    """The sizes under ``rank:``. ``table`` lacks what cannot be read, ``written`` has it still.

    A bond whose size cannot be told gets some size, so that it is known at least.
    """
    spoiled = "rank" in findings.spoiled
    ranks = dict(_ranks(table, form, findings))
    known = {*BUILT_IN_MODES, *(mode.name for mode in form.definitions), *side_parts(form.definitions), *ranks}
    if spoiled:
        given = written.table("rank")
        meant = None if BUDGET in given or not given.items else {*given, *form.bonds}
        unread = [name for name in _names(form) if name not in known and (meant is None or name in meant)]
        return BondSizes((*ranks.items(), *((bond, Number(1)) for bond in unread)))
    said = table.table("rank").scalar(BUDGET)
    if said is None:
        return BondSizes(tuple(ranks.items()))
    budget = 1
    with findings.under("rank"):
        budget = parse_budget(said)
    free = tuple(name for name in _names(form) if name not in known)
    if not free:
        findings.add("rank", "`budget` has nothing to size; expected a bond without a size of its own", said.span)
    return BondSizes(tuple(ranks.items()), budget, free, said.span)


def _ranks(table: MappingNode, form: WrittenUpdate, findings: Findings) -> Iterator[tuple[str, Expression]]:
    """The size of each bond; one that is given by itself sizes them all."""
    if single := table.scalar("rank"):
        size = expression(single, "rank", findings)
        yield from ((bond, size) for bond in form.bonds)
    for bond, node in table.table("rank").items:
        if bond.text != BUDGET:
            yield bond.text, expression(node, "rank", findings)


def _names(form: WrittenUpdate) -> Iterable[str]:
    """Every mode that a factor carries or that is fused with others, in order."""
    carried = [mode for reference in form.update.references for mode in reference.modes]
    return dict.fromkeys((*carried, *(part.name for mode in form.definitions for part in mode.parts)))


def parse_budget(text: Scalar) -> int:
    """The number of a budget: how many numbers may be trained. ``rank: {budget: ...}`` and ``--budget`` share it.

    >>> from tensorpeft.language.nodes import literal
    >>> [parse_budget(literal(text)) for text in ("20000", "20k", "20K", "2.5M", "1g")]
    [20000, 20000, 20000, 2500000, 1000000000]

    Raises:
        SpecError: it is no whole number, or out of range.
    """
    found = _COUNT.fullmatch(str(text.value))
    count = Decimal(found[1]) * _UNITS[found[2].lower()] if found else Decimal(0)
    if count != int(count) or not 1 <= count <= MAX_BUDGET:
        message = f"`{text.text}` is no number of trained numbers; expected a whole number from 1 to {MAX_BUDGET}"
        raise fail(message, text.span)
    return int(count)


def read_scale(table: MappingNode, form: WrittenUpdate | None, findings: Findings) -> Expression:
    """The scale, ``alpha / r`` by default where there are both."""
    if "scale" in table:
        return expression(table.get("scale"), "scale", findings)
    bonds = {mode for reference in form.factors.values() for mode in reference.modes} if form else set()
    span = table.where("alpha")
    default = Operation("/", Name("alpha", span), Name("r", span), span)
    return default if "alpha" in table and "r" in bonds else Number(1, span)
