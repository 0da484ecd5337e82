"""``train:`` x model -> the parameters of the base that are trained beside dW, or every reason why some cannot be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate

from tensorpeft.language.errors import Problem, SpecError, did_you_mean, listing
from tensorpeft.language.keywords import TRAINABLE
from tensorpeft.language.spec import Spec
from tensorpeft.model.shape import ModelShape, Parameter, Site
from tensorpeft.model.target import is_glob

BIASES, NORMS, HEAD = TRAINABLE


def extras(spec: Spec, model: ModelShape, sites: Iterable[Site]) -> tuple[Parameter, ...]:
    """The parameters that ``train:`` means on a model, in the model's order.

    ``biases`` are those of the modules that hold the weights of the target, ``norms`` and ``head`` what the model says
    they are. Every other entry is the dotted ending of a parameter's path, or of a module's, which then means all of its
    parameters; or a glob over both.

    Raises:
        SpecError: with every entry that means no parameter, or one that is the weight of a site too.
    """
    sites = tuple(sites)
    holders, adapted = {_holder(site) for site in sites}, {site.path: site for site in reversed(sites)}
    problems: list[Problem] = []
    chosen: set[str] = set()
    for entry, span in zip(spec.train, spec.train_spans or (spec.span,) * len(spec.train), strict=True):
        found = [parameter for parameter in model.parameters if _means(entry, parameter, holders)]
        chosen.update(parameter.path for parameter in found)
        twice = next(((p, adapted[path]) for p in found for path in p.weights if path in adapted), None)
        if not found:
            problems.append(Problem(_nothing(entry, model, holders), span))
        elif twice:
            message = f"`{entry}` trains `{twice[0].path}`, the weight of {twice[1]}, which `target` adapts"
            problems.append(Problem(f"{message}; expected it under `train` or under `target` alone", span))
    if problems:
        raise SpecError(problems)
    return tuple(parameter for parameter in model.parameters if parameter.path in chosen)


def _holder(site: Site) -> str:
    """The path of the module whose parameter a site's weight is."""
    return f"{site.module}.{site.parameter or 'weight'}".rpartition(".")[0].removeprefix(".")


def _means(entry: str, parameter: Parameter, holders: set[str]) -> bool:
    if entry in TRAINABLE:
        return entry in parameter.kinds and (entry != BIASES or parameter.path.rpartition(".")[0] in holders)
    paths = [f".{path}" for path in accumulate(parameter.path.split("."), "{}.{}".format)]
    if is_glob(entry):
        return any(fnmatchcase(path, f"*.{entry.removeprefix('*.')}") for path in paths)
    return any(path.endswith(f".{entry}") for path in paths)


def _nothing(entry: str, model: ModelShape, holders: set[str]) -> str:
    if entry == BIASES:
        return f"`{BIASES}` means nothing here: no module of the target has a bias"
    if entry in TRAINABLE:
        missing = "normalisation layer with parameters" if entry == NORMS else "layer that is known to be its head"
        return f"`{entry}` means nothing here: {model.name} has no {missing}"
    names = {*TRAINABLE, *_endings(model.parameters)}
    is_card = any(NORMS in parameter.kinds and parameter.path.startswith("norms.") for parameter in model.parameters)
    known = ", as far as its config tells" if is_card else ""
    hint = did_you_mean(entry, names) or f"; expected {listing(TRAINABLE)}, or the ending of a parameter's path"
    return f"`{entry}` is no parameter of {model.name}{known}{hint}"


def _endings(parameters: Sequence[Parameter]) -> set[str]:
    """The names that people use for parameters, to suggest one: the last one to three of their paths and their modules' paths."""
    parts = [parameter.path.split(".") for parameter in parameters]
    return {".".join(path[-n:]) for whole in parts for path in (whole, whole[:-1]) for n in (1, 2, 3) if path}
