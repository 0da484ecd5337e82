"""Is a spec sound by itself? What can be said before any model is known, every problem at its place.

In: a spec as read, and the table it was read from. Out: findings. Non-goals: sizes, and whether the target matches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from tensorpeft.language.checks import bond_sizes as sizes
from tensorpeft.language.checks import factor_rules as factors
from tensorpeft.language.checks import mask_rules as masks
from tensorpeft.language.checks import mode_definitions as modes
from tensorpeft.language.checks import update
from tensorpeft.language.diagnostics import Findings
from tensorpeft.language.errors import Problem
from tensorpeft.language.nodes import MappingNode
from tensorpeft.language.spec import Spec
from tensorpeft.language.syntax import Update

Check = Callable[[Spec, MappingNode], Iterator[Problem]]

# (check, the key its problems belong to, the keys that must be whole for it to mean anything)
_CHECKS: tuple[tuple[Check, str, tuple[str, ...]], ...] = (
    (modes.definitions, "modes", ()),
    (modes.references, "update", ("share",)),
    (modes.known_modes, "update", ("modes", "share")),
    (modes.used_bonds, "rank", ("modes", "update", "share")),
    (modes.ragged, "ragged", ("modes", "update", "share")),
    (update.tasks, "tasks", ("tasks", "update", "share")),
    (sizes.rank_expressions, "rank", ("modes",)),
    (sizes.part_sizes, "modes", ("rank",)),
    (factors.initialisers, "factors", ("share", "modes")),
    (factors.stored_factors, "factors", ("frozen", "factors")),
    (factors.magnitudes, "factors", ("factors", "mask", "ragged", "tasks")),
    (masks.masks, "mask", ("share", "modes")),
    (masks.scores, "scores", ("scores", "mask")),
    (sizes.scale, "scale", ("alpha", "rank")),
    (sizes.used_alpha, "alpha", ("alpha", "scale", "rank")),
    (factors.patterns, "target", ()),
    (factors.dropout, "dropout", ("update", "rank")),
    (factors.trained, "frozen", ("factors", "frozen", "train")),
    (factors.start, "start", ("start", "factors", "frozen")),
)
# of each product by itself, wherever nothing else is wrong with it
_OF_PRODUCTS = (update.contracted_bonds, update.open_sides, update.connected)


def check_spec(spec: Spec, table: MappingNode, findings: Findings) -> None:
    """Add what is wrong with a spec that could be read; what depends on a spoiled key is not judged."""
    for check, key, needed in _CHECKS:
        if not findings.spoiled & {*needed}:
            findings.extend(key, check(spec, table))
    if not findings.spoiled & {"modes", "share"}:
        whole = tuple(product for product in spec.update.products if not findings.within(product.span))
        untouched = replace(spec, update=Update(whole))
        for check in _OF_PRODUCTS:
            findings.extend("update", check(untouched, table))
