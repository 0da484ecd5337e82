"""The command line: one function per command.

Exit codes: 0 done, 2 the user's input is wrong, 1 anything else.

Each command imports what it needs where it needs it, since most of the time that a command takes is spent on imports: `--help`
loads click alone, `check` the language, `report` what counts; torch is left to `explain`, which shows code.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from errno import EPIPE
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from tensorpeft import __version__
from tensorpeft.checkpoint.whole import write_whole
from tensorpeft.language.errors import SpecError, TensorpeftError

if TYPE_CHECKING:
    from tensorpeft.model.shape import ModelShape
    from tensorpeft.network.network import Network
    from tensorpeft.planning.plan import Plan
    from tensorpeft.reporting.page import Listing, Page

_FORMATS = ("text", "json", "md", "html")

Command = Callable[..., None]
T = TypeVar("T")


class _Commands(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Tell an error without a traceback: exit code 2 for what this library refuses, 1 for the system's (a full disk)."""
        try:
            return super().invoke(ctx)
        except TensorpeftError as refusal:
            click.echo(refusal, err=True)
            ctx.exit(2)
        except OSError as reason:
            if reason.errno == EPIPE:  # click knows what to do
                raise
            raise click.ClickException(reason.strerror or str(reason)) from None


def _budgets(ctx: click.Context, param: click.Parameter, given: str | None) -> tuple[int, ...]:
    """``20k,2.5M`` -> (20000, 2500000)."""
    return tuple(_budget(one.strip()) for one in given.split(",")) if given is not None else ()


def _budget(given: str) -> int:
    from tensorpeft.language.nodes import literal
    from tensorpeft.language.reader import parse_budget

    try:
        return parse_budget(literal(given))
    except SpecError:
        raise click.BadParameter(f"{given!r} is not a number of parameters, such as 20000, 20k or 2.5M.") from None


_specs = click.argument("specs", metavar="SPEC...", nargs=-1, required=True)
_spec = click.argument("spec", metavar="SPEC")
_model = click.option("--model", metavar="M", required=True, help="A model card's name, or a config.json.")
_set = click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="Set a key of the spec over its text: rank=4, matrices=[query, key]. Values with commas between them give a row each.",
)


def _with_output(*more: str) -> Callable[[Command], Command]:
    """`--format` and `-o`; without the first, the ending of the file says the format."""

    def decorate(command: Command) -> Command:
        to_file = click.option(
            "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), is_eager=True, help="Write to a file."
        )
        formats = click.Choice([*_FORMATS, *more])
        told = "By default what the ending of the file says, else text."
        return click.option("--format", "form", type=formats, callback=_form, help=told)(to_file(command))

    return decorate


def _form(ctx: click.Context, param: click.Parameter, given: str | None) -> str:
    """The format that is asked for, by name or by the file's ending."""
    ending = Path(ctx.params.get("output") or "").suffix.removeprefix(".")
    assert isinstance(param.type, click.Choice)
    return given or (ending if ending in param.type.choices else _FORMATS[0])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="tensorpeft")
def main() -> None:
    """Adapters as tensor networks: check, expand and cost a spec. A SPEC is a name of the catalogue or a YAML file."""


@main.command()
@_specs
@click.option("--format", "form", type=click.Choice(_FORMATS[:2]), default=_FORMATS[0], show_default=True)
def check(specs: Sequence[str], form: str) -> None:
    """Tell everything that is wrong with the specs.

    As JSON: for each spec whether it is right, and every problem with its place.
    """
    refusals = {spec: _refusal(spec) for spec in specs}
    if form == "json":
        click.echo(json.dumps([_as_data(spec, refusal) for spec, refusal in refusals.items()], indent=2))
    for spec, refusal in refusals.items() if form == "text" else ():
        click.echo(f"{spec}: ok" if refusal is None else refusal, err=refusal is not None)
    sys.exit(2 if any(refusals.values()) else 0)


def _refusal(spec: str) -> SpecError | None:
    from tensorpeft.language.loader import load_spec

    try:
        load_spec(spec)
    except SpecError as refusal:
        return refusal
    return None


def _as_data(spec: str, refusal: SpecError | None) -> dict[str, object]:
    problems = []
    for problem in refusal.problems if refusal else ():
        line, column = problem.span.position if problem.span else (None, None)
        place = {"source": problem.span.source.name if problem.span else None, "line": line, "column": column}
        problems.append({"message": problem.message, **place})
    return {"spec": spec, "ok": refusal is None, "problems": problems}


@main.command()
@_spec
def expand(spec: str) -> None:
    """Print a spec written out.

    A shorthand becomes the update that it stands for; every default is told.
    """
    from tensorpeft.language.loader import load_spec

    click.echo(str(load_spec(spec)), nl=False)


@main.command()
@_specs
@_model
@_set
@_with_output()
def report(specs: Sequence[str], model: str, settings: Sequence[str], form: str, output: Path | None) -> None:
    """Count what specs cost on a model.

    One spec gives its whole report; several specs, or several values, a table with a row each.
    """
    from tensorpeft.pipeline import shape_of
    from tensorpeft.reporting.comparison import Comparison, row
    from tensorpeft.reporting.counting import report_of

    shape = shape_of(model)
    given = list(product(specs, _choices(settings)))
    if len(given) == 1:
        plan = _planned(specs[0], given[0][1], shape)
        _deliver(report_of(plan), form, output, plan.network)
    else:
        _deliver(Comparison(tuple(row(spec, chosen, shape) for spec, chosen in _watched(given))), form, output)


