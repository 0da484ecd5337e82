"""KeyboardInterrupts at chosen lines of tensorpeft, and an operation held to "whole or not at all" under every one of them.

``places`` runs an operation once and tells which lines of the package it executed; ``interrupt`` runs it again and raises
KeyboardInterrupt as one of these is about to run; ``hold`` does that again and again, and compares what can be seen afterwards.
"""

from __future__ import annotations

import dis
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Generic, TypeVar

import tensorpeft as tp

PACKAGE = str(Path(tp.__file__).parent)
TOUCHING = ("runtime", "checkpoint", "pipeline.py", "<")  # what touches a model or a file, and what is emitted for that
World = TypeVar("World")


@dataclass(frozen=True)
class Place:
    """The moment at which a line is about to run, for the n-th time; ``late``, once the operation has changed something."""

    file: str
    line: int
    time: int
    late: bool = False

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" + (f" ({self.time})" if self.time > 1 else "")


def file_of(code: CodeType) -> str | None:
    """The file of the package in which code stands, or where it was emitted; None of code that is not the package's."""
    name = code.co_filename
    if name.startswith(PACKAGE):
        return name[len(PACKAGE) + 1 :]
    return "<emitted>" if name.startswith(("<eval_with_key>", "<tensorpeft")) else None


class _Watch:
    """A trace function that meets every line of some files, and may raise at one."""

    def __init__(
        self, within: tuple[str, ...], at: Place | int | None = None, mark: Callable[[], object] | None = None
    ) -> None:
        self.within, self.at, self.mark = within, at, mark
        self.start = mark() if mark is not None else None
        self.met: list[Place] = []
        self.times: Counter[tuple[str, int]] = Counter()
        self.files: dict[CodeType, str | None] = {}
        self.raised = False

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code not in self.files:
            file = file_of(code)
            self.files[code] = file if file is not None and file.startswith(self.within) else None
        return self._line if self.files[code] is not None else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line" and not _leaves_a_context(frame):
            file = self.files[frame.f_code]
            assert file is not None
            self.times[file, frame.f_lineno] += 1
            if self.mark is not None:
                late = bool(self.met and self.met[-1].late) or self.mark() != self.start
                self.met.append(Place(file, frame.f_lineno, self.times[file, frame.f_lineno], late))
            here = Place(file, frame.f_lineno, self.times[file, frame.f_lineno])
            if self._is_here(here):
                self.raised = True
                raise KeyboardInterrupt(str(here))
        return self._line

    def _is_here(self, here: Place) -> bool:
        if isinstance(self.at, int):
            return self.times.total() == self.at
        return self.at is not None and (here.file, here.line, here.time) == (self.at.file, self.at.line, self.at.time)


def _leaves_a_context(frame: FrameType) -> bool:
    """Whether a ``with`` is about to call ``__exit__``: no signal is handled between that and the last call of its body."""
    code, at = frame.f_code.co_code, frame.f_lasti
    names = [dis.opname[code[n]] for n in range(at, min(at + 8, len(code)), 2)]
    if names[:3] == ["LOAD_CONST"] * 3:
        return _are_none(frame, at)
    return names[0] in ("PUSH_EXC_INFO", "WITH_EXCEPT_START")


def _are_none(frame: FrameType, at: int) -> bool:
    code = frame.f_code
    return all(code.co_consts[code.co_code[n + 1]] is None for n in (at, at + 2, at + 4))


def _traced(operation: Callable[[], object], watch: _Watch) -> None:
    before = sys.gettrace()
    sys.settrace(watch)
    try:
        operation()
    finally:
        sys.settrace(before)


def places(
    operation: Callable[[], object], mark: Callable[[], object] = lambda: None, within: tuple[str, ...] = TOUCHING
) -> list[Place]:
    """Where an operation can be interrupted, in order: of each line that it executes the first and the last time.

    ``mark`` is a value that is other than it was when the operation began once that has changed something.
    """
    watch = _Watch(within, mark=mark)
    _traced(operation, watch)
    return [place for place in watch.met if place.time in (1, watch.times[place.file, place.line])]


