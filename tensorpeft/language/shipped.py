"""Paths of the grammars and the shipped specs: beside the package in a checkout, inside it in a wheel."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def data_folder(name: str) -> Path:
    """The folder ``grammars`` or ``specs``."""
    packed = _PACKAGE / "_data" / name
    return packed if packed.is_dir() else _PACKAGE.parent / name


def grammar_path(name: str) -> Path:
    """A file of ``grammars/``."""
    return data_folder("grammars") / name


@cache
def method_paths() -> dict[str, Path]:
    """The shipped methods: name -> spec file."""
    return {path.stem: path for path in sorted(data_folder("specs").glob("*.yaml"))}


def method_path(name: str) -> Path | None:
    """The spec file of a shipped method; ``shared-a`` is ``shared_a``."""
    return method_paths().get(name.replace("-", "_"))
