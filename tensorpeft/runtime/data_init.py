"""Fills the factors that start from the base weight: each weight is decomposed once, where it is."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from tensorpeft.language.errors import AdapterError
from tensorpeft.language.syntax import Spectral
from tensorpeft.model.shape import Key, Site
from tensorpeft.network.network import Block
from tensorpeft.network.spectral import Decomposition, signed, spectral_values
from tensorpeft.runtime.base_weight import base_weight
from tensorpeft.runtime.factors import key_views
from tensorpeft.runtime.state import State


@torch.no_grad()
def fill_from_weights(state: State) -> None:
    """Set every data-dependent block to its initial values, from the weights as they are before any merge.

    Raises:
        AdapterError: a weight is quantised, or has values that are not finite.
        SpecError: a power of the singular values is not finite.
    """
    assert state.model is not None
    blocks = [block for block in state.network.blocks if block.data_dependent]
    views = {
        block.name: dict(zip(block.keys, key_views(state.factors[block.name], block), strict=True)) for block in blocks
    }
    for site, uses in _uses(state).items():
        weight = base_weight(state, state.model.get_submodule(site.module), site)
        if weight.is_meta:
            return
        if not weight.isfinite().all():
            raise AdapterError(f"the weight of {site} has values that are not finite, so it has no decomposition")
        known: dict[str, Decomposition] = {}
        for (name, key), block in uses.items():
            assert isinstance(block.init, Spectral)
            kind = block.init.decomposition
            if kind not in known:
                known[kind] = _decomposition(weight, kind)
            values = torch.from_numpy(spectral_values(block, key, known[kind], site).copy())
            views[name][key].copy_(values)


def _uses(state: State) -> dict[Site, dict[tuple[str, Key], Block]]:
    """The data-dependent blocks of each site, by name and key."""
    found: dict[Site, dict[tuple[str, Key], Block]] = defaultdict(dict)
    for group in state.network.groups:
        for operand in (operand for term in group.terms for operand in term.operands if operand.block.data_dependent):
            for site, key in zip(group.sites, operand.keys, strict=True):
                found[site][operand.block.name, key] = operand.block
    return found


def _decomposition(weight: Tensor, kind: str) -> Decomposition:  # shape of the weight: (d_out, d_in)
    exact = weight.to(torch.float32 if weight.device.type == "mps" else torch.float64)
    if kind == "svd":
        u, s, vh = torch.linalg.svd(exact, full_matrices=False)
        left, values, right = u, s, vh.mT
    else:
        left, r = torch.linalg.qr(exact)
        values, right = torch.ones(left.shape[1]), r.mT
    return signed(*(part.double().cpu().numpy() for part in (left, values, right)))
