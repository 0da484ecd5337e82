"""The adapter: the module that owns the factors and adds the update to its sites."""

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
from tensorpeft.runtime import factor_cache as prologue
from tensorpeft.runtime import merging, saving
from tensorpeft.runtime.autograd import SetRun
from tensorpeft.runtime.base_weight import base_weight, product_of
from tensorpeft.runtime.data_init import fill_from_weights
from tensorpeft.runtime.factors import Factors
from tensorpeft.runtime.hooks import Attachment
from tensorpeft.runtime.magnitudes import Magnitudes
from tensorpeft.runtime.program_cache import Codes, Compiled
from tensorpeft.runtime.replacement import Apart
from tensorpeft.runtime.tasks import Tasks
from tensorpeft.runtime.trained_base import Extras


class Adapter(nn.Module):
    """The factors of a spec on a model, attached to the model's sites by forward hooks.

    It is a submodule of the model, which keeps its class, its names and its parameters. ``factors`` holds one
    parameter (or buffer, where frozen) per factor, or per size of a ragged one.

    Where it ``adapts``, inputs of other lengths than the plan's, or without gradients, have plans of their own.
    """

    def __init__(self, plan: Plan, name: str, dtype: torch.dtype, device: torch.device, *, adapts: bool = True) -> None:
        super().__init__()
        self.name = name
        self.plan = plan
        self.adapts = adapts
        self.factors = Factors(plan.network, dtype, device)
        self.extras = Extras(extra.path for extra in plan.network.extras)
        self.attachment: Attachment | None = None
        self._enabled = self._alone = True
        self._merged: merging.Merged | None = None
        self._emit()
        self.reset_parameters()

    # What the adapter is

    @property
    def network(self) -> Network:
        return self.plan.network

    @property
    def spec(self) -> Spec:
        return self.plan.network.spec

    @property
    def input_modules(self) -> tuple[str, ...]:
        """The modules to whose input something is added while the adapter is alone on its model."""
        return tuple(self._codes.main.inputs)

    @property
    def product_modules(self) -> tuple[str, ...]:
        """The modules of which it needs W x while it is alone on its model."""
        return tuple(self._codes.main.products)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the update lands, in the order of the plan's groups."""
        return self.plan.network.sites

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
        return merging.delta(self, module, task)

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
        extras = list(self.extras.parameters())
        if extras:
            groups.setdefault(1.0, []).extend(extras)
        return [{"params": parameters, "lr": lr * multiplier} for multiplier, parameters in groups.items()]

    @property
    def enabled(self) -> bool:
        """Whether the hooks add the update: not within ``disabled()``, and not while it is merged."""
        return self._enabled and self._merged is None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within this context the model is the base model, beside the other adapters that it may have: for every thread."""
        before, merged = self._enabled, self._merged
        if merged is not None:
            self.unmerge()
        self._enable(False)
        try:
            with self.extras.swapped():
                yield
        finally:
            self._enable(before)
            if merged is not None:
                self.merge(merged.task)

    def _enable(self, enabled: bool) -> None:
        self._enabled = enabled
        if self.attachment is not None:
            self.attachment.tell_who_is_alone()

    @contextmanager
    def tasks(self, ids: Tensor) -> Iterator[None]:  # shape: (batch,), integers
        """Within this context row i of a batch belongs to task ``ids[i]``.

        It is of the thread that enters it. Under activation checkpointing the backward pass runs the forward again, so it belongs
        into the context too. A compiled model is compiled again for each size of batch, unless
        ``torch._dynamo.config.force_nn_module_property_static_shapes`` is off.

        Raises:
            AdapterError: the spec has no task mode, or the ids are not a vector of tasks that exist.
        """
        n_tasks = self.spec.tasks
        if n_tasks is None:
            raise AdapterError(f"adapter `{self.name}` has no task mode; tasks() is for specs with `tasks:`")
        with self._tasks.chosen(ids, n_tasks):
            yield

    def merge(self, task: int | None = None) -> None:
        """Add dW to the base weights, so that a forward costs what the base's does. ``unmerge`` restores their bits.

        Raises:
            AdapterError: it is merged already, a weight is quantised, an update is not finite, or no task is given.
        """
        self._merged = merging.merge(self, task)

    def unmerge(self) -> None:
        """Give the base weights back the bits that they had before ``merge``.

        Raises:
            AdapterError: it is not merged, or another adapter was merged after it.
        """
        merging.unmerge(self)
        self._merged = None

    @property
    def merged(self) -> merging.Merged | None:
        """What ``merge`` replaced, while it is merged."""
        return self._merged

    def detach(self, *, keep_merged: bool = False) -> None:
        """Take the adapter off the model, which is then bit for bit what it was before ``attach``.

        With ``keep_merged`` the base weights keep a merged update, and what was trained of the base keeps its values.

        Raises:
            AdapterError: it is not attached, or ``keep_merged`` without a merge.
        """
        if self.attachment is None:
            raise AdapterError(f"adapter `{self.name}` is not attached to a model")
        if keep_merged and self._merged is None:
            raise AdapterError(f"adapter `{self.name}` is not merged; call merge() before detach(keep_merged=True)")
        if self._merged is not None and not keep_merged:
            self.unmerge()
        self._merged = None
        self.attachment.remove(keep_merged=keep_merged)
        self.attachment = None

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write the factors, the spec and the base's shapes to ``adapter.safetensors`` in a folder; returns its path.

        ``tensorpeft.load`` reads it. An older file there is replaced as a whole, or on an error left as it was.

        Raises:
            AdapterError: a factor has no values (on the meta device), or some that are not finite.
            OSError: the folder or the file cannot be written.
        """
        return saving.save(self, folder)

    def reset_parameters(self) -> None:
        """Set every factor to its initial values, by the seed or the base weights, and what it trains of the base to its own.

        Raises:
            AdapterError: a factor starts from a weight that is quantised or not finite.
        """
        for block in self.network.blocks:
            self.factors.fill(block, self.spec.seed)
        if self.attachment is not None:
            fill_from_weights(self)
            self.magnitudes.fill()
        self.extras.reset_parameters()
        self.forget()

    # What the model and its hooks call

    def forward(self, x: Any) -> Any:
        """The input as it is: in an ``nn.Sequential`` a submodule is a step, and this one changes nothing there."""
        return x

    def forget(self) -> None:
        """Drop the prologue's results: the next site computes them from the factors as they then are."""
        self._codes.forget()
        self._runs: dict[int, SetRun] = {}

    def drop_runs(self) -> None:
        """Drop what sites were to share that were not called."""
        self._runs = {}
        if prologue.is_traced():  # else they would be results of the compiled model
            self._codes.forget()

    def set_alone(self, alone: bool) -> None:
        """Say whether no other adapter is at work on the model, so that what its linear modules compute is W x + bias."""
        if alone != self._alone:
            self._alone = alone
            self._codes.set_alone(alone)
            self._place()
            self.forget()

    def update(self, path: str, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """The output y (..., d_out) of the module at a path for its input x (..., d_in), with the updates of its sites added."""
        compiled = self._codes.code_for(x, y)
        for number, place in compiled.outputs.get(path, ()):
            call = compiled.code.sets[number]
            source = x if call.at == "site" else product_of(module, call.modules[place], y)
            y = self._land(compiled, number, place, module, source, y)
        return y

    def update_input(self, path: str, module: nn.Module, x: Tensor) -> Tensor:
        """The input x (..., d_in) of the module at a path, with the updates added that go through its weight."""
        compiled = self._codes.code_for(x, x)
        changed = x
        for number, place in compiled.inputs.get(path, ()):
            changed = self._land(compiled, number, place, module, x, x.clone() if changed is x else changed)
        return changed

    def _land(self, compiled: Compiled, number: int, place: int, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Of one input set, at x: the update of one of its modules added to y."""
        stacks = compiled.stacks(self.factors, self.magnitudes.norms, y.dtype, y.device)
        run = self._runs.pop(number, None)
        if run is None or not run.fits(place, x, stacks):
            given = self._given(compiled, number, module, x, y)
            run = SetRun(compiled.code.sets[number], stacks, x, given, y.dtype)
        y = run.land(place, y)
        if run.waiting:
            self._runs[number] = run
        return y

    def _given(self, compiled: Compiled, number: int, module: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
        """What an input set is given beside its input and the prologue's results."""
        call = compiled.code.sets[number]
        given: dict[str, Any] = {"training": self.training, **compiled.indices(y.device)[1][number]}
        if call.program.kind.by_base:
            given["w"] = base_weight(self, module, call.modules[0]).to(y.dtype)
        if call.program.kind.by_task:
            given["ids"] = self._checked_ids(x, call.modules[0])
        return given

    def _checked_ids(self, x: Tensor, site: Site) -> Tensor:
        ids = self._tasks.on(x.device)
        if ids is None:
            raise AdapterError(
                f"adapter `{self.name}` has a task mode: call the model within `adapter.tasks(ids)`, "
                "and backward too where activations are checkpointed"
            )
        if ids.shape[0] != x.shape[0]:
            raise AdapterError(f"tasks() was given {ids.shape[0]} ids, but {site} has a batch of {x.shape[0]} rows")
        return ids

    # Copies: without emitted code and the prologue's results, which follow from the rest

    def _emit(self) -> None:
        self._codes = Codes(self.plan, adapts=self.adapts)
        self._codes.set_alone(self._alone)
        self.apart = Apart(self)
        self.magnitudes = Magnitudes(self)
        self._tasks = Tasks()
        self.forget()
        self._place()

    def _place(self) -> None:
        """Put the constants of the code where the factors are: not in a forward, which a compiler may follow."""
        for factor in self.factors.tensors()[:1]:
            self._codes.place(factor.device)
            self.apart.place(factor.device)
            self.magnitudes.place(factor.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        super()._apply(fn, recurse)
        self._place()
        return self

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_codes", "_runs", "_tasks", "apart", "magnitudes")
        return {key: value for key, value in self.__dict__.items() if key not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._emit()