def worthwhile(found: list[Place], every: int, ahead: int = 25) -> list[Place]:
    """The places from shortly before the operation changes something, or all if it never does; a few of those before."""
    first = next((number for number, place in enumerate(found) if place.late), 0) - ahead
    return [place for number, place in enumerate(found) if number >= first or number % every == 0]


def interrupt(operation: Callable[[], object], at: Place | int) -> bool:
    """Run an operation with a KeyboardInterrupt at a place, or at its n-th line. Whether it came there.

    If it did, the interrupt must come out of the operation.
    """
    watch = _Watch(TOUCHING if isinstance(at, int) else (at.file,), at)
    try:
        _traced(operation, watch)
    except KeyboardInterrupt:
        return True
    assert not watch.raised, f"the interrupt at {at} was swallowed"
    return False


@dataclass(frozen=True)
class Operation(Generic[World]):
    """What is interrupted: ``start`` builds what it works on, ``look`` tells all that can be seen of it, ``back`` undoes ``run``.

    ``mark`` tells cheaply whether ``run`` has changed something by now.
    """

    start: Callable[[], World]
    run: Callable[[World], object]
    look: Callable[[World], Mapping[str, Any]]
    back: Callable[[World], object]
    mark: Callable[[World], object] = lambda world: None
    seconds: float = 10  # what a look may take, before another thread is taken to wait for ever


def hold(operation: Operation[World], chosen: Callable[[list[Place]], Iterable[Place]] = lambda found: found) -> None:
    """Interrupt an operation at every chosen place: all is then as it was before, or as if it had not been interrupted.

    What it left can be used too: the operation runs to its end then, and is taken back.
    """
    world = operation.start()
    before = look(operation, world)
    operation.run(world)
    after = look(operation, world)
    operation.back(world)
    found = places(lambda: operation.run(world), lambda: operation.mark(world))
    assert found, "no line of the package was executed"
    operation.back(world)
    assert not differences(look(operation, world), before), "taken back it is not as it was before"
    faults = []
    for place in chosen(found):
        for fault in _faults(operation, world, place, before, after):
            faults.append(f"{place}: {fault}")
            world = operation.start()
            break
    assert not faults, f"{len(faults)} of {len(found)} interrupts, the first of them:\n" + "\n".join(faults[:10])


def _faults(
    operation: Operation[World], world: World, place: Place, before: Mapping[str, Any], after: Mapping[str, Any]
) -> Iterator[str]:
    """What is wrong after an interrupt; the first of them is enough, for the rest may follow from it."""
    step = "the interrupt"
    try:
        interrupt(lambda: operation.run(world), place)
        seen = look(operation, world)
        if not differences(seen, before) and differences(before, after):
            step = "another run"
            operation.run(world)
            seen = look(operation, world)
        if wrong := differences(seen, after):
            yield f"after {step} it is neither as before, where differ {differences(seen, before)}, nor whole: {wrong}"
        step = "taking it back"
        operation.back(world)
        if wrong := differences(look(operation, world), before):
            yield f"after {step} differ {wrong}"
    except Exception as error:
        yield f"{step} raises {type(error).__name__}: {error}"


def look(operation: Operation[World], world: World) -> Mapping[str, Any]:
    """What can be seen from another thread, which must not wait for one that was interrupted."""
    seen: list[Mapping[str, Any] | BaseException] = []

    def looking() -> None:
        try:
            seen.append(operation.look(world))
        except BaseException as error:
            seen.append(error)

    thread = threading.Thread(target=looking, daemon=True)
    thread.start()
    thread.join(operation.seconds)
    if not seen:
        raise TimeoutError("another thread waits for ever")
    if isinstance(seen[0], BaseException):
        raise seen[0]
    return seen[0]


def differences(seen: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The names of what is not as expected; floating-point outputs, under ``output``, are compared to 1e-12."""
    names = sorted(seen.keys() | expected.keys())
    return [name for name in names if not _same(name, seen.get(name), expected.get(name))]


def _same(name: str, one: Any, other: Any) -> bool:
    if name.startswith("output") and one is not None and other is not None:
        return bool((one - other).abs().max() <= 1e-12)
    return bool(one == other)
