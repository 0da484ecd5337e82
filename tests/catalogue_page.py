"""The generated parts of ``specs/README.md``: what the catalogue has, counts and fits.

The page is written by hand but for what stands between ``<!-- methods -->`` and ``<!-- end -->`` and the like.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import yaml

from tensorpeft.language.errors import Problem, SpecError
from tensorpeft.language.keywords import SCORED
from tensorpeft.language.loader import load_spec
from tensorpeft.language.shipped import method_paths
from tensorpeft.language.spec import Spec
from tensorpeft.model.cards import model_shape
from tensorpeft.model.family import families
from tensorpeft.model.shape import ModelShape
from tensorpeft.network.lower import lower
from tensorpeft.network.network import Network
from tensorpeft.pipeline import front
from tensorpeft.reporting.catalogue import Method, Paper, catalogue
from tensorpeft.reporting.table import Table
from tests import published

PAGE = Path(__file__).resolve().parents[1] / "specs" / "README.md"
ARCHITECTURES = yaml.safe_load((Path(__file__).parent / "golden" / "architectures.yaml").read_text(encoding="utf-8"))
OK = "ok"
_TOLD = 3  # places of a refusal that a footnote lists


def filled(page: str) -> str:
    """The page with every generated part as it ought to be."""
    for name, content in parts().items():
        opening = f"<!-- {name} -->\n"
        assert page.count(opening) == 1, f"the page has no place for {name}"
        before, rest = page.split(opening)
        page = f"{before}{opening}{content}\n{rest[rest.index('<!-- end -->') :]}"
    return page


def parts() -> dict[str, str]:
    return {
        "methods": methods(),
        "published counts": counts(),
        "counts that are not asserted": not_asserted(),
        "fits": fits(),
    }


def methods() -> str:
    found = catalogue()
    headers = ("spec", f"trained on {found.model}", "of the base", "method", "paper", "dW")
    return Table(headers, tuple(map(_method, found.methods))).render("github")


def _method(method: Method) -> tuple[int | str, ...]:
    count = "does not fit" if method.trainable is None else method.trainable
    told = f"{method.title}: {method.what}"
    update = f"`{method.update}`" if method.update else "none"
    return f"[{method.name}]({method.name}.yaml)", count, method.extra or "", told, _linked(method.paper), update


def _linked(paper: Paper) -> str:
    number = paper.arxiv.removeprefix("arXiv:")
    return f"[{paper}](https://arxiv.org/abs/{number})" if number else str(paper)


def counts() -> str:
    rows = []
    for row in published.ROWS:
        matrices = row["matrices"] if isinstance(row["matrices"], str) else ", ".join(row["matrices"])
        setting = "; ".join(f"{key} {row[key]}" for key in ("rank", "tt_rank", "tasks") if key in row)
        plus = f" + {row['plus']}" if "plus" in row else ""
        ours = published.counted(row)
        told = (row["method"], row["model"], matrices + plus, setting, row["kind"])
        rows.append((*told, str(row.get("published", "")), row["count"], ours, row.get("note", "")))
    headers = ("method", "model", "matrices", "setting", "counted", "published", "exact", "here", "note")
    return Table(headers, tuple(rows)).render("github")


def not_asserted() -> str:
    known = ("method", "model", "rank", "published")
    rows = tuple((*(str(row.get(key, "")) for key in known), _remark(row, known)) for row in published.NOT_ASSERTED)
    return Table((*known, "what follows from a stated configuration"), rows).render("github")


def _remark(row: published.Row, known: Iterable[str]) -> str:
    names = {"exact": "", "formula": "by the formula ", "exact_r4": "at rank 4 "}
    return "; ".join(f"{names[key]}{row[key]}" for key in row if key not in known)


@cache
def shapes() -> dict[str, ModelShape]:
    """One model of every family, under the family's name."""
    known = [(family, config) for family, config in ARCHITECTURES.items() if family in families()]
    return {family: model_shape({"model_type": family, **config}) for family, config in known}


@dataclass(frozen=True)
class Refusal:
    """Why a spec does not fit an architecture: the key of the spec at which it fails, and what is said."""

    key: str
    message: str
    place: str


def without_scores(spec: Spec) -> Spec:
    """A spec that keeps by scores, as one that keeps as many at random: whether it fits does not depend on which."""
    masks = tuple(
        replace(mask, rule=replace(mask.rule, name="keep")) if mask.rule.name in SCORED else mask for mask in spec.masks
    )
    return replace(spec, masks=masks, scores=None)


def fitted(spec: Spec, *shapes: ModelShape) -> Network:
    """The network of a spec on the first shape that it fits."""
    *others, last = shapes
    for shape in others:
        with suppress(SpecError):
            return lower(spec, shape)
    return lower(spec, last)


@cache
def _loaded(spec: str) -> Spec:
    return without_scores(load_spec(spec))


def outcome(spec: str, shape: ModelShape) -> Refusal | None:
    """None where a spec can be planned for a model."""
    try:
        front(_loaded(spec), shape)
    except SpecError as refusal:
        return _refusal(refusal.problems[0], shape)
    return None


def _refusal(problem: Problem, shape: ModelShape) -> Refusal:
    span = problem.span
    assert span is not None, f"a refusal without a place: {problem.message}"
    keys = re.findall(r"^(\w+):", span.source.text[: span.start], re.MULTILINE)
    message = problem.message.partition(f" in {shape.name}, which has ")[0]  # all that it has is too long for a note
    return Refusal(keys[-1], re.sub(rf"\b{re.escape(shape.name)}\b", "the model", message), str(span))


def fits() -> str:
    notes: dict[str, list[str]] = {}  # message -> where it is said
    rows = []
    for family, shape in shapes().items():
        found = [outcome(name, shape) for name in method_paths()]
        rows.append((f"{family} ({ARCHITECTURES[family]['name']})", *(_cell(refusal, notes) for refusal in found)))
    table = Table(("", *method_paths()), tuple(rows)).render("github")
    told = [f"[^{n}]: {message} ({_listed(places)})" for n, (message, places) in enumerate(notes.items(), 1)]
    return "\n".join([table, "", *told])


def _listed(places: list[str]) -> str:
    more = len(places) - _TOLD
    return ", ".join(places[:_TOLD]) + (f" and {more} others" if more > 0 else "")


def _cell(refusal: Refusal | None, notes: dict[str, list[str]]) -> str:
    """`ok`, or the key of the spec with the number of a footnote."""
    if refusal is None:
        return OK
    places = notes.setdefault(refusal.message, [])
    if refusal.place not in places:
        places.append(refusal.place)
    return f"{refusal.key}[^{[*notes].index(refusal.message) + 1}]"
