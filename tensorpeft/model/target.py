"""Target x model -> the sites that an adapter covers, or every reason why it cannot."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase

from tensorpeft.language.errors import Problem, SpecError, did_you_mean, listing
from tensorpeft.language.source import Span
from tensorpeft.language.spec import Target
from tensorpeft.language.syntax import Selector, ranges
from tensorpeft.model.roles import PARTS, is_fused
from tensorpeft.model.shape import Key, ModelShape, Site
from tensorpeft.model.sites import in_order

ALL_LINEAR = "all-linear"


def choose(target: Target, shape: ModelShape) -> tuple[Site, ...]:
    """The sites that a target means on a model: matrix by matrix in the model's order, each by its layers.

    An entry of ``matrices`` or ``exclude`` is the name of a matrix (a role); where there is none of that name, the
    dotted ending of such a name or of a module's path. So in a model of several stacks ``query`` means every query,
    ``decoder.query`` those of one stack, ``cross.query`` those of the cross-attention. With ``*``, ``?`` or ``[`` it is
    a glob over both. With ``{layer}`` it is an ending that says which number of the path is the layer; ``{matrix}`` in
    it says which part names the matrix, where no family does. ``all-linear`` is every module inside the layers, or
    every module of a model without layers.
    ``layers`` restricts what is inside the layers, and nothing else.

    Raises:
        SpecError: with every entry that matches nothing, every exclusion that removes nothing, the layers that do not
            exist, each matrix that some layers lack or another stack may hide, ``all-linear`` where most linear modules are
            outside the layers, or nothing left at the end.
    """
    problems = list(_layer_problems(target, shape))
    wanted: dict[Key, Site] = {}
    for entry in target.matrices:
        found = match(entry, shape)
        problems += _entry_problems(entry, target, shape, found)
        for site in found:
            other = wanted.setdefault(site.key, site)
            if other.module != site.module:
                message = f"`{other.module}` and `{site.module}` would both be `{site.matrix}` of layer {site.layer}"
                problems.append(Problem(message, target.span(entry)))
    inside = [site for site in wanted.values() if _in_layers(site, target.layers)]
    gone: set[Key] = set()
    for entry in target.exclude:
        modules = {(site.module, site.rows) for site in match(entry, shape)}
        removed = {site.key for site in inside if (site.module, site.rows) in modules}
        gone |= removed
        if not removed:
            known = dict.fromkeys(site.matrix for site in inside)
            message = f"`{entry}` excludes nothing of {_named(known)}{did_you_mean(entry, known)}"
            problems.append(Problem(message, target.span(entry)))
    kept = [site for site in inside if site.key not in gone]
    if not kept and not problems:
        problems.append(Problem("the target excludes every matrix that it names", _first_span(target)))
    if problems:
        raise SpecError(problems)
    return in_order(kept, (site.matrix for site in shape.sites))


def match(entry: str, shape: ModelShape) -> tuple[Site, ...]:
    """The sites of one entry, in every layer; of alternatives (``down | fc2``) those of the first that has any."""
    if "|" in entry:
        alternatives = (match(alternative.strip(), shape) for alternative in entry.split("|"))
        return next(filter(None, alternatives), ())
    if entry == ALL_LINEAR:
        linear = tuple(site for site in shape.sites if site.is_linear)
        return tuple(site for site in linear if site.stack is not None) or linear
    if "{layer}" in entry or "{matrix}" in entry:
        return tuple(filter(None, (_bound(_pattern(entry), site, shape) for site in shape.sites)))
    if is_glob(entry):
        return tuple(site for site in shape.sites if _fits_glob(entry, site))
    exact = tuple(site for site in shape.sites if site.matrix == entry)
    named = exact or tuple(site for site in shape.sites if site.is_named(entry))
    return named or tuple(site for site in shape.sites if is_meant(entry, site))


def fits(selector: Selector, site: Site) -> bool:
    """Whether a selector speaks of a site. One of layers speaks of no site outside the layers."""
    if selector.layers is not None and (site.stack is None or site.layer not in selector.layers):
        return False
    return not selector.matrices or any(is_meant(name, site) for name in selector.matrices)


def is_meant(name: str, site: Site) -> bool:
    """Whether a name is that of a site's matrix, or the dotted ending of it or of the module's path, or a glob over both."""
    if is_glob(name):
        return _fits_glob(name, site)
    return site.is_named(name) or f".{site.path}".endswith(f".{name}")


def site_rows(sites: Iterable[Site]) -> tuple[tuple[str | int, ...], ...]:
    """Sites as rows of their names and sizes: (matrix, layer, d_out, d_in), and the expert where there are several."""
    return tuple((site.matrix, site.layer, site.d_out, site.d_in, *site.key[2:]) for site in sites)


def _pattern(entry: str) -> re.Pattern[str]:
    """``blocks.{layer}.{matrix}`` as an expression over the ending of a path."""
    text = re.escape(entry).replace(r"\{layer\}", r"(?P<layer>\d+)", 1).replace(r"\{matrix\}", r"(?P<matrix>.+)", 1)
    return re.compile(rf"(?:.*\.)?{text}")


def _bound(pattern: re.Pattern[str], site: Site, shape: ModelShape) -> Site | None:
    """The site with the layer and the matrix that a pattern reads from its path, if it fits."""
    found = pattern.fullmatch(site.path)
    if not found:
        return None
    named = found.groupdict()
    if "layer" not in named:
        return replace(site, matrix=named["matrix"]) if shape.family is None else site
    before, after = site.path[: found.start("layer")].rstrip("."), site.path[found.end("layer") :].strip(".")
    if "matrix" in named and shape.family is None:
        matrix = named["matrix"]
    elif before == site.stack:
        return site
    else:
        matrix = after or before
    return replace(site, layer=int(named["layer"]), stack=before, matrix=matrix)


def _layer_problems(target: Target, shape: ModelShape) -> Iterable[Problem]:
    known = {site.layer for site in shape.sites if site.stack is not None}
    if wrong := sorted(set(target.layers or ()) - known):
        missing = f"layer {wrong[0]} does" if len(wrong) == 1 else f"layers {ranges(wrong)} do"
        has = f"layers {ranges(known)}" if known else "no layers"
        yield Problem(f"{missing} not exist: {shape.name} has {has}", target.span(wrong[0]) or _first_span(target))


def _entry_problems(entry: str, target: Target, shape: ModelShape, found: tuple[Site, ...]) -> Iterable[Problem]:
    if not found:
        known = dict.fromkeys(site.matrix for site in shape.sites)
        names = {*known, *(site.module.rsplit(".", 1)[-1] for site in shape.sites)}
        hint = "".join(f"; it may be a part of `{name}`" for name in _hiding(entry, target, shape)[:1])
        message = f"`{entry}` matches nothing in {shape.name}, which has {_named(known)}"
        yield Problem(message + (hint or did_you_mean(entry, names)), target.span(entry))
    elif entry == ALL_LINEAR:
        if sum(site.is_linear for site in shape.sites) > 2 * len(found):
            others = dict.fromkeys(site.matrix for site in shape.sites if site.is_linear and site not in found)
            stacks = listing(dict.fromkeys(site.stack or "" for site in found))
            told = f"`{entry}` means what is inside the layers, which is {len(found)} in {stacks} here, and would leave out more"
            yield Problem(f"{told}: {listing(others, 4)}; name the matrices that are meant", target.span(entry))
    elif not _means_some(entry):
        for stack, layers in _lacking(found, target, shape).items():
            where = f"layer{'s' * (len(layers) > 1)} {ranges(layers)} of `{stack}`"
            ways = f"restrict `layers:` to those that have it, or write `*.{entry}` for all that there are"
            yield Problem(f"`{entry}` is missing in {where}; {ways}", target.span(entry))
        for name in _hiding(entry, target, shape, {site.stack for site in found})[:1]:
            told = f"`{entry}` may be a part of `{name}` too, and no table says which"
            yield Problem(f"{told}; write `*.{entry}` for all that are known", target.span(entry))


def _means_some(entry: str) -> bool:
    """Whether an entry is written so that it need not match in every layer: neither a role nor a plain ending."""
    return entry == ALL_LINEAR or is_glob(entry) or "{" in entry or any(map(str.isdecimal, entry.split(".")))


def is_glob(entry: str) -> bool:
    """Whether a name has one of the signs `*`, `?`, `[`."""
    return any(character in entry for character in "*?[")


def _fits_glob(entry: str, site: Site) -> bool:
    glob = f"*.{entry.removeprefix('*.')}"
    return fnmatchcase(f".{site.path}", glob) or fnmatchcase(f".{site.matrix}", glob)


def _lacking(found: Iterable[Site], target: Target, shape: ModelShape) -> dict[str, set[int]]:
    """For each stack of layers that was touched: the wanted layers in which nothing was found."""
    has, touched = defaultdict(set), defaultdict(set)
    for site in shape.sites:
        if site.stack is not None and _in_layers(site, target.layers):
            has[site.stack].add(site.layer)
    for site in found:
        if site.stack is not None:
            touched[site.stack].add(site.layer)
    return {stack: has[stack] - layers for stack, layers in touched.items() if has[stack] - layers}


def _hiding(entry: str, target: Target, shape: ModelShape, touched: Container[str | None] = ()) -> list[str]:
    """The matrices outside some stacks that may hold a role, one of query, key and value, together with others."""
    if entry not in PARTS:
        return []
    inside = (site for site in shape.sites if site.stack is not None and _in_layers(site, target.layers))
    return list(dict.fromkeys(s.matrix for s in inside if s.stack not in touched and is_fused(s.matrix)))


def _in_layers(site: Site, layers: tuple[int, ...] | None) -> bool:
    return layers is None or site.stack is None or site.layer in layers


def _first_span(target: Target) -> Span | None:
    return target.span(target.matrices[0]) if target.matrices else None


def _named(matrices: Iterable[str]) -> str:
    return listing(matrices) or "no linear modules"
