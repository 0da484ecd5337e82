"""A text task that every machine with this environment already has: which library does this docstring describe?

The first paragraphs of the docstrings of eight installed packages, read from their files (nothing is imported) with
every library's name masked. Whole files go to one side of the split, so that two methods of one class, which often
say nearly the same, never stand on both sides. File order, split and choice hang on hashes of paths and texts alone:
the same packages give the same examples.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = ("huggingface_hub", "networkx", "numpy", "scipy", "sklearn", "sympy", "torch", "transformers")
MASK = "[MASK]"
_NAMES = re.compile(
    r"\w*(?:torch|numpy|scipy|sklearn|scikit|networkx|sympy|transformers\b|hugging_?face)\w*"
    r"|hugging face|\b(?:np|nx|hf|hub|learn)\b|\N{HUGGING FACE}",
    re.IGNORECASE,
)
_HELD_OUT_OF = 5  # one file in five is held out


@dataclass(frozen=True)
class Examples:
    """Texts and the index in `LIBRARIES` of each."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]


def load(train_per_class: int, held_out_per_class: int) -> tuple[Examples, Examples]:
    """Training and held-out examples, as many of every class, in an order that mixes the classes.

    Raises:
        LookupError: a library is not installed, or has too few docstrings.
    """
    seen: set[str] = set()  # a text that two files share is used once
    train: list[tuple[str, int]] = []
    held_out: list[tuple[str, int]] = []
    for label, library in enumerate(LIBRARIES):
        wanted = {False: train_per_class, True: held_out_per_class}
        for text, is_held_out in _examples(library):
            if wanted[is_held_out] and text.lower() not in seen:
                seen.add(text.lower())
                (held_out if is_held_out else train).append((text, label))
                wanted[is_held_out] -= 1
            if not any(wanted.values()):
                break
        else:
            raise LookupError(f"{library} has too few docstrings: {wanted[False]} and {wanted[True]} more were wanted")
    return _mixed(train), _mixed(held_out)


def _examples(library: str) -> Iterator[tuple[str, bool]]:
    """Masked first paragraphs of a library, and whether each is held out."""
    spec = find_spec(library)
    if spec is None or spec.origin is None:
        raise LookupError(f"{library} is not installed")
    root = Path(spec.origin).parent
    files = [(path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")]
    for name, path in sorted(files, key=lambda file: _hash(file[0])):
        if not {"test", "tests", "testing", "_vendor", "externals"} & set(name.split("/")):
            is_held_out = _hash(f"{library}/{name}") % _HELD_OUT_OF == 0
            yield from ((text, is_held_out) for text in _paragraphs(path.read_text(encoding="utf-8", errors="replace")))


def _paragraphs(code: str) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        try:
            tree = ast.parse(code)
        except SyntaxError:
            return
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = (ast.get_docstring(node) or "").split("\n\n")[0]
            text = " ".join(_NAMES.sub(MASK, first).split())
            if len(text) >= 40:  # shorter ones ("Return a copy.") describe no library
                yield text


def _mixed(pairs: list[tuple[str, int]]) -> Examples:
    texts, labels = zip(*sorted(pairs, key=lambda pair: _hash(pair[0])), strict=True)
    return Examples(texts, labels)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")