@main.command()
@click.argument("specs", metavar="[SPEC...]", nargs=-1)
@_model
@_set
@click.option(
    "--budget",
    "budgets",
    metavar="N,...",
    callback=_budgets,
    help="How many trained numbers to allow: 20000, 20k, 2.5M.",
)
@_with_output()
def sweep(
    specs: Sequence[str], model: str, settings: Sequence[str], budgets: Sequence[int], form: str, output: Path | None
) -> None:
    """Compare specs over settings or budgets; without a SPEC, all methods of the catalogue.

    A budget stands for the largest rank that trains at most so many numbers. What does not fit the model or the budget is
    listed with the reason.
    """
    if not settings and not budgets:
        raise click.UsageError("Give --set or --budget.")
    if budgets and any(setting.partition("=")[0].partition(".")[0] == "rank" for setting in settings):
        raise click.UsageError("--budget finds the rank; leave it out of --set.")
    from tensorpeft.language.shipped import method_paths
    from tensorpeft.pipeline import shape_of
    from tensorpeft.reporting.comparison import cases
    from tensorpeft.reporting.comparison import sweep as swept

    given = cases(specs or tuple(method_paths()), _choices(settings), budgets)
    found = swept(_watched(given), shape_of(model))
    if not found.rows:
        for refused in found.refused:
            click.echo(f"{refused.name}: {refused.reason}", err=True)
        sys.exit(2)
    _deliver(found, form, output)


@main.command()
@_with_output()
def catalogue(form: str, output: Path | None) -> None:
    """List the methods and the model cards that ship."""
    from tensorpeft.reporting.catalogue import catalogue

    _deliver(catalogue(), form, output)


@main.command()
@_spec
@_model
@_set
@_with_output("svg")
def explain(spec: str, model: str, settings: Sequence[str], form: str, output: Path | None) -> None:
    """Show a spec's network, its contraction step by step, and its code.

    As text, JSON, Markdown or HTML; the network alone as a picture: `-o FILE.svg`.
    """
    from tensorpeft.pipeline import shape_of
    from tensorpeft.reporting.explanation import explanation

    plan = _planned(spec, settings, shape_of(model))
    code = _code(plan) if form != "svg" else ()
    _deliver(explanation(plan, code), form, output, plan.network)


def _planned(spec: str, settings: Iterable[str], shape: ModelShape) -> Plan:
    """The plan of a spec with some of its keys set."""
    from tensorpeft.language.loader import load_spec
    from tensorpeft.language.overrides import parse_override
    from tensorpeft.pipeline import front

    return front(load_spec(spec, *map(parse_override, settings)), shape)


def _code(plan: Plan) -> tuple[Listing, ...]:
    """The emitted functions: the prologue, and those of every kind of input set; none without torch."""
    try:
        import torch  # noqa: F401
    except ImportError:
        click.echo("torch is not installed, so there is no code to show", err=True)
        return ()
    from tensorpeft.emission.emit import emit
    from tensorpeft.reporting.page import Listing

    return tuple(Listing(title, code) for title, code in emit(plan).listings())


def _watched(given: Iterable[T]) -> Iterable[T]:
    """With a progress bar, on a terminal."""
    from tqdm import tqdm

    watched: Iterable[T] = tqdm(given, disable=None, leave=False, unit="row")
    return watched


def _choices(settings: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """``rank=1,4`` and ``alpha=8`` -> (``rank=1``, ``alpha=8``), (``rank=4``, ``alpha=8``)."""
    return product(*map(_alternatives, settings))


def _alternatives(setting: str) -> list[str]:
    """A setting for each of its values; commas inside brackets part nothing."""
    key, equals, values = setting.partition("=")
    depth, found = 0, [""]
    for character in values:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            found.append("")
        else:
            found[-1] += character
    return [f"{key}{equals}{value}" for value in found]


def _deliver(page: Page, form: str, output: Path | None, network: Network | None = None) -> None:
    """Print or write a page; the picture of the network goes into HTML, or is all that there is."""
    shown = _rendered(page, form, network)
    if output is None or str(output) == "-":
        click.echo(shown, nl=False)
        return
    path = output.resolve()
    try:
        if path.exists() and not path.is_file():  # a pipe, a terminal: written to as it is
            path.write_text(shown, encoding="utf-8")
        else:
            write_whole(path, shown.encode())
    except OSError as reason:
        raise click.FileError(str(output), reason.strerror) from None


def _rendered(page: Page, form: str, network: Network | None) -> str:
    if form not in ("svg", "html") or network is None:
        return {"text": page.to_text, "json": page.to_json, "md": page.to_markdown, "html": page.to_html}[form]()
    from tensorpeft.reporting.drawing import drawing

    return drawing(network) if form == "svg" else page.to_html(drawing(network))
