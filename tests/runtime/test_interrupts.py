"""Every operation of an adapter is whole or not at all, also where KeyboardInterrupt comes at any of its lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tensorpeft as tp
from tests import interrupts
from tests.interrupts import Operation, Place
from tests.runtime import small

KINDS: dict[str, tuple[Callable[[], nn.Module], tp.Spec]] = {
    "lora": (small.net, small.spec(small.LORA, "0", "2")),
    "trained": (small.net, small.spec(small.LORA, "0", train="norms")),
    "experts": (small.mixture, small.spec(small.EXPERTS, "*.down")),
    "ia3": (small.net, small.spec(small.IA3, "0", "2")),
    "dora": (small.net, small.spec(small.DORA, "0", "2")),
}
MET: set[tuple[str, str, int]] = set()  # lines at which an operation was interrupted


@dataclass
class World:
    """A model, the adapter that it has or had, and a folder."""

    model: nn.Module
    adapter: tp.Adapter | None
    folder: Path

    def seen(self) -> dict[str, Any]:
        return small.seen(self.model)

    def mark(self) -> list[object]:
        return [*small.marks(self.model), *self.folder.iterdir()]

    def seen_with_file(self) -> dict[str, Any]:
        names = sorted(path.name for path in self.folder.iterdir() if not path.name.startswith("."))
        return self.seen() | {name: (self.folder / name).read_bytes() for name in names}


def hold(
    name: str,
    start: Callable[[], World],
    run: Callable[[World], object],
    back: Callable[[World], object] = lambda world: None,
    look: Callable[[World], dict[str, Any]] = World.seen,
    every: int = 3,
) -> None:
    """Interrupt an operation where that is worth it: at all lines where no kind before was interrupted, and some others."""

    def chosen(found: list[Place]) -> list[Place]:
        worth = interrupts.worthwhile(found, 3 * every)
        new = [place for place in worth if (name, place.file, place.line) not in MET]
        MET.update((name, place.file, place.line) for place in worth)
        return [place for number, place in enumerate(worth) if place in new or number % every == 0]

    interrupts.hold(Operation(start, run, look, back, World.mark), chosen)


def attached(kind: str, folder: Path, *, merged: bool = False) -> World:
    made, spec = KINDS[kind]
    model = made()
    adapter = small.move(model, tp.attach(model, spec))
    if merged:
        adapter.merge()
    return World(model, adapter, folder)


def bare(kind: str, folder: Path) -> World:
    return World(KINDS[kind][0](), None, folder)


def attach(kind: str) -> Callable[[World], None]:
    def run(world: World) -> None:
        world.adapter = small.move(world.model, tp.attach(world.model, KINDS[kind][1]))

    return run


def its(name: str, **named: Any) -> Callable[[World], object]:
    """The operation of that name, of the adapter that the model has."""

    def run(world: World) -> object:
        adapter = small.adapter_of(world.model)
        assert adapter is not None
        return getattr(adapter, name)(**named)

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_attach(kind: str, tmp_path: Path) -> None:
    spec = KINDS[kind][1]
    hold("attach", lambda: bare(kind, tmp_path), lambda w: tp.attach(w.model, spec), its("detach"))


@pytest.mark.parametrize("kind", KINDS)
def test_merge(kind: str, tmp_path: Path) -> None:
    hold("merge", lambda: attached(kind, tmp_path), its("merge"), its("unmerge"))


@pytest.mark.parametrize("kind", KINDS)
def test_unmerge(kind: str, tmp_path: Path) -> None:
    hold("unmerge", lambda: attached(kind, tmp_path, merged=True), its("unmerge"), its("merge"))


@pytest.mark.parametrize("merged", [False, True], ids=["free", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_detach(kind: str, merged: bool, tmp_path: Path) -> None:
    def back(world: World) -> None:
        attach(kind)(world)
        if merged:
            its("merge")(world)

    hold("detach", lambda: attached(kind, tmp_path, merged=merged), its("detach"), back)


@pytest.mark.parametrize("kind", KINDS)
def test_detach_that_keeps_the_merge(kind: str, tmp_path: Path) -> None:
    """What is kept becomes the base, so the next adapter needs the old numbers there first."""
    bits = {name: tensor.clone() for name, tensor in KINDS[kind][0]().state_dict().items()}

    def back(world: World) -> None:
        world.model.load_state_dict(bits)
        attach(kind)(world)
        its("merge")(world)

    hold("keep", lambda: attached(kind, tmp_path, merged=True), its("detach", keep_merged=True), back)


@pytest.mark.parametrize("merged", [False, True], ids=["free", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_disabled(kind: str, merged: bool, tmp_path: Path) -> None:
    """However it is left, the adapter is at work again afterwards; where its body was reached, that had the base."""
    base = KINDS[kind][0]()(small.x())

    def run(world: World) -> None:
        assert world.adapter is not None
        with world.adapter.disabled():
            with world.adapter.disabled():
                pass
            assert torch.equal(world.model(small.x()), base)

    hold("disabled", lambda: attached(kind, tmp_path, merged=merged), run)


@pytest.mark.parametrize("kind", KINDS)
def test_save(kind: str, tmp_path: Path) -> None:
    """The folder has the old file or the new one; what an interrupt leaves beside it is gone after the next save."""

    def back(world: World) -> None:
        world.adapter.reset_parameters()
        world.adapter.save(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]
        small.move(world.model, world.adapter)

    def start() -> World:
        world = attached(kind, tmp_path)
        back(world)
        return world

    hold("save", start, lambda w: w.adapter.save(tmp_path), back, World.seen_with_file)


@pytest.mark.parametrize("kind", KINDS)
def test_load(kind: str, tmp_path: Path) -> None:
    attached(kind, tmp_path).adapter.save(tmp_path)
    hold(
        "load", lambda: bare(kind, tmp_path), lambda w: tp.load(w.model, tmp_path), its("detach"), World.seen_with_file
    )


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward(kind: str, tmp_path: Path) -> None:
    """The next forward is right, in another thread, which does not wait for the one that was interrupted."""
    hold("forward", lambda: attached(kind, tmp_path), lambda w: w.model(small.x()).sum().backward())


@pytest.mark.parametrize("operation", ["attach", "load"])
def test_the_compiler_s_lines(operation: str, tmp_path: Path) -> None:
    """Whoever interrupts what only reads a model finds it as it was: a line here and there shows it."""
    world = attached("lora", tmp_path)
    world.adapter.save(tmp_path)
    world.adapter.detach()
    before = world.seen()

    def run() -> None:
        tp.attach(world.model, KINDS["lora"][1]) if operation == "attach" else tp.load(world.model, tmp_path)

    found = [p for p in interrupts.places(run, within=("",)) if not p.file.startswith(interrupts.TOUCHING)]
    its("detach")(world)
    for place in found[:: len(found) // 20]:
        assert interrupts.interrupt(run, place), place
        assert not interrupts.differences(world.seen(), before), place
