"""A plan and a model -> an attached adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tensorpeft.language.errors import AdapterError
from tensorpeft.planning.plan import Plan
from tensorpeft.runtime.adapter import Adapter
from tensorpeft.runtime.hooks import PREFIX, Attachment


def attach_plan(
    model: nn.Module, plan: Plan, name: str | None = None, values: Mapping[str, Tensor] | None = None
) -> Adapter:
    """Build the adapter of a plan and attach it: all of it, or on an error nothing.

    The factors live on the device of the base's weights, in their dtype, or in float32 where theirs has fewer bits or they
    are quantised. Where ``values`` are given, one for each block, the factors are those, in the dtype of those.

    Raises:
        AdapterError: the model has something of that name already, the name is no identifier, or ``values`` are given
            for a model on the meta device.
        SpecError: a factor's name cannot be that of a parameter.
    """
    name = plan.network.spec.name.replace("-", "_") if name is None else name
    if not name.isidentifier():
        raise AdapterError(f"the adapter name `{name}` is not a Python identifier; give another with `name=`")
    if hasattr(model, PREFIX + name):
        raise AdapterError(f"the model already has an adapter `{name}`; give this one another name with `name=`")
    for site in plan.network.sites:
        if site.kind != "linear":
            raise AdapterError(f"{site} is no linear module, and an update of a {site.kind} is not supported yet")
    weight: Any = model.get_submodule(plan.network.sites[0].module).weight
    floating = weight.is_floating_point() and weight.dtype.itemsize >= 4
    adapter = Adapter(plan, name, weight.dtype if floating else torch.float32, weight.device)
    if values is not None:
        adapter.factors.put(values)
    adapter.attachment = Attachment(model, adapter)
    adapter.train(model.training)
    adapter.attachment.install()
    return adapter
