"""The catalogue: the methods and the model cards that ship, as a value.

What is told of a method comes from its file: the comment on top and the update. What it trains is counted on one model.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path

from tensorpeft.language.errors import SpecError
from tensorpeft.language.loader import load_spec
from tensorpeft.language.shipped import method_paths
from tensorpeft.language.spec import Spec
from tensorpeft.model.cards import cards, model_shape
from tensorpeft.model.shape import ModelShape
from tensorpeft.model.target import choose
from tensorpeft.model.trained import extras
from tensorpeft.network.budget import n_trained
from tensorpeft.network.lower import lower
from tensorpeft.reporting.page import Page
from tensorpeft.reporting.table import Table

COUNTED_ON = "llama-2-7b"

# The comment on top of a spec is `Title: what it is.`, and a line that begins `Someone, "Its title", 2021, arXiv:2106.09685`.
_HEADLINE = re.compile(r"(?P<title>[^:.]+): (?P<what>.+?\.)(?:\s|$)", re.DOTALL)
_PAPER = re.compile(
    r'^(?:(?P<authors>[^"\n]+), )?"(?P<title>[^"]+)",[^"]{0,80}?(?P<year>(?:19|20)\d\d)\b(?:, (?P<arxiv>arXiv:\d{4}\.\d{4,5}))?',
    re.MULTILINE,
)


@dataclass(frozen=True)
class Paper:
    """Where a method was published; what its file does not tell is empty."""

    authors: str = ""
    title: str = ""
    year: str = ""
    arxiv: str = ""

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.authors, self.year, self.arxiv)))


@dataclass(frozen=True)
class Method:
    """A shipped spec as it stands. ``trainable`` is None, and ``refused`` says why, where it does not fit the model."""

    name: str
    title: str
    what: str
    paper: Paper
    update: str
    targets: tuple[str, ...]
    trained: tuple[str, ...]  # the factors, and what `train:` names of the base
    trainable: int | None  # numbers of factors
    extra: int | None  # numbers of the base
    refused: str | None


@dataclass(frozen=True)
class Card:
    """A shipped model card."""

    name: str
    family: str
    layers: int
    width: int
    heads: int
    parameters: int


@dataclass(frozen=True)
class Catalogue(Page):
    """All that ships."""

    model: str  # on which the methods are counted
    methods: tuple[Method, ...]
    cards: tuple[Card, ...]

    @property
    def title(self) -> str:
        return "Methods (SPEC) and model cards (--model)"

    @property
    def tables(self) -> tuple[Table, ...]:
        counted = f"trained on {self.model}"
        methods = tuple(
            (
                m.name,
                "-" if m.trainable is None else m.trainable,
                m.extra or "",
                ", ".join(m.trained),
                m.what,
                str(m.paper),
            )
            for m in self.methods
        )
        refused = tuple((m.name, m.refused.partition("\n")[0]) for m in self.methods if m.refused is not None)
        headers = ("model", "family", "layers", "width", "heads", "parameters")
        return (
            Table(("method", counted, "of the base", "trained", "what it is", "paper"), methods),
            *([Table(("does not fit", "because"), refused)] if refused else []),
            Table(headers, tuple(tuple(asdict(card).values()) for card in self.cards)),
        )

    def to_data(self) -> dict[str, object]:
        return asdict(self)


def catalogue(model: str = COUNTED_ON) -> Catalogue:
    """Everything that ships; what the methods train is counted on a model, with the ranks of their files."""
    shape = model_shape(model)
    methods = tuple(_method(name, path, shape) for name, path in method_paths().items())
    return Catalogue(model, methods, tuple(map(_card, cards())))


def _method(name: str, path: Path, shape: ModelShape) -> Method:
    spec, told = load_spec(name), described(path.read_text(encoding="utf-8"))
    count, extra, refused = None, None, None
    try:
        beside = extras(spec, shape, choose(spec.target, shape)) if spec.train else ()
        count, extra = _trained(spec, shape), sum(parameter.count for parameter in beside)
    except SpecError as refusal:
        refused = str(refusal)
    trained = (*(factor for factor, rule in spec.factors if not rule.frozen), *spec.train)
    return Method(name, *told, str(spec.update), spec.target.matrices, trained, count, extra, refused)


def _trained(spec: Spec, shape: ModelShape) -> int:
    """The numbers of trained factors; the network is built only where its masks need the scores of a file."""
    if spec.scores is None:
        return n_trained(spec, shape)
    return sum(block.count for block in lower(spec, shape).blocks if block.trainable)


def described(text: str) -> tuple[str, str, Paper]:
    r"""Title, what it is, and paper of a method, from the comment on top of its file; empty where they are not told.

    >>> described('# LoRA: two factors. The first.\n# Hu et al., "LoRA", 2021, arXiv:2106.09685.\nname: lora')
    ('LoRA', 'two factors.', Paper(authors='Hu et al.', title='LoRA', year='2021', arxiv='arXiv:2106.09685'))
    """
    comment = "\n".join(
        line.removeprefix("#").strip() for line in takewhile(lambda line: line.startswith("#"), text.splitlines())
    )
    headline, paper = _HEADLINE.match(comment), _PAPER.search(comment)
    title, what = map(_line, headline.group("title", "what")) if headline else ("", _line(comment))
    found = paper.groupdict(default="") if paper else {}
    return title, what, Paper(**{key: _line(value) for key, value in found.items()})


def _line(text: str) -> str:
    return " ".join(text.split())


def _card(name: str) -> Card:
    shape = model_shape(name)
    sizes = dict(shape.sizes)
    return Card(name, shape.family or "", sizes["layers"], sizes["width"], sizes["heads"], shape.n_parameters)
