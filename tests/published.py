"""The published counts (``golden/param_counts.yaml``), each as the spec that it speaks of.

A row names a method of the catalogue, and what to set over its file: matrices, rank, tasks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tensorpeft.language.loader import load_spec
from tensorpeft.language.spec import Spec
from tensorpeft.pipeline import report
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
SHAPES: dict[tuple[str, str], dict[str, Any]] = {  # a method's own shapes for a model, over those that a spec finds
    ("loretta-rep", "llama-7b"): {  # 4096 x 8 as 16 x 16 x 8 x 4 x 4: the rank is within the last two
        "modes": [
            "d_out = o1(16) * o2(16) * o3(8) * o4(2)",
            "d_in = i1(16) * i2(16) * i3(8) * i4(2)",
            "s = i4 * x",
            "t = o4 * x",
            "q = y * z",
        ],
        "rank": {"r": None, "a": 8, "d": "a", "h": "a", "x": 2, "y": 2, "z": 2},
        "update": (
            "B1[matrix, layer, o1, e] * B2[matrix, layer, e, o2, f] * B3[matrix, layer, f, o3, g] * "
            "B4[matrix, layer, g, t, h] * B5[matrix, layer, h, q] * "
            "A1[matrix, layer, i1, a] * A2[matrix, layer, a, i2, b] * A3[matrix, layer, b, i3, c] * "
            "A4[matrix, layer, c, s, d] * A5[matrix, layer, d, q]"
        ),
        "factors": None,
        "alpha": None,
        "scale": 2,
    }
}


BESIDE: dict[
    str, tuple[str, dict[str, Any]]
] = {  # of rows that count RoBERTa's classifier too: what they are a spec of
    "lorta": ("lorta_lora", {}),
    "loretta-rep": (  # in place of its dense weight stands a tensor train
        "loretta_rep",
        {
            "matrices": ["query", "value", "classifier.dense"],
            "update": {
                "*": str(load_spec("loretta_rep").update),
                "classifier.dense": (
                    "C1[o1, e] * C2[e, o2, f] * C3[f, o3, g] * D3[g, i3, c] * D2[c, i2, b] * D1[b, i1] - W[d_out, d_in]"
                ),
            },
            "train": ["norms", "classifier.dense.bias"],
        },
    ),
}


def described(row: Row) -> str:
    return "-".join(str(row[key]) for key in ("method", "model", "rank", "kind", "count") if key in row)


def spec_of(row: Row) -> Spec:
    """The spec that a row counts."""
    if "plus" in row:
        name, more = BESIDE[row["method"]]
        return load_spec(name, rank=row["rank"], **more)
    matrices = row["matrices"]
    overrides: dict[str, Any] = {"matrices": _WORDED[matrices] if isinstance(matrices, str) else matrices}
    if (row["method"], row["model"]) in SHAPES:
        return load_spec(row["method"], **overrides, **SHAPES[row["method"], row["model"]])
    overrides |= {key: row[key] for key in ("rank", "tasks") if key in row}
    if row["method"] == "lora" and "tasks" in row:  # an adapter of its own for each task
        overrides["modes"] = ["task", "matrix", "layer", "d_out", "d_in"]
    return load_spec(row["method"], **overrides)


def counted(row: Row) -> int:
    """What we count for a row."""
    found, kind = cost(row), row["kind"]
    counts = {"trainable": found.trainable, "stored": found.stored, "with the base's": found.trainable + found.extra}
    return counts[kind]


def cost(row: Row) -> Report:
    return report(spec_of(row), model=CLASSIFIER if "plus" in row else row["model"])
