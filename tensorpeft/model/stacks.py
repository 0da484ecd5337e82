"""Stacks of layers: each has a network of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable

from tensorpeft.model.shape import Site, distinct


def by_stack(sites: Iterable[Site]) -> dict[str, tuple[Site, ...]]:
    """Sites by the name of their stack, which is what its path has for itself: ``encoder``, ``decoder``.

    Where there is one stack alone, all sites are its, also those outside the layers, and it needs no name.
    """
    sites = tuple(sites)
    stacks = dict.fromkeys(site.stack for site in sites)
    paths = [stack for stack in stacks if stack is not None]
    if len(paths) < 2:
        return {"": sites}
    names: dict[str | None, str] = {path: re.sub(r"\W", "_", name) for path, name in distinct(paths).items()}
    return {names.get(stack, ""): tuple(site for site in sites if site.stack == stack) for stack in stacks}
