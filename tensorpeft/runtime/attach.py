"""Programs and a model -> an attached adapter: whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from tensorpeft.checkpoint.compatibility import stored_name
from tensorpeft.language.errors import AdapterError
from tensorpeft.network.network import Network
from tensorpeft.runtime.adapter import Adapter
from tensorpeft.runtime.attachment import install, remove
from tensorpeft.runtime.data_init import fill_from_weights
from tensorpeft.runtime.hooks import PREFIX
from tensorpeft.runtime.program_cache import Programs
from tensorpeft.runtime.whole import at_exit


def attach_programs(
    model: nn.Module,
    programs: Programs,
    name: str | None = None,
    values: Mapping[str, Tensor] | None = None,
) -> Adapter:
    """Build the adapter of some programs and attach it: all of it, or on an error nothing.

    The factors live on the device of the base's weights, in their dtype, or in float32 where theirs has fewer bits or they
    are quantised. Where ``values`` are given, one for each block and for each parameter of the base that is trained, they start
    from those, the factors in their dtype.

    Raises:
        AdapterError: the model has something of that name already, the name is no identifier, ``values`` are given for a model
            on the meta device, or a module is none that an update can be added to.
        SpecError: a factor's name cannot be that of a parameter.
    """
    plan = programs.plan
    name = plan.network.spec.name.replace("-", "_") if name is None else name
    if not isinstance(name, str) or not name.isidentifier():
        raise AdapterError(f"the adapter name `{name}` is not a Python identifier; give another with `name=`")
    if hasattr(model, PREFIX + name):
        raise AdapterError(f"the model already has an adapter `{name}`; give this one another name with `name=`")
    if torch.is_inference_mode_enabled():
        raise AdapterError("attach found inference mode, in which no factor can be trained; attach outside of it")
    weight = _first_weight(model, plan.network)
    floating = weight.is_floating_point() and weight.dtype.itemsize >= 4
    adapter = Adapter(programs, name, weight.dtype if floating else torch.float32, weight.device)
    adapter.engine.prepare(weight.dtype.itemsize)
    adapter.engine.place()
    if values is None:
        adapter.reset_parameters()
    else:
        adapter.factors.put({block.name: values[block.name] for block in plan.network.blocks})
    state, done = adapter.state, False

    def take_back() -> None:
        if not done:
            remove(state)

    with at_exit(take_back):
        state.model = model
        if values is None:
            fill_from_weights(state)
            adapter.engine.magnitudes.fill()
        adapter.train(model.training)
        install(adapter.engine, adapter, model, _of_base(values or {}))
        done = True
    return adapter


def _of_base(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of parameters and buffers of the base, by their paths."""
    prefix = stored_name("")
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _first_weight(model: nn.Module, network: Network) -> Tensor:
    """The weight of the first site, or where there is none, the first parameter that is trained of the base."""
    if not network.sites:
        return model.get_parameter(network.extras[0].path)
    site = network.sites[0]
    weight: Any = attrgetter(site.parameter or "weight")(model.get_submodule(site.module))
    return weight
