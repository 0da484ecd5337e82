"""The tables under ``specs/models``, read with an eye on their keys: a slip in one would be silent, and change counts."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tensorpeft.language.errors import ModelError, did_you_mean, listing
from tensorpeft.language.shipped import data_folder

FOLDER = data_folder("specs") / "models"


def read_table(path: Path, kind: str) -> Any:
    """A table of a kind that ``specs/models/schema.json`` defines: family, card, roles or fused.

    Keys alone are checked, for a validator takes a tenth of a second to import; the tests hold the tables to all of it.

    Raises:
        ModelError: the schema does not know a key.
    """
    table = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    try:
        check_keys(table, _definitions()[kind])
    except ModelError as reason:
        raise ModelError(f"{path}: {reason}") from None
    return table


@cache
def _definitions() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((FOLDER / "schema.json").read_text(encoding="utf-8"))
    return schema["$defs"]


def check_keys(part: Any, schema: Any, where: str = "") -> None:
    """Hold the keys of a table, and of all that is in it, to a schema.

    Raises:
        ModelError: there is one that the schema does not have.
    """
    schema = _definitions()[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    if isinstance(part, list):
        for entry in part:
            check_keys(entry, schema.get("items", {}), where)
    elif isinstance(part, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        for key, value in part.items():
            if key not in known and others is False:
                inside = f" in `{where}`" if where else ""
                hint = did_you_mean(str(key), known) or f"; expected one of {listing(known, 30)}"
                raise ModelError(f"unknown key `{key}`{inside}{hint}")
            check_keys(value, known.get(key, others), f"{where}.{key}".removeprefix("."))
