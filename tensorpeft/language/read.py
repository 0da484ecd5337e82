"""Node tree -> Spec, each key read by its own function.

A key whose node does not fit the schema, or whose text does not parse, is spoiled: it reads as if it were absent, and
nothing that depends on it is judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tensorpeft.language.errors import fail
from tensorpeft.language.findings import Findings
from tensorpeft.language.form import Form, known_factor, read_form
from tensorpeft.language.grammar import parse_arithmetic, parse_call, parse_reference
from tensorpeft.language.nodes import Plain, Scalar, Table
from tensorpeft.language.source import Source
from tensorpeft.language.spec import FactorRule, Heads, MaskRule, Spec, Target
from tensorpeft.language.syntax import Expression, Name, Number, Operation
from tensorpeft.language.words import BUILT_IN_MODES, LINEAR

_DEFAULT_NAME = "adapter"


def read_spec(table: Table, source: Source, findings: Findings) -> Spec | None:
    """The spec that a table says, or None where its update cannot be told."""
    whole = Table(tuple((key, node) for key, node in table.items if key.text not in findings.spoiled), table.span)
    form = read_form(whole, findings)
    scale = _scale(whole, form, findings)
    target, masks = _target(whole, findings), tuple(_masks(whole, findings))
    if form is None:
        return None
    alpha, tasks = _value(whole, "alpha"), _value(whole, "tasks")
    return Spec(
        name=str(_value(whole, "name") or _DEFAULT_NAME),
        target=target,
        update=form.update,
        factors=tuple(_rules(whole, form, findings)),
        ranks=tuple(_unknown_ranks(table, form) if "rank" in findings.spoiled else _ranks(whole, form, findings)),
        modes=form.definitions,
        masks=masks,
        alpha=None if alpha is None else float(alpha),
        scale=scale,
        ragged=(("*", str(_value(whole, "ragged") or "by_size")),),
        heads=_heads(whole),
        tasks=None if tasks is None else int(tasks),
        seed=int(_value(whole, "seed") or 0),
        start=str(_value(whole, "start") or "zero"),
        source=source,
        span=table.span,
    )


def _value(table: Table, key: str) -> Plain:
    node = table.scalar(key)
    return node.value if node else None


def _target(table: Table, findings: Findings) -> Target:
    everywhere, target = table.scalar("target"), table.table("target")
    if everywhere:
        return Target((everywhere.text,), spans=(everywhere.span,))
    matrices, exclude, layers = (target.scalars(key) for key in ("matrices", "exclude", "layers"))
    for entry in (*_repeated(matrices), *_repeated(exclude), *_repeated(layers)):
        findings.add("target", f"`{entry.text}` is listed twice", entry.span)
    return Target(
        matrices=tuple(entry.text for entry in matrices),
        exclude=tuple(entry.text for entry in exclude),
        layers=tuple(int(entry.text, 0) for entry in layers) or None,
        spans=tuple(entry.span for entry in (*matrices, *exclude)),
    )


def _repeated(entries: Iterable[Scalar]) -> Iterator[Scalar]:
    seen: set[str] = set()
    for entry in entries:
        if entry.text in seen:
            yield entry
        seen.add(entry.text)


def _rules(table: Table, form: Form, findings: Findings) -> Iterator[tuple[str, FactorRule]]:
    """What is said of each factor of the update, in its order."""
    factors = table.table("factors")
    for key, _ in factors.items:
        known_factor(key, form, "factors", findings)
    frozen = {key.text for key in table.scalars("frozen") if known_factor(key, form, "frozen", findings)}
    for name, reference in form.factors.items():
        said = factors.table(name)
        init = form.inits.get(name, LINEAR)
        if text := said.scalar("init"):
            with findings.under("factors"):
                init = parse_call(text)
        is_frozen = bool(_value(said, "frozen")) or name in frozen
        span = factors.where(name) if name in factors else reference.span
        yield name, FactorRule(init, is_frozen, bool(_value(said, "stored")), span=span)


def _ranks(table: Table, form: Form, findings: Findings) -> Iterator[tuple[str, Expression]]:
    """The size of each bond; one that is given by itself sizes them all."""
    single, each = table.scalar("rank"), table.table("rank")
    sizes = [(bond, single) for bond in form.bonds] if single else [(bond, each.scalar(bond)) for bond in each]
    for bond, size in sizes:
        if size:
            expression: Expression = Number(1)  # keeps the bond known where its size does not parse
            with findings.under("rank"):
                expression = parse_arithmetic(size)
            yield bond, expression


def _unknown_ranks(table: Table, form: Form) -> Iterator[tuple[str, Expression]]:
    """Some size for each bond where the real ones cannot be told, so that the bonds at least are known."""
    given = table.table("rank")
    carried = (mode for reference in form.factors.values() for mode in reference.modes)
    named = dict.fromkeys((*given, *form.bonds) if given.items else carried)
    defined = {name for d in form.definitions for name in (d.name, *(part.name for part in d.parts))}
    yield from ((bond, Number(1)) for bond in named if bond not in BUILT_IN_MODES and bond not in defined)


def _masks(table: Table, findings: Findings) -> Iterator[MaskRule]:
    masks = table.table("mask")
    for key, _ in masks.items:
        with findings.under("mask"):
            reference = parse_reference(key)
            if len(reference.modes) != 1:
                raise fail(f"expected one mode of a factor, such as `{reference.factor}[d_out]`", key.span)
            rule = masks.scalar(key.text)
            if rule:
                yield MaskRule(reference.factor, reference.modes, parse_call(rule), span=key.span)


def _scale(table: Table, form: Form | None, findings: Findings) -> Expression:
    """The scale, ``alpha / r`` by default where there are both."""
    if scale := table.scalar("scale"):
        with findings.under("scale"):
            return parse_arithmetic(scale)
    bonds = {mode for reference in form.factors.values() for mode in reference.modes} if form else set()
    span = table.where("alpha")
    default = Operation("/", Name("alpha", span), Name("r", span), span)
    return default if "alpha" in table and "r" in bonds else Number(1, span)


def _heads(table: Table) -> Heads:
    sides, counts = (_per_matrix(table.table("heads"), key) for key in ("side", "count"))
    return Heads(tuple((m, v.text) for m, v in sides), tuple((m, int(v.text, 0)) for m, v in counts))


def _per_matrix(heads: Table, key: str) -> list[tuple[str, Scalar]]:
    """One value for every matrix, written ``*``, or a value for each."""
    single, each = heads.scalar(key), heads.table(key)
    return [("*", single)] if single else [(matrix.text, v) for matrix, v in each.items if isinstance(v, Scalar)]
