"""Names of classes have one meaning each: the words in them are those of the glossary, or plain ones."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text().partition("## Glossary")[2]


def words_of(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


GLOSSARY = set(re.findall(r"^\| (\w+) \|", TEXT, re.MULTILINE)) - {"word"}
# words that mean here what they mean everywhere: in English, Python, grammars, files, pictures
PLAIN = words_of("""
    add backward box cache call case catalogue checkpoint code command comparison composer config context cost counted
    decomposition dense error explanation finding form forward function gradient graph header hook index indices input
    integer internal kept known language layer list listed listing made mapping mark meter method
    model module name node norm number operation output
    override page pair panel paper parameter path pass place problem product reach refused replace
    replaced replacement report resolver restore root rule run saved scalar score signature size source span
    start state storage table task tensor tensorpeft token trained tree weight whole written
""")


def classes() -> dict[str, list[str]]:
    """Where each class of the package is defined, private ones under their name without the underscore."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tensorpeft").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                found[node.name.lstrip("_")].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    return found


def singular(word: str) -> str:
    irregular = {"matrices": "matrix", "entries": "entry", "axes": "axis", "passes": "pass", "class": "class"}
    return irregular.get(word, word if word in PLAIN | GLOSSARY else word.removesuffix("s"))


def words(name: str) -> list[str]:
    return [singular(word.lower()) for word in re.findall(r"[A-Z][a-z]*", name)]


def test_each_class_has_a_name_of_its_own() -> None:
    assert {name: where for name, where in classes().items() if len(where) > 1} == {}


def test_the_words_in_names_of_classes_are_known() -> None:
    known = GLOSSARY | PLAIN
    assert {name: unknown for name in classes() if (unknown := {*words(name)} - known)} == {}


def test_the_glossary_says_each_word_once_and_no_other() -> None:
    told = re.findall(r"^\| (\w+) \|", TEXT, re.MULTILINE)
    assert sorted({word for word in told if told.count(word) > 1}) == ["word"]  # the head of each table
    assert not GLOSSARY & PLAIN
    package = " ".join(path.read_text() for path in (ROOT / "tensorpeft").rglob("*.py")).lower()
    assert {word for word in GLOSSARY if word not in package} == set()
