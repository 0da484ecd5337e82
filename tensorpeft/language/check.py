"""Is a spec sound by itself? What can be said before any model is known, every problem at its place.

In: a spec as read, and the table it was read from. Out: findings. Non-goals: sizes, and whether the target matches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tensorpeft.language import check_update as update
from tensorpeft.language import check_values as values
from tensorpeft.language.errors import Problem
from tensorpeft.language.findings import Findings
from tensorpeft.language.nodes import Table
from tensorpeft.language.spec import Spec

Check = Callable[[Spec, Table], Iterator[Problem]]

# (check, the key its problems belong to, the keys besides it that must be whole for it to mean anything)
_CHECKS: tuple[tuple[Check, str, tuple[str, ...]], ...] = (
    (update.definitions, "modes", ()),
    (update.references, "update", ("share",)),
    (update.known_modes, "update", ("modes", "share")),
    (update.contracted_bonds, "update", ("modes", "share")),
    (update.used_bonds, "rank", ("modes", "update", "share")),
    (update.open_sides, "update", ("modes", "share")),
    (update.connected, "update", ("modes", "share")),
    (update.tasks, "tasks", ("update", "share")),
    (values.rank_expressions, "rank", ("modes",)),
    (values.part_sizes, "modes", ("rank",)),
    (values.initialisers, "factors", ("share",)),
    (values.stored_factors, "factors", ("frozen",)),
    (values.masks, "mask", ("share", "modes")),
    (values.scale, "scale", ("alpha", "rank")),
    (values.used_alpha, "alpha", ("scale", "rank")),
    (values.patterns, "target", ()),
    (values.trained, "frozen", ("factors",)),
    (values.start, "start", ("factors", "frozen")),
)


def check_spec(spec: Spec, table: Table, findings: Findings) -> None:
    """Add what is wrong with a spec that could be read; what depends on a spoiled key is not judged."""
    for check, key, needed in _CHECKS:
        if not findings.spoiled & {key, *needed}:
            problems = list(check(spec, table))
            if problems:
                findings.extend(key, problems)
