"""Operations that are whole or not at all, whatever interrupts them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack


def at_exit(step: Callable[[], None]) -> ExitStack:
    """A context at whose end a step is done, be it interrupted once (by Ctrl-C, at any line of it).

    The step sets things as they are to be, so that doing it again does no harm: it is done twice.
    """
    stack = ExitStack()
    stack.callback(step)
    stack.callback(step)
    return stack
