"""The public door of the language: a name, a path or a text becomes a Spec, or every problem of it is told."""

from __future__ import annotations

from os import PathLike, fspath, sep
from pathlib import Path

from tensorpeft.language.checks.soundness import check_spec
from tensorpeft.language.desugar import subtract
from tensorpeft.language.diagnostics import Findings
from tensorpeft.language.document import MAX_BYTES, parse_document
from tensorpeft.language.errors import clip, did_you_mean, fail, listing
from tensorpeft.language.nodes import MappingNode
from tensorpeft.language.overrides import Override, apply_overrides, from_value
from tensorpeft.language.reader import read_spec
from tensorpeft.language.schema import validate
from tensorpeft.language.shipped import method_path, method_paths
from tensorpeft.language.source import Source, Span
from tensorpeft.language.spec import Spec


def load_spec(what: str | PathLike[str], *overrides: Override, **values: object) -> Spec:
    """The spec that a catalogue name, a path or a YAML text says.

    Whatever has a line break is YAML text; a name of the catalogue comes before a file of that name. Keyword arguments
    replace or, for mappings, extend what the text says, by top-level key, and by ``matrices``, ``exclude`` and
    ``layers`` for those of ``target``; ``rank=4`` sizes the bond ``r`` where there is one, else every bond; None takes
    a key away. Positional overrides come from ``parse_override``.

    >>> str(load_spec("lora", rank=4).update)
    'B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]'
    >>> load_spec("lora", rank={"budget": "20k"}).budget
    20000

    Raises SpecError with every independent problem, each at its place in the text or in an override.
    """
    source = find_source(what)
    table = parse_document(source)
    given = [*overrides, *(from_value(key, value) for key, value in values.items())]
    return compile_table(apply_overrides(table, given), source)


def compile_table(table: MappingNode, source: Source) -> Spec:
    """The spec that a node tree says; raises SpecError with all its problems."""
    findings = Findings()
    validate(table, findings)
    spec = read_spec(table, source, findings)
    if spec is not None:
        check_spec(spec, table, findings)
    findings.settle()
    assert spec is not None
    return subtract(spec)


def find_source(what: str | PathLike[str]) -> Source:
    """The text that a catalogue name, a path or a text stands for."""
    if not isinstance(what, (str, PathLike)):
        found = f"{clip(repr(what))} of type `{type(what).__name__}`"
        raise fail(f"expected a catalogue name, a path or YAML text, found {found}")
    name = fspath(what)
    if not isinstance(what, str):
        return _read(Path(name), name)
    if "\n" in name or "\r" in name:
        return Source("<spec>", name.replace("\r\n", "\n").replace("\r", "\n"))
    shipped = method_path(name)
    if shipped is not None:
        return _read(shipped, f"specs/{shipped.name}")
    if sep in name or name.endswith((".yaml", ".yml")):
        return _read(Path(name), name)
    known = method_paths()
    hint = did_you_mean(name, known) or f"; the catalogue has {listing(known, 40)}"
    raise fail(f"no method is called `{clip(name)}`{hint}")


def _read(path: Path, name: str) -> Source:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise fail(f"`{clip(name, 200)}` cannot be read: {reason.lower()}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        source = Source(name, content[: error.start].decode("utf-8") + "\ufffd")
        end = len(source.text)
        raise fail("a spec is UTF-8 text; this byte is not", Span(source, end - 1, end)) from None
    return Source(name, text.replace("\r\n", "\n").replace("\r", "\n"))
