"""The published counts (``golden/param_counts.yaml``), each as the spec that it speaks of.

A row names a method of the catalogue, and what to set over its file: matrices, rank, tasks. Of a row's count, the part of
``plus`` is another spec's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tensorpeft.compile import report
from tensorpeft.language.catalogue import method_path
from tensorpeft.language.load import load_spec
from tensorpeft.language.spec import Spec
from tensorpeft.reporting.report import Report

Row = dict[str, Any]

_TABLES = yaml.safe_load((Path(__file__).parent / "golden" / "param_counts.yaml").read_text(encoding="utf-8"))
ROWS: list[Row] = _TABLES["counts"]
NOT_ASSERTED: list[Row] = _TABLES["do_not_assert"]  # printed, but they follow from no stated configuration

CLASSIFIER = {
    "model_type": "roberta",
    "architectures": ["RobertaForSequenceClassification"],
    "vocab_size": 50265,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
}
_WORDED = {  # what a row writes for its matrices, where that is no list
    "all linear": ["all-linear"],
    "query, key, value, out, fc1 in 4, fc2 in 4": ["query", "key", "value", "out", "fc1", "fc2"],
    "k and v by output, down by input": ["key", "value", "down"],
}
OWN_SPLIT = {"loretta-rep", "llama-7b"}  # split by hand, into other parts than the shipped spec's


def described(row: Row) -> str:
    return "-".join(str(row[key]) for key in ("method", "model", "rank", "kind", "count") if key in row)


def is_expressed(row: Row) -> bool:
    """Whether the catalogue has the row's method, and what the row sets can be set over its file."""
    return method_path(row["method"]) is not None and {row["method"], row["model"]} != OWN_SPLIT


def spec_of(row: Row) -> Spec:
    """The spec that a row counts."""
    matrices = row["matrices"]
    overrides: dict[str, Any] = {"matrices": _WORDED[matrices] if isinstance(matrices, str) else matrices}
    overrides |= {key: row[key] for key in ("rank", "tasks") if key in row}
    if row["method"] == "lora" and "tasks" in row:  # an adapter of its own for each task
        overrides["modes"] = ["task", "matrix", "layer", "d_out", "d_in"]
    return load_spec(row["method"], **overrides)


def counted(row: Row) -> int:
    """What we count for a row."""
    found: int = getattr(cost(row), row["kind"])
    if "plus" in row:
        found += report(load_spec("lora", rank=row["rank"], matrices=["classifier.dense"]), model=CLASSIFIER).trainable
    return found


def cost(row: Row) -> Report:
    return report(spec_of(row), model=row["model"])
