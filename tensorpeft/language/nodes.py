"""The node tree of a YAML text: plain values, each with the place it was read from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from tensorpeft.language.source import Source, Span

Plain = str | int | float | bool | None


@dataclass(frozen=True)
class Scalar:
    """A text, a number, a truth value or nothing.

    ``text`` is the scalar as read, quotes and folding undone; ``body`` is the stretch of the source between the quotes.
    """

    value: Plain
    text: str
    span: Span
    body: Span

    def plain(self) -> Plain:
        return self.value

    def part(self, start: int, end: int) -> Span:
        """The span of the characters ``[start, end)`` of ``text``; the whole scalar's where escapes hide it."""
        if not self._offsets:
            return self.span
        after = self._offsets[-1] + 1
        first = self._offsets[start] if start < len(self._offsets) else after
        last = self._offsets[end - 1] + 1 if start < end <= len(self._offsets) else first
        return Span(self.span.source, first, last)

    @cached_property
    def _offsets(self) -> tuple[int, ...]:
        """The place of every character of ``text``, or nothing where it is not written letter by letter (escapes)."""
        written, at, end, places = self.body.source.text, self.body.start, self.body.end, []
        for character in self.text:
            while not character.isspace() and at < end and written[at].isspace():
                at += 1
            same = at < end and (written[at].isspace() if character.isspace() else written[at] == character)
            if not (same or character.isspace()):
                return ()
            places.append(min(at, end - 1))
            at += same
        return tuple(places)


@dataclass(frozen=True)
class List:
    """A sequence of nodes."""

    items: tuple[Node, ...]
    span: Span

    def plain(self) -> list[object]:
        return [item.plain() for item in self.items]


@dataclass(frozen=True)
class MappingNode:
    """A mapping from texts to nodes, in the order written."""

    items: tuple[tuple[Scalar, Node], ...]
    span: Span

    def plain(self) -> dict[str, object]:
        return {key.text: value.plain() for key, value in self.items}

    @cached_property
    def _entries(self) -> dict[str, tuple[Scalar, Node]]:
        return {key.text: (key, value) for key, value in self.items}

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def get(self, key: str) -> Node | None:
        """The node under a key, if there is one."""
        return self._entries[key][1] if key in self._entries else None

    def scalar(self, key: str) -> Scalar | None:
        """The scalar under a key, if there is one."""
        node = self.get(key)
        return node if isinstance(node, Scalar) else None

    def scalars(self, key: str) -> tuple[Scalar, ...]:
        """The scalars of the list under a key."""
        node = self.get(key)
        return tuple(item for item in node.items if isinstance(item, Scalar)) if isinstance(node, List) else ()

    def table(self, key: str) -> MappingNode:
        """The mapping under a key, an empty one if there is none."""
        node = self.get(key)
        return node if isinstance(node, MappingNode) else MappingNode((), self.span)

    def where(self, key: str) -> Span:
        """The span of a key; the first key's if this one is missing."""
        if key in self._entries:
            return self._entries[key][0].span
        return self.items[0][0].span if self.items else self.span

    def place(self, key: str, name: str) -> Span:
        """The span of a name in the mapping under a key; the value's if it is no mapping."""
        node = self.get(key)
        return node.where(name) if isinstance(node, MappingNode) else node.span if node else self.where(key)

    def put(self, key: Scalar, value: Node) -> MappingNode:
        """This table with one entry replaced in its place, or added at the end."""
        if key.text not in self:
            return MappingNode((*self.items, (key, value)), self.span)
        return MappingNode(tuple((k, value if k.text == key.text else v) for k, v in self.items), self.span)

    def drop(self, *keys: str) -> MappingNode:
        """This table without some of its entries."""
        return MappingNode(tuple((k, v) for k, v in self.items if k.text not in keys), self.span)


Node = Scalar | List | MappingNode
KeyPath = tuple[str | int, ...]  # keys and places in lists, from the root


def pruned(table: MappingNode, paths: Iterable[KeyPath]) -> MappingNode:
    """The table without what stands at these places."""
    under: dict[str, list[KeyPath]] = {}
    for first, *rest in filter(None, paths):
        under.setdefault(str(first), []).append(tuple(rest))
    kept = ((key, _without(value, under.get(key.text, []))) for key, value in table.items)
    return MappingNode(tuple((key, value) for key, value in kept if value is not None), table.span)


def _without(node: Node, paths: list[KeyPath]) -> Node | None:
    if () in paths:
        return None
    if isinstance(node, MappingNode) and paths:
        return pruned(node, paths)
    if isinstance(node, List) and paths:
        gone = {path[0] for path in paths}
        return List(tuple(item for place, item in enumerate(node.items) if place not in gone), node.span)
    return node


def literal(text: str, name: str = "<text>") -> Scalar:
    """A text given by itself rather than in a file."""
    span = Span(Source(name, text), 0, len(text))
    return Scalar(text, text, span, span)
