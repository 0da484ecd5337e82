"""Node tree -> Spec, each key read by its own function.

What does not fit the schema, or does not parse, reads as if it were absent; its key is spoiled, and nothing that depends on
it is judged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tensorpeft.language.desugar import read_form
from tensorpeft.language.diagnostics import Findings
from tensorpeft.language.factors import read_factors, read_masks
from tensorpeft.language.keywords import INPUT
from tensorpeft.language.nodes import Node, Plain, Scalar, Table, pruned
from tensorpeft.language.sizes import read_scale, read_sizes
from tensorpeft.language.source import Source, Span
from tensorpeft.language.spec import Heads, Spec, Target

_DEFAULT_NAME = "adapter"


def read_spec(table: Table, source: Source, findings: Findings) -> Spec | None:
    """The spec that a table says, or None where its update cannot be told."""
    whole = pruned(table, findings.unreadable)
    form = read_form(whole, findings)
    scale = read_scale(whole, form, findings)
    target, masks = _target(whole, findings), tuple(read_masks(whole, form, findings))
    if form is None:
        return None
    alpha, tasks = _value(whole, "alpha"), _value(whole, "tasks")
    extras = _train(whole, findings)
    sizes = read_sizes(whole, table, form, findings)
    return Spec(
        name=str(_value(whole, "name") or _DEFAULT_NAME),
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
        spans=tuple(entry.span for entry in (*matrices, *exclude, *layers)),
    )


def _repeated(entries: Iterable[Scalar]) -> Iterator[Scalar]:
    seen: set[str] = set()
    for entry in entries:
        if entry.text in seen:
            yield entry
        seen.add(entry.text)


def _ragged(table: Table) -> tuple[tuple[str, str], ...]:
    """The policy of each mode; that of every other one last."""
    policies = {"*": "by_size"} | {mode: policy.text for mode, policy in _each(table, "ragged", "*")}
    return (*((mode, policy) for mode, policy in policies.items() if mode != "*"), ("*", policies["*"]))


def _dropout(table: Table) -> tuple[tuple[str, float], ...]:
    """What is dropped, and how often; a number by itself is for the input."""
    found = ((name, float(str(probability.value))) for name, probability in _each(table, "dropout", INPUT))
    return tuple((name, probability) for name, probability in found if probability)


def _train(table: Table, findings: Findings) -> tuple[Scalar, ...]:
    entries = table.scalars("train")
    for entry in _repeated(entries):
        findings.add("train", f"`{entry.text}` is listed twice", entry.span)
    return entries


def _scores(table: Table, findings: Findings) -> str | None:
    path = table.scalar("scores")
    if path and not path.text.isprintable():
        findings.add("scores", "the path under `scores` holds an unprintable character", path.span)
    return path.text if path else None


def _heads(table: Table) -> Heads:
    sides, counts = (_each(table.table("heads"), key, "*") for key in ("side", "count"))
    return Heads(
        side=tuple((matrix, side.text) for matrix, side in sides),
        count=tuple((matrix, int(count.text, 0)) for matrix, count in counts),
        spans=tuple(span for key in ("side", "count") for span in _places(table.table("heads").get(key))),
    )


def _places(node: Node | None) -> list[Span]:
    """Where the names of a value for each of them are written, or where a single value is."""
    return [name.span for name, _ in node.items] if isinstance(node, Table) else [node.span] if node else []


def _each(table: Table, key: str, single: str) -> list[tuple[str, Scalar]]:
    """The values under a key by their names; one without a name stands for ``single``."""
    value, each = table.scalar(key), table.table(key)
    return [(single, value)] if value else [(name.text, v) for name, v in each.items if isinstance(v, Scalar)]
