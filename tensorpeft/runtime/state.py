"""What an adapter is at run time: a value that its operations and hooks share, below the facade that users see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tensorpeft.language.errors import AdapterError
from tensorpeft.language.spec import Spec
from tensorpeft.model.shape import Site
from tensorpeft.network.network import Network
from tensorpeft.planning.plan import Plan
from tensorpeft.runtime.factors import Factors
from tensorpeft.runtime.ledger import BaseParameter
from tensorpeft.runtime.tasks import Tasks
from tensorpeft.runtime.trained_base import TrainedBase


@dataclass(frozen=True, eq=False)
class Merged:
    """A merge: of which task, and the factors as they then were, so that its dW can be had again."""

    task: int | None
    values: dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Held:
    """A parameter of the base that an adapter holds: its entry in the ledger, and where the model has it."""

    path: str
    owner: nn.Module
    name: str
    entry: BaseParameter


class State:
    """Everything of an adapter that is not computed from the rest.

    It is ``working`` while its hooks add the update: attached, not within ``disabled()``, and not merged.
    """

    def __init__(self, plan: Plan, name: str, factors: Factors, trained: TrainedBase, *, adapts: bool) -> None:
        self.plan, self.name, self.factors, self.trained, self.adapts = plan, name, factors, trained, adapts
        self.model: nn.Module | None = None
        self.held: list[Held] = []
        self.modules: list[tuple[nn.Module, Any]] = []  # whose forwards it is part of, and these
        self.former: list[Any] = []  # forwards that it was part of, while it is detached
        self.merged: Merged | None = None
        self.disabled_by: set[object] = set()  # the contexts within which it is disabled
        self.neighbours: set[State] = set()  # adapters that have modules in common with this one
        self.tasks = Tasks()
        self.alone = True  # whether no neighbour is at work, and the base's modules tell their biases
        self.tells_biases = True
        self.when_alone_changes: Callable[[], None] | None = None
        self.edges: list[tuple[dict[str, Any], str, nn.Module]] = []  # from the model down to its sites: what was where
        self.working = False

    def __reduce__(self) -> tuple[Any, ...]:
        """What an engine is built from comes first: a copy or a pickle that starts anywhere in the circle of objects finds it."""
        rest = {name: value for name, value in self.__dict__.items() if name != "when_alone_changes"}
        return _restored, (self.plan, self.name, self.factors, self.adapts), rest

    @property
    def network(self) -> Network:
        return self.plan.network

    @property
    def spec(self) -> Spec:
        return self.plan.network.spec

    @property
    def is_enabled(self) -> bool:
        """Whether its update counts, added by hooks or merged."""
        return self.model is not None and not self.disabled_by

    def refresh(self) -> None:
        """Let what follows from the rest follow: in the weights, in the trained parameters, and in the neighbours."""
        self.working = self.is_enabled and self.merged is None
        self.trained.show(trained=not self.disabled_by)
        for held in self.held:
            if not held.entry.is_at_rest:
                held.entry.settle()
        for each in (self, *self.neighbours):
            alone = each.tells_biases and not any(other.is_enabled for other in each.neighbours)
            if alone != each.alone:
                each.alone = alone
                if each.when_alone_changes is not None:
                    each.when_alone_changes()

    def check_base(self) -> None:
        """Notice that the base is not what it was: at every pass, merge and save. What is safe is followed.

        Raises:
            AdapterError: a module that the adapter is on was replaced, or a parameter that it trains is another one now.
        """
        for children, name, module in self.edges:
            if name not in children or children[name] is not module:
                self._look_again()
                break
        for module, forward in self.modules:
            if "forward" not in module.__dict__:  # whoever had put another one there took more away than that
                module.__dict__["forward"] = forward
        if self.trained.paths:
            self.trained.follow()

    def check_parameters(self) -> None:
        """The same of every parameter: at a merge and a save, as ``functional_call`` puts others there for one forward.

        Raises:
            AdapterError: one was replaced while an adapter was merged into it.
        """
        self.check_base()
        for held in self.held:
            now = held.owner._parameters.get(held.name)
            if now is None or now is held.entry.parameter or held.entry.trainer is not None:
                continue
            if held.entry.additions:
                raise AdapterError(
                    f"`{held.path}` was replaced while an adapter was merged into it, so that update is in nothing now; "
                    "detach(keep_merged=True) lets go of it"
                )
            held.entry.move(now)

    def _look_again(self) -> None:
        """Something lies elsewhere. Layers may be left out or turned round, but the module of a site is to be an adapted one."""
        model, own = self.base_model(), {id(module) for module, _ in self.modules}
        for path in dict.fromkeys(site.module for site in self.network.sites):
            try:
                now = model.get_submodule(path)
            except AttributeError:
                continue
            if id(now) not in own:
                raise AdapterError(
                    f"`{path}` was replaced (by {type(now).__name__}) after adapter `{self.name}` was attached, "
                    "which is not on what is there now; detach it and attach it again"
                )
        self.edges = [each for each in self.edges if each[0].get(each[1]) is each[2]]

    def base_model(self) -> nn.Module:
        """The model that it is attached to.

        Raises:
            AdapterError: there is none.
        """
        if self.model is None:
            raise AdapterError(f"adapter `{self.name}` is not attached to a model")
        return self.model

    def module_of(self, site: Site) -> nn.Module | None:
        """The module of a site, while there is a model."""
        return None if self.model is None else self.model.get_submodule(site.module)

    def ids_for(self, x: Tensor, site: Site) -> Tensor:
        """The task of each row of an input.

        Raises:
            AdapterError: none are set, or not as many as there are rows.
        """
        ids = self.tasks.on(x.device)
        if ids is None:
            raise AdapterError(
                f"adapter `{self.name}` has a task mode: call the model within `adapter.tasks(ids)`, "
                "and backward too where activations are checkpointed"
            )
        if ids.shape[0] != x.shape[0]:
            raise AdapterError(f"tasks() was given {ids.shape[0]} ids, but {site} has a batch of {x.shape[0]} rows")
        return ids


def _restored(plan: Plan, name: str, factors: Factors, adapts: bool) -> State:
    return State(plan, name, factors, TrainedBase(()), adapts=adapts)
