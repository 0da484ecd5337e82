"""The adapter that users hold: a module that owns the factors, over its state and the operations on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tensorpeft.language.errors import AdapterError
from tensorpeft.language.spec import Spec
from tensorpeft.model.shape import Site
from tensorpeft.network.network import Network
from tensorpeft.planning.plan import Plan
from tensorpeft.runtime import merging, saving
from tensorpeft.runtime.attachment import remove
from tensorpeft.runtime.data_init import fill_from_weights
from tensorpeft.runtime.engine import Engine
from tensorpeft.runtime.factors import Factors
from tensorpeft.runtime.program_cache import Programs
from tensorpeft.runtime.state import Merged, State
from tensorpeft.runtime.trained_base import TrainedBase
from tensorpeft.runtime.whole import at_exit


class Adapter(nn.Module):
    """The factors of a spec on a model, attached to the model's sites.

    It is a submodule of the model, which keeps its class, its names and its parameters. ``factors`` holds one
    parameter (or buffer, where frozen) per factor, or per size of a ragged one; ``trained_base`` the parameters of the model that
    are trained beside dW.

    Inputs of other lengths than the plan's, or without gradients, have plans of their own, but where a regime was given.
    """

    def __init__(self, programs: Programs, name: str, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        plan = programs.plan
        self.factors = Factors(plan.network, dtype, device)
        self.trained_base = TrainedBase(extra.path for extra in plan.network.extras)
        self.state = State(plan, name, self.factors, self.trained_base, adapts=programs.adapts)
        self.engine = Engine(self.state, programs)

    # What the adapter is

    @property
    def name(self) -> str:
        return self.state.name

    @property
    def plan(self) -> Plan:
        return self.state.plan

    @property
    def network(self) -> Network:
        return self.state.network

    @property
    def spec(self) -> Spec:
        return self.state.spec

    @property
    def model(self) -> nn.Module | None:
        """The model that it is attached to."""
        return self.state.model

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the update lands, in the order of the plan's groups."""
        return self.network.sites

    def extra_repr(self) -> str:
        trained = sum(parameter.numel() for parameter in self.parameters())
        times = Counter(site.matrix for site in self.sites)
        sites = ", ".join(f"{number} of {matrix}" for matrix, number in times.items())
        lines = (
            f"{self.name}: {self.spec.update}".removesuffix(": "),
            sites and f"sites: {sites}",
            f"trained: {trained:,}",
        )
        return "\n".join(filter(None, lines))

    def delta(self, module: str, task: int | None = None) -> Tensor:  # shape: (d_out, d_in)
        """The update dW of the module at a path, in the factors' dtype; zero in rows of a fused module that have no site.

        The path may be that of a parameter, which may have an axis of experts in front.

        Raises:
            AdapterError: no site is there, or the spec has tasks and none is given.
        """
        return merging.delta(self.engine, module, task)

    # How it is used

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The trained parameters as an optimizer of torch's takes them: one group for each learning rate.

        A factor's is ``lr`` times what the spec says under ``factors: {B: {lr: 16}}``; parameters of the base that are trained
        beside dW have ``lr`` itself.
        """
        groups: dict[float, list[Tensor]] = {}
        for block in self.network.blocks:
            if block.trainable:
                groups.setdefault(block.rule.lr, []).append(self.factors[block.name])
        of_base = list(self.trained_base.parameters())
        if of_base:
            groups.setdefault(1.0, []).extend(of_base)
        return [{"params": parameters, "lr": lr * multiplier} for multiplier, parameters in groups.items()]

    @property
    def enabled(self) -> bool:
        """Whether the update is added in every forward: not within ``disabled()``, and not while it is merged."""
        return self.state.working

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model is the base model, beside the other adapters that it may have: for every thread.

        Contexts may lie within each other, or overlap: it is enabled again when the last of them is left.
        """
        state, context = self.state, object()

        def enable() -> None:
            state.disabled_by.discard(context)
            state.refresh()

        with at_exit(enable):
            state.disabled_by.add(context)
            state.refresh()
            yield

    @contextmanager
    def tasks(self, ids: Tensor) -> Iterator[None]:  # shape: (batch,), integers
        """Within this context row i of a batch belongs to task ``ids[i]``.

        It is of the thread, or the coroutine, that enters it, and has a copy of the ids. Under activation checkpointing the
        backward pass runs the forward again, so it belongs into the context too. A compiled model is compiled again for each
        size of batch, unless ``torch._dynamo.config.force_nn_module_property_static_shapes`` is off.

        Raises:
            AdapterError: the spec has no task mode, or the ids are not a vector of tasks that exist.
        """
        n_tasks = self.spec.tasks
        if n_tasks is None:
            raise AdapterError(f"adapter `{self.name}` has no task mode; tasks() is for specs with `tasks:`")
        with self.state.tasks.chosen(ids, n_tasks):
            yield

    def merge(self, task: int | None = None) -> None:
        """Add dW to the base weights, so that a forward costs what the base's does.

        Other adapters may be merged before or after it, and leave in any order: a weight is its own bits and the sum of what is
        merged into it.

        Raises:
            AdapterError: it is merged already, a weight is quantised or shared, an update is not finite, the sum is beyond the
                range of the weight's dtype, or no task is given. Nothing was merged then.
        """
        self.state.check_parameters()
        merging.merge(self.engine, task)

    def unmerge(self) -> None:
        """Take dW off the base weights, which have the bits from before then, if nothing else is merged.

        Raises:
            AdapterError: it is not merged, or somebody else has written to a weight since.
        """
        merging.unmerge(self.state)

    @property
    def merged(self) -> Merged | None:
        """What was merged, while it is."""
        return self.state.merged

    def detach(self, *, keep_merged: bool = False) -> None:
        """Take the adapter off the model, which is then bit for bit what it was before ``attach``.

        With ``keep_merged`` the base weights keep a merged update, and what was trained of the base keeps its values.

        Raises:
            AdapterError: it is not attached, or ``keep_merged`` without a merge.
        """
        state = self.state
        state.base_model()
        if keep_merged and state.merged is None:
            raise AdapterError(f"adapter `{self.name}` is not merged; call merge() before detach(keep_merged=True)")
        if state.merged is not None and not keep_merged:
            merging.check_unchanged(state)

        def leave() -> None:
            if state.merged is not None:
                merging.take(state, keep=keep_merged)
            remove(state, keep=keep_merged)

        with at_exit(leave):
            pass

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the factors, the spec and the base's shapes to ``adapter.safetensors`` in a folder; returns its path.

        ``tensorpeft.load`` reads it. An older file there is replaced as a whole, or on an error left as it was. What is saved is
        what is trained, also within ``disabled()``, and as it is at one moment.

        Raises:
            AdapterError: a factor has no values (on the meta device), or some that are not finite; or a module was replaced.
            OSError: the folder or the file cannot be written.
        """
        self.state.check_parameters()
        return saving.save(self.state, folder)

    def reset_parameters(self) -> None:
        """Set every factor to its initial values, by the seed or the base weights, and what it trains of the base to its own.

        Raises:
            AdapterError: a factor starts from a weight that is quantised or not finite.
        """
        for block in self.network.blocks:
            self.factors.fill(block, self.spec.seed)
        if self.model is not None:
            fill_from_weights(self.state)
            self.engine.magnitudes.fill()
        self.trained_base.reset_parameters()
        self.refresh()

    def refresh(self) -> None:
        """Notice what was written to the factors through ``.data``, which leaves no trace that could be seen.

        A forward of the whole model does so anyway: it is for a module that is called by itself after such a write, as of an
        average of weights.
        """
        self.engine.forget()

    def forward(self, x: Any) -> Any:
        """The input as it is: in an ``nn.Sequential`` a submodule is a step, and this one changes nothing there."""
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        super()._apply(fn, recurse)
        self.engine.place()
        return self
