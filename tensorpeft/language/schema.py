"""The shape of a spec: ``grammars/spec.schema.json``, and its complaints as sentences at their places."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from tensorpeft.language.diagnostics import Findings
from tensorpeft.language.errors import clip, did_you_mean, listing, nearest
from tensorpeft.language.nodes import List, MappingNode, Node, Scalar
from tensorpeft.language.shipped import grammar_path


@cache
def _validator() -> Any:
    """The schema's validator, with whole numbers meant strictly (`4.0` is none, nor is `true`), and patterns too.

    In JSON Schema `$` is the very end of a text, as in ECMAScript; Python's `$` stands before a last line break as well.
    """
    from jsonschema import Draft202012Validator, ValidationError, validators  # late: a tenth of a second to import

    def fits(_: object, pattern: str, text: object, schema: object) -> Iterator[ValidationError]:
        if isinstance(text, str) and not re.search(pattern.replace("$", r"\Z"), text):
            yield ValidationError(f"{text!r} does not match {pattern!r}")

    integers = Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    strict = validators.extend(Draft202012Validator, {"pattern": fits}, type_checker=integers)
    return strict(json.loads(grammar_path("spec.schema.json").read_text(encoding="utf-8")))


def validate(table: MappingNode, findings: Findings) -> None:
    """Add every departure from the schema to the findings."""
    for error in _validator().iter_errors(table.plain()):
        path = list(error.absolute_path)
        node = _descend(table, path)
        findings.unreadable.update(_unreadable(error, path))
        if isinstance(node, MappingNode) and error.validator == "additionalProperties":
            _unknown_keys(node, path, error.schema, findings)
        elif isinstance(node, MappingNode) and error.validator == "required":
            _missing_keys(node, path, error.schema, findings)
        elif isinstance(node, MappingNode) and "propertyNames" in error.schema_path:
            message = f"`{clip(error.instance)}`{_inside(path)} is no name; expected {error.schema['description']}"
            findings.add(str(path[0]), message, node.where(error.instance))
        else:
            message = f"{_subject(path)} is {_found(node)}; expected {error.schema['description']}"
            findings.add(str(path[0]), message, node.span)


def _unreadable(error: Any, path: list[str | int]) -> Iterator[tuple[str | int, ...]]:
    """The places that a complaint is about: keys that are too many or no names, or the value itself."""
    if error.validator == "additionalProperties":
        yield from ((*path, key) for key in error.instance if key not in error.schema["properties"])
    elif "propertyNames" in error.schema_path:
        yield (*path, error.instance)
    elif error.validator != "required":
        yield tuple(path)


def _descend(node: Node, path: list[str | int]) -> Node:
    for step in path:
        if isinstance(node, List):
            node = node.items[int(step)]
        elif isinstance(node, MappingNode):
            node = node.get(str(step)) or node
    return node


def _nearest_keys(node: MappingNode, known: Iterable[str]) -> dict[str, str | None]:
    """The keys that nothing is known of, and which known key each is most like."""
    return {key: nearest(key, known) for key in node if key not in known}


def _unknown_keys(node: MappingNode, path: list[str | int], schema: dict[str, Any], findings: Findings) -> None:
    known = schema["properties"]
    for key, meant in _nearest_keys(node, known).items():
        hint = did_you_mean(key, known) or f"; expected one of {listing(known, 30)}"
        message = f"unknown key `{clip(key)}`{_inside(path)}{hint}"
        findings.add(str(path[0]) if path else meant or key, message, node.where(key))


def _missing_keys(node: MappingNode, path: list[str | int], schema: dict[str, Any], findings: Findings) -> None:
    known = schema["properties"]
    meant = _nearest_keys(node, known).values()
    for key in schema["required"]:
        if key not in node and key not in meant:
            message = f"`{key}` is missing{_inside(path)}; expected {known[key]['description']}"
            findings.add(str(path[0]) if path else key, message, node.where(key))


def _inside(path: list[str | int]) -> str:
    return f" in `{_dotted(path)}`" if path else ""


def _subject(path: list[str | int]) -> str:
    if path and isinstance(path[-1], int):
        return f"an entry of `{_dotted(path[:-1])}`"
    return f"`{_dotted(path)}`"


def _dotted(path: list[str | int]) -> str:
    return clip(".".join(str(step) for step in path if not isinstance(step, int)))


def _found(node: Node) -> str:
    if isinstance(node, Scalar):
        if node.value is None:
            return "empty"
        if isinstance(node.value, str):
            broken = " with a line break" if "\n" in node.value else ""
            return f"the text `{clip(node.value)}`{broken}" if node.value else "an empty text"
        return f"`{clip(node.text)}`"
    if isinstance(node, List):
        return f"a list of length {len(node.items)}" if node.items else "an empty list"
    return "a mapping" if node.items else "an empty mapping"
