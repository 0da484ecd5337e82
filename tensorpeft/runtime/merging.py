"""dW as a dense matrix, and its addition to the base weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from tensorpeft.language.errors import AdapterError, did_you_mean
from tensorpeft.network.network import Group, Term
from tensorpeft.network.shapes import Site
from tensorpeft.planning.plan import Link, Plan, dense_plan
from tensorpeft.runtime.emit import emit
from tensorpeft.runtime.hooks import adapters
from tensorpeft.runtime.site_code import built_program
from tensorpeft.runtime.weights import base_weight, held_weight

if TYPE_CHECKING:
    from tensorpeft.runtime.adapter import Adapter


@dataclass(frozen=True)
class Merged:
    """What a merge replaced: the base weights' own values, by module. ``order`` counts the model's merges."""

    task: int | None
    order: int
    weights: dict[str, Tensor]


@torch.no_grad()
def delta(adapter: Adapter, module: str, task: int | None) -> Tensor:  # shape: (d_out, d_in)
    """The update dW of a module, gathered from the sites that lie in it."""
    places = [
        (group, n) for group in adapter.network.groups for n, site in enumerate(group.sites) if site.module == module
    ]
    if not places:
        paths = [site.module for site in adapter.sites]
        hint = did_you_mean(module, paths) or f"; one that has is `{paths[0]}`"
        raise AdapterError(f"adapter `{adapter.name}` has no site at `{module}`{hint}")
    _check_task(adapter, task)
    first = places[0][0].sites[places[0][1]]
    like = adapter.factors[adapter.network.blocks[0].name]
    dense = torch.zeros(first.module_d_out, first.d_in, dtype=like.dtype, device=like.device)
    for group, number in places:
        site = group.sites[number]
        for term, update in zip(group.terms, _compact(adapter, group, number, task), strict=True):
            rows, columns = _positions(term, site, like.device)
            dense[rows[:, None], columns] += update.to(dense.dtype)
    return dense


def _check_task(adapter: Adapter, task: int | None) -> None:
    n_tasks = adapter.spec.tasks
    if n_tasks is None and task is not None:
        raise AdapterError(f"adapter `{adapter.name}` has no task mode, found task {task}")
    if n_tasks is not None and (task is None or not 0 <= task < n_tasks):
        raise AdapterError(
            f"adapter `{adapter.name}` has {n_tasks} tasks, found task {task}, expected 0 to {n_tasks - 1}"
        )


def _compact(adapter: Adapter, group: Group, number: int, task: int | None) -> list[Tensor]:
    """Of each product at one site, (rows kept, columns kept): the prologue of a plan that has this site alone."""
    terms = tuple(
        replace(t, operands=tuple(replace(o, keys=(o.keys[number],)) for o in t.operands)) for t in group.terms
    )
    site = group.sites[number]
    plan = dense_plan(replace(group, sites=(site,), terms=terms))
    code = emit(Plan(adapter.network, adapter.plan.regime, (plan,)))
    factors = [adapter.factors[name] for name in code.inputs]
    stacks = code.prologue.forward(factors[0].dtype, *factors)
    pieces = iter([stacks[piece.stack][piece.row] for piece in code.calls[0].pieces])
    updates = []
    for term, chain in zip(terms, plan.chains, strict=True):
        link = chain.links[0]
        dense = _built(adapter, site, term, link, pieces, factors[0]) if link.at_site else next(pieces)
        if "task" in link.batch:
            dense = dense[task]
        updates.append(dense.t() * (chain.sign * group.scale))  # a link is (d_in, d_out)
    return updates


def _built(
    adapter: Adapter, site: Site, term: Term, link: Link, pieces: Iterator[Tensor], like: Tensor
) -> Tensor:  # shape: (d_in, d_out)
    """A product that has the base weight in it."""
    if adapter.attachment is None:
        raise AdapterError(f"adapter `{adapter.name}` is not attached to a model, so there is no `W`")
    weight = base_weight(adapter, adapter.attachment.model.get_submodule(site.module), site)
    own = [next(pieces) for i in link.operands if not term.operands[i].is_base]
    dense = built_program(term, link).forward(weight.to(like), *own)
    return dense.reshape(*dense.shape[: len(link.batch)], term.size(term.d_in), term.size(term.d_out))


def _positions(term: Term, site: Site, device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows and columns of the module's weight that a product covers at a site."""
    rows = site.row_indices() if term.rows is None else site.row_indices()[term.rows]
    columns = np.arange(site.d_in) if term.columns is None else term.columns
    return torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)


@torch.no_grad()
def merge(adapter: Adapter, task: int | None) -> Merged:
    """Replace W by W + dW, computed in the wider of the two dtypes, in every module that has a site."""
    if adapter.attachment is None:
        raise AdapterError(f"adapter `{adapter.name}` is not attached to a model")
    if adapter.merged is not None:
        raise AdapterError(f"adapter `{adapter.name}` is already merged")
    _check_task(adapter, task)
    others = _merged_adapters(adapter)
    saved = Merged(task, 1 + max((m.order for _, m in others), default=0), {})
    try:
        for path in dict.fromkeys(site.module for site in adapter.sites):
            weight, transposed = _weight(adapter, path)
            change = delta(adapter, path, task).to(weight.device)
            if not change.isfinite().all():
                raise AdapterError(f"the update of `{path}` has values that are not finite; nothing was merged")
            saved.weights[path] = weight.clone()
            wide = torch.promote_types(weight.dtype, change.dtype)
            weight.copy_(weight.to(wide) + (change.t() if transposed else change).to(wide))
    except BaseException:
        _restore(adapter, saved)
        raise
    return saved


@torch.no_grad()
def unmerge(adapter: Adapter) -> None:
    """Give the base weights back the values that a merge replaced."""
    if adapter.merged is None:
        raise AdapterError(f"adapter `{adapter.name}` is not merged")
    later = [other.name for other, merged in _merged_adapters(adapter) if merged.order > adapter.merged.order]
    if later:
        raise AdapterError(f"unmerge `{later[-1]}` before `{adapter.name}`: it was merged after it")
    _restore(adapter, adapter.merged)


def _restore(adapter: Adapter, merged: Merged) -> None:
    for path, values in merged.weights.items():
        _weight(adapter, path)[0].copy_(values)


def _merged_adapters(adapter: Adapter) -> list[tuple[Adapter, Merged]]:
    assert adapter.attachment is not None
    found = ((other, other.merged) for other in adapters(adapter.attachment.model) if other is not adapter)
    return [(other, merged) for other, merged in found if merged is not None]


def _weight(adapter: Adapter, path: str) -> tuple[nn.Parameter, bool]:
    assert adapter.attachment is not None
    module = adapter.attachment.model.get_submodule(path)
    held = held_weight(module)
    if held is None:
        raise AdapterError(
            f"the weight of `{path}` ({type(module).__name__}) is no plain matrix of numbers, so nothing can be merged into it"
        )
    return held
