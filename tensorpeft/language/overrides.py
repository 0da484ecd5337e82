"""Keys that a caller sets over a spec's text: keyword arguments, and ``--set key=value`` of the command line.

An override is a node like any other, with a source of its own, so that an error in it is shown there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tensorpeft.language.document import MAX_DEPTH, parse_value
from tensorpeft.language.errors import clip, fail
from tensorpeft.language.nodes import List, MappingNode, Node, Scalar
from tensorpeft.language.source import Source, Span
from tensorpeft.language.spec import BUDGET, INPUT

_IN_TARGET = ("matrices", "exclude", "layers")  # keys of `target:` that may be given by themselves


@dataclass(frozen=True)
class Override:
    """A place in the spec, and the node to put there; an empty node takes the place's key away."""

    path: tuple[Scalar, ...]
    value: Node


def parse_override(text: str) -> Override:
    """``rank=4``, ``rank.p=5``, ``target.matrices=[query, value]``; the value is YAML.

    Raises SpecError, located in a source named ``--set rank=4``.
    """
    key, equals, _ = text.partition("=")
    source = Source(f"--set {clip(text)}", text)
    if not equals or not all(part.strip() for part in key.split(".")):
        raise fail("expected `key=value`, such as `rank=4`", Span(source, 0, max(1, len(text))))
    return Override(_path(key, source), parse_value(source, len(key) + 1))


def from_value(key: str, value: object) -> Override:
    """A keyword argument as an override; its source is named like ``rank=4``."""
    try:
        text = f"{key}={value!r}"
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        raise fail("expected a number that can be written", Span(Source(f"{key}=...", key), 0, len(key))) from None
    source = Source(clip(text), text)
    return Override(_path(key, source), _node(value, Span(source, len(key) + 1, len(text)), 0))


def apply_overrides(table: MappingNode, overrides: Iterable[Override]) -> MappingNode:
    """The table with every override put in its place, in order.

    A mapping extends a mapping, or a value that is for every site; anything else replaces what was there. A rank without a
    bond's name sizes the bond ``r`` of a spec that has several, or all of them where none is called so; a budget takes the
    place of these sizes.
    """
    for override in overrides:
        path, value = override.path, override.value
        if path[0].text == "target" or path[0].text in _IN_TARGET:
            path, table, value = _in_target(path, table, value)
        elif path[0].text == "rank":
            table, value = _in_rank(path, table, value)
        table = _put(table, path, value, ())
    return table


def _in_target(
    path: tuple[Scalar, ...], table: MappingNode, value: Node
) -> tuple[tuple[Scalar, ...], MappingNode, Node]:
    """``matrices`` is ``target.matrices``, one pattern is a list of one, and ``all-linear`` can be extended."""
    if path[0].text in _IN_TARGET:
        path = (_key("target", path[0].span), *path)
    last = path[-1].text
    if last in _IN_TARGET and isinstance(value, Scalar) and value.value is not None:
        value = List((value,), value.span)
    target = table.get("target")
    if isinstance(target, Scalar) and (len(path) > 1 or isinstance(value, MappingNode)):
        whole = MappingNode(((_key("matrices", target.span), List((target,), target.span)),), target.span)
        table = table.put(_key("target", table.where("target")), whole)
    return path, table, value


def _in_rank(path: tuple[Scalar, ...], table: MappingNode, value: Node) -> tuple[MappingNode, Node]:
    """A size by itself is that of ``r``, or of every bond that is not as large as another mode.

    A budget takes the place of these sizes, and they that of a budget.
    """
    present = table.get("rank")
    if not isinstance(present, MappingNode) or _is_empty(value):
        return table, value
    sized = [key for key in present if key != BUDGET]
    own = [bond for bond in sized if not str(getattr(present.get(bond), "value", "")).isidentifier()]
    meant = ["r"] if "r" in sized else own
    if path[-1].text == BUDGET or (isinstance(value, MappingNode) and BUDGET in value):
        return table.put(path[0], present.drop(*meant)), value
    if len(path) > 1 or isinstance(value, MappingNode):
        return table, value
    if BUDGET in present:
        table, meant = table.put(path[0], present.drop(BUDGET)), ["r"] if sized else []
    sizes = tuple((_key(bond, present.where(bond)), value) for bond in meant)
    return table, MappingNode(sizes, present.span) if sizes else value


def _put(table: MappingNode, path: tuple[Scalar, ...], value: Node, above: tuple[str, ...]) -> MappingNode:
    """The table, which stands under the keys ``above``, with a value at a path inside it."""
    key, *rest = path
    here = (*above, key.text)
    present = table.get(key.text)
    single = _single(here)
    if single and isinstance(present, Scalar) and (rest or isinstance(value, MappingNode)):
        present = MappingNode(((_key(single, present.span), present),), present.span)
    if rest:
        inner = present if isinstance(present, MappingNode) else MappingNode((), key.span)
        return table.put(key, _put(inner, tuple(rest), value, here))
    if _is_empty(value):
        return table.drop(key.text)
    if isinstance(present, MappingNode) and isinstance(value, MappingNode):
        for inner_key, inner_value in value.items:
            present = _put(present, (inner_key,), inner_value, here)
        return table.put(key, present)
    return table.put(key, value)


def _single(keys: tuple[str, ...]) -> str | None:
    """The name under which a single value stands, where a mapping can take its place."""
    match keys:
        case ("dropout",):
            return INPUT
        case ("update" | "scale" | "ragged",) | ("rank" | "mask" | "heads", _):
            return "*"
        case _:
            return None


def _is_empty(node: Node) -> bool:
    return isinstance(node, Scalar) and node.value is None


def _path(key: str, source: Source) -> tuple[Scalar, ...]:
    path, start = [], 0
    for part in key.split("."):
        path.append(_key(part.strip(), Span(source, start, start + len(part))))
        start += len(part) + 1
    return tuple(path)


def _key(text: str, span: Span) -> Scalar:
    return Scalar(text, text, span, span)


def _node(value: object, span: Span, depth: int) -> Node:
    """A Python value as a node; all of it stands at the override's value."""
    if depth > MAX_DEPTH:
        raise fail(f"nested more than {MAX_DEPTH} levels deep; a spec needs four", span)
    if isinstance(value, float) and not math.isfinite(value):
        raise fail(f"`{value}` is not a finite number", span)
    if value is None or isinstance(value, str | bool | int | float):
        body = Span(span.source, span.start + 1, span.end - 1) if isinstance(value, str) else span
        return Scalar(value, str(value), span, body)
    if isinstance(value, Mapping):
        items = ((_key(str(key), span), _node(entry, span, depth + 1)) for key, entry in value.items())
        return MappingNode(tuple(items), span)
    if isinstance(value, list | tuple | range):
        return List(tuple(_node(entry, span, depth + 1) for entry in value), span)
    kind = type(value).__name__
    raise fail(f"found a value of type `{kind}`; expected a number, a text, a list or a mapping", span)
