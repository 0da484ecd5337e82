"""Checks of what is said of the target and of training: patterns, dropout, what is trained beside the update."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tensorpeft.language import names
from tensorpeft.language.errors import Problem, did_you_mean, listing
from tensorpeft.language.nodes import MappingNode
from tensorpeft.language.spec import INPUT, Spec


def patterns(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """The braces of a pattern name the layer or the matrix."""
    for entry in (*spec.target.matrices, *spec.target.exclude):
        bare = re.sub(r"\{(layer|matrix)\}", "", entry)
        if "{" in bare or "}" in bare:
            span = spec.target.span(entry)
            yield Problem(f"`{entry}` has braces around something else; expected `{{layer}}` or `{{matrix}}`", span)


def dropout(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """`dropout` names the input of the sites, or bonds."""
    carried = names.carried(spec)
    bonds = [bond for bond in names.bonds(spec) if bond in carried]
    for name, _ in spec.dropout:
        span = table.place("dropout", name)
        if name == INPUT and INPUT in bonds:
            message = f"`{INPUT}` under `dropout` is the input of a site, and it is a bond here"
            yield Problem(f"{message}; expected another name for the bond", span)
        elif name == INPUT and not spec.update.products:
            yield Problem("there is no update whose input could be dropped; expected no `dropout`", span)
        elif name not in (INPUT, *bonds):
            hint = did_you_mean(name, bonds) or f"; expected one of {listing((INPUT, *bonds))}"
            yield Problem(f"`dropout` speaks of `{name}`, which is no bond{hint}", span)
