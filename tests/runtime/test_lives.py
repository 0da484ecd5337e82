"""Random lives: whatever is done to several adapters on one model, in whatever order, it computes with W plus their sum.

A dense model in numpy knows the truth: W, the formulas of the updates, who is merged, disabled or gone. At the end of a life
everything is detached, and the model is bit for bit what it was.
"""

from __future__ import annotations

import copy
import os
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy import ndarray
from torch import nn

import tensorpeft as tp
from tests import interrupts
from tests.runtime import small

LIVES = int(os.environ.get("LIVES", "200"))  # of which the first are tried at each run; 2,000 take minutes
OPERATIONS, BATCHES = 20, 20
ROOTS = {"": "acd", "inner": "ac", "inner.low": "ab"}  # where an adapter is attached, and its sites there
PATHS = {"a": "inner.low.a", "b": "inner.low.b", "c": "inner.c", "d": "d"}
NORM = ("inner.low.norm.weight", "inner.low.norm.bias")
X = np.random.default_rng(5).normal(size=(3, 4))


class Model(nn.Sequential):
    """d(c(b(norm(a(x))))), all of width 4, in three modules that lie in each other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential()
        self.inner.low = nn.Sequential()
        self.inner.low.a, self.inner.low.norm, self.inner.low.b = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
        self.inner.c, self.d = nn.Linear(4, 4), nn.Linear(4, 4)


@cache
def pristine() -> Model:
    """Some of its parameters are frozen."""
    torch.manual_seed(3)
    model = Model().double()
    for path in ("inner.low.a.bias", "inner.low.norm.weight", "inner.c.weight"):
        model.get_parameter(path).requires_grad_(False)
    return model


@cache
def base() -> dict[str, ndarray]:
    return {name: parameter.detach().numpy().copy() for name, parameter in pristine().named_parameters()}


# The formulas, in the language and in numpy

UPDATES = {
    "lora": "  {s}: B_{s}[d_out, r] * A[r, d_in]\n",
    "ia3": "  {s}: W[d_out, d_in] * u_{s}[d_out]\n",
    "dora": "  {s}: {m} * B_{s}[d_out, r] * A[r, d_in] + {m} * W[d_out, d_in] - one * W[d_out, d_in]\n",
}
FACTORS = {
    "lora": ("", "B_{s}: {{init: zeros}}"),
    "ia3": ("", "u_{s}: {{init: zeros}}"),
    "dora": ("one: {init: ones, frozen: true}, ", "m_{s}: {{norm: true}}, B_{s}: {{init: zeros}}"),
}


@cache
def spec(kind: str, sites: str, train: str, name: str) -> tp.Spec:
    shared, own = FACTORS[kind]
    text = f"tensorpeft: 1\nname: {name}\ntarget: {{matrices: [{', '.join(sites)}]}}\n"
    text += "" if kind == "ia3" else "rank: {r: 2}\n"
    text += "alpha: 6\nscale: alpha / r\n" if kind == "lora" else ""
    text += "update:\n" + "".join(UPDATES[kind].format(s=site, m=f"m_{site}[matrix, layer, d_out]") for site in sites)
    text += f"factors: {{{shared}{', '.join(own.format(s=site) for site in sites)}}}\n"
    return tp.load_spec(text + (f"train: [{train}]\n" if train else ""))


def update(kind: str, factors: dict[str, ndarray], site: str) -> ndarray:  # shape: (4, 4)
    """dW of a site."""
    weight = base()[f"{PATHS[site]}.weight"]
    if kind == "ia3":
        return np.einsum("oi,o->oi", weight, factors[f"u_{site}"])
    pair = np.einsum("or,ri->oi", factors[f"B_{site}"], factors["A"])
    if kind == "lora":
        return 3 * pair
    turned = weight + pair
    return turned * (factors[f"m_{site}"].reshape(4) / np.sqrt((turned**2).sum(1)))[:, None] - weight


# What is known of a life


@dataclass
class One:
    """An adapter, and what it should be."""

    adapter: tp.Adapter
    root: str
    kind: str
    sites: str
    factors: dict[str, ndarray]
    trained: dict[str, ndarray]  # parameters of the base, by their paths in the whole model
    initial: dict[str, ndarray] = field(default_factory=dict)
    merged: bool = False
    contexts: list[AbstractContextManager[None]] = field(default_factory=list)
    changes: dict[str, ndarray] = field(default_factory=dict)  # dW by site, from the factors as they are

    def __post_init__(self) -> None:
        self.initial = {name: values.copy() for name, values in self.factors.items()}

    def change(self, site: str) -> ndarray:
        if site not in self.changes:
            self.changes[site] = update(self.kind, self.factors, site)
        return self.changes[site]


def values(adapter: tp.Adapter) -> dict[str, ndarray]:
    return {name: parameter.detach().numpy().copy() for name, parameter in adapter.factors.named_parameters()}


class Life:
    """A model with adapters, to which random things are done."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random, self.folder = random.Random(seed), folder
        self.numbers = np.random.default_rng(seed)
        self.model = copy.deepcopy(pristine())
        self.before = small.traces(self.model)
        self.ones: dict[str, One] = {}
        self.kept: dict[str, ndarray] = {}  # what was added to weights, or put in place of others, for good
        self.orphans: list[AbstractContextManager[None]] = []
        self.told: list[str] = []

    # The truth

    def parameter(self, path: str) -> ndarray:
        found = self.kept.get(path, base()[path])
        for one in self.ones.values():
            if path in one.trained and not one.contexts:
                found = one.trained[path]
        return found

    def weight(self, site: str) -> ndarray:
        path = f"{PATHS[site]}.weight"
        changes = [one.change(site) for one in self.ones.values() if site in one.sites and not one.contexts]
        return base()[path] + self.kept.get(path, 0) + sum(changes, np.zeros((4, 4)))

    def expected(self, root: str = "") -> ndarray:  # shape: (3, 4)
        """The output of the module at a path."""
        y = self._linear("a", X)
        y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5)
        y = y * self.parameter(NORM[0]) + self.parameter(NORM[1])
        y = self._linear("b", y)
        if root != "inner.low":
            y = self._linear("c", y)
        return y if root else self._linear("d", y)

    def _linear(self, site: str, x: ndarray) -> ndarray:
        return x @ self.weight(site).T + self.parameter(f"{PATHS[site]}.bias")

    def is_right(self, root: str = "") -> bool:
        with torch.no_grad():
            found = self.model.get_submodule(root)(torch.from_numpy(X)).numpy()
        return bool(np.abs(found - self.expected(root)).max() <= 1e-10)

    def check(self) -> None:
        assert self.is_right(), "the output of the model"
        for name, one in self.ones.items():
            assert all(parameter.requires_grad for parameter in one.adapter.factors.parameters()), f"{name} is frozen"
            start = f"{one.root}." if one.root else ""
            trained = {path for other in self.ones.values() for path in other.trained}
            for path in base():
                if path.startswith(start):
                    assert self.model.get_parameter(path).requires_grad == (path in trained), f"{path}'s flag"

    # What is done

    def pick(self, is_fit: Callable[[One], object] = lambda one: True) -> One | None:
        fit = [one for one in self.ones.values() if is_fit(one)]
        return self.random.choice(fit) if fit else None

    def name(self, one: One) -> str:
        return next(name for name, other in self.ones.items() if other is one)

    def tell(self, what: str) -> None:
        self.told.append(what)

    def attach(self) -> None:
        free = [name for name in "xyz" if name not in self.ones]
        root, kind = self.random.choice(list(ROOTS)), self.random.choice(list(UPDATES))
        sites = ROOTS[root]
        if kind != "lora" and any(f"{PATHS[site]}.weight" in self.kept for site in sites):
            kind = "lora"  # of which W the others are then is nowhere said
        train = self.random.choice(["", "norms", "biases"])
        if not free:
            return
        self.tell(f"{free[0]} = attach {kind} to `{root}` with train: [{train}]")
        paths = [f"{PATHS[site]}.bias" for site in sites] if train == "biases" else [*NORM] if train else []
        module, of = self.model.get_submodule(root), spec(kind, sites, train, free[0])
        if any(path in one.trained for one in self.ones.values() for path in paths):
            with pytest.raises(tp.AdapterError, match="is trained by adapter"):
                tp.attach(module, of)
            return
        adapter = tp.attach(module, of)
        trained = {path: self.parameter(path).copy() for path in paths}
        one = self.ones[free[0]] = One(adapter, root, kind, sites, values(adapter), trained)
        if kind == "dora":  # of the base's rows, whatever is merged into them
            for site in sites:
                lengths = np.linalg.norm(base()[f"{PATHS[site]}.weight"], axis=1)
                assert np.allclose(one.factors[f"m_{site}"].reshape(4), lengths, rtol=1e-12)

    def submodule(self) -> None:
        root = self.random.choice(["inner", "inner.low"])
        self.tell(f"call `{root}`")
        assert self.is_right(root), f"the output of `{root}`"

    def train(self) -> None:
        if one := self.pick(lambda one: not one.merged):
            name = self.random.choice(list(one.factors))
            change = self.numbers.normal(size=one.factors[name].shape) * 0.3
            through_data = self.random.random() < 0.3
            self.tell(f"{self.name(one)}.{name} changes{' through .data' if through_data else ''}")
            one.factors[name] = one.factors[name] + change
            one.changes = {}
            parameter = one.adapter.factors.get_parameter(name)
            with torch.no_grad():
                (parameter.data if through_data else parameter).add_(torch.from_numpy(change))

    def train_base(self) -> None:
        if one := self.pick(lambda one: one.trained and not one.contexts):
            path = self.random.choice(list(one.trained))
            self.tell(f"`{path}`, which {self.name(one)} trains, changes")
            change = self.numbers.normal(size=4) * 0.3
            one.trained[path] = one.trained[path] + change
            with torch.no_grad():
                self.model.get_parameter(path).add_(torch.from_numpy(change))

    def merge(self) -> None:
        if one := self.pick(lambda one: not one.merged):
            self.tell(f"{self.name(one)}.merge()")
            self._within_disabled(one, one.adapter.merge, True)

    def unmerge(self) -> None:
        if one := self.pick(lambda one: one.merged):
            self.tell(f"{self.name(one)}.unmerge()")
            self._within_disabled(one, one.adapter.unmerge, False)

    def _within_disabled(self, one: One, change: Callable[[], None], merged: bool) -> None:
        """Do it, or within ``disabled()`` perhaps refuse to, which then changes nothing."""
        try:
            change()
        except tp.AdapterError:
            assert one.contexts
        else:
            one.merged = merged

    def disable(self) -> None:
        if one := self.pick():
            self.tell(f"{self.name(one)}.disabled() is entered")
            context = one.adapter.disabled()
            context.__enter__()
            one.contexts.append(context)

    def enable(self) -> None:
        one = self.pick(lambda one: one.contexts)
        contexts = one.contexts if one is not None else self.orphans
        if contexts:
            number = self.random.randrange(len(contexts))
            self.tell(f"{self.name(one) if one else 'a detached adapter'}.disabled() number {number} is left")
            contexts.pop(number).__exit__(None, None, None)

    def fail(self) -> None:
        if one := self.pick():
            self.tell(f"an error in {self.name(one)}.disabled()")

            def failing() -> None:
                context = one.adapter.disabled()
                with context:
                    one.contexts.append(context)
                    assert self.is_right(), "the output within disabled()"
                    one.contexts.pop()
                    raise KeyError("on demand")

            with pytest.raises(KeyError, match="on demand"):
                failing()

    def detach(self) -> None:
        if one := self.pick():
            self.tell(f"{self.name(one)}.detach()")
            one.adapter.detach()
            self.orphans += one.contexts
            del self.ones[self.name(one)]

    def keep(self) -> None:
        """Only where no other adapter multiplies by the weights: of which W it then would is nowhere said."""

        def is_fit(one: One) -> bool:
            others = [other for other in self.ones.values() if other is not one and {*other.sites} & {*one.sites}]
            return one.merged and not one.contexts and all(other.kind == "lora" for other in others)

        if one := self.pick(is_fit):
            self.tell(f"{self.name(one)}.detach(keep_merged=True)")
            one.adapter.detach(keep_merged=True)
            for site in one.sites:
                path = f"{PATHS[site]}.weight"
                self.kept[path] = self.kept.get(path, 0) + one.change(site)
            self.kept |= one.trained
            del self.ones[self.name(one)]

    def reset(self) -> None:
        if one := self.pick(lambda one: not one.merged):
            self.tell(f"{self.name(one)}.reset_parameters()")
            one.adapter.reset_parameters()
            one.factors, one.changes = {name: values.copy() for name, values in one.initial.items()}, {}
            one.trained = {path: self.kept.get(path, base()[path]).copy() for path in one.trained}

    def save(self) -> None:
        """What is loaded onto another model of the kind does there what it does here."""
        if one := self.pick():
            self.tell(f"{self.name(one)}.save(), and load")
            one.adapter.save(self.folder)
            twin = Life(0, self.folder)
            loaded = tp.load(twin.model.get_submodule(one.root), self.folder)
            twin.ones = {"x": One(loaded, one.root, one.kind, one.sites, values(loaded), one.trained)}
            for name, found in twin.ones["x"].factors.items():
                assert np.array_equal(found, one.factors[name]), f"the saved {name}"
            assert twin.is_right(), "the output of the loaded adapter"

    def copy(self) -> None:
        """The life goes on with the copy."""
        if not any(one.contexts for one in self.ones.values()):
            is_pickle = self.random.random() < 0.5
            self.tell("a copy" + (", by pickle" if is_pickle else ""))
            self.model = pickle.loads(pickle.dumps(self.model)) if is_pickle else copy.deepcopy(self.model)
            for name, one in self.ones.items():
                one.adapter = small.adapter_of(self.model.get_submodule(one.root), name)

    def interrupt(self) -> None:
        """Afterwards the adapter itself tells whether it was done."""
        number = int(10 ** self.random.uniform(0, 2.5))
        if one := self.pick(lambda one: not one.contexts):
            name, adapter, root = self.name(one), one.adapter, self.model.get_submodule(one.root)
            what = self.random.choice(["unmerge" if one.merged else "merge", "detach", "disabled", "forward"])
            self.tell(f"{name}: {what}, interrupted at line {number}")

            def disabled() -> None:
                with adapter.disabled():
                    root(torch.from_numpy(X))

            run = {"disabled": disabled, "forward": lambda: root(torch.from_numpy(X))}.get(what)
            interrupts.interrupt(run or getattr(adapter, what), number)
            one.merged = adapter.merged is not None
            if small.adapter_of(root, name) is None:
                assert what == "detach"
                del self.ones[name]

    def end(self) -> None:
        for one in [*self.ones.values()]:
            while one.contexts:
                one.contexts.pop().__exit__(None, None, None)
        self.check()
        names = [*self.ones]
        self.random.shuffle(names)
        for name in names:
            self.ones.pop(name).adapter.detach()
        while self.orphans:
            self.orphans.pop().__exit__(None, None, None)
        self.check()
        after = small.traces(self.model)
        for name, expected in self.before.items():
            path = name.removeprefix("tensor ")
            assert (after[name][0] if path in self.kept else after[name]) == (
                expected[0] if path in self.kept else expected
            ), f"at the end {name}"
        for path in self.kept:
            expected = self.kept[path] + (base()[path] if path.endswith("weight") and path not in NORM else 0)
            assert np.abs(self.model.get_parameter(path).detach().numpy() - expected).max() <= 1e-10, path

    def operations(self) -> Iterator[Callable[[], Any]]:
        often = [
            self.train,
            self.train,
            self.train_base,
            self.merge,
            self.merge,
            self.unmerge,
            self.disable,
            self.enable,
        ]
        rare = [self.submodule, self.fail, self.detach, self.keep, self.reset, self.interrupt, self.interrupt]
        rarer = [self.save, self.copy]
        yield self.attach
        yield self.attach
        for _ in range(OPERATIONS - 2):
            if len(self.ones) < 2 or self.random.random() < 0.05:
                yield self.attach
            else:
                chance = self.random.random()
                yield self.random.choice(often if chance < 0.65 else rare if chance < 0.97 else rarer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lives")


@pytest.mark.parametrize("batch", range(BATCHES))
def test_lives(batch: int, folder: Path) -> None:
    for seed in range(batch, LIVES, BATCHES):
        life = Life(seed, folder)
        try:
            for operation in life.operations():
                operation()
                life.check()
            life.told.append("the end")
            life.end()
        except (Exception, KeyboardInterrupt, pytest.fail.Exception) as error:
            lines = "\n  ".join(life.told)
            pytest.fail(f"life {seed}: {type(error).__name__}: {error}, after\n  {lines}", pytrace=False)
