"""The program of a kind of input set: its functions, those that no compiler follows made when they are first needed."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache, cached_property, lru_cache, partial
from typing import Any, TypeVar

from tensorpeft.emission.backward import Backward
from tensorpeft.emission.forward import SetCode
from tensorpeft.emission.graph import Function
from tensorpeft.emission.lowering import SetKind

Made = TypeVar("Made", SetCode, Function)


class SetProgram:
    """The functions of a kind of input set."""

    def __init__(self, kind: SetKind) -> None:
        self.kind = kind
        self._code = _shared(kind, "forward", SetCode)
        self.forward = self._code.forward
        self.functional_epilogues = self._epilogues(in_place=False)
        self.backward = cache(self._backward)

    @cached_property
    def epilogues(self) -> tuple[Function, ...]:
        """Of each module: its updates added in the memory of its output. ``functional_epilogues`` leave the output as it is."""
        return self._epilogues(in_place=True)

    @property
    def whole(self) -> Function:
        """The backward pass from all modules to everything."""
        return self.backward((1 << len(self.kind.modules)) - 1, to_x=True, to_arguments=True)

    def _epilogues(self, *, in_place: bool) -> tuple[Function, ...]:
        code = self._code
        return tuple(
            _shared(self.kind, (code, module, in_place), partial(code.epilogue, module=module, in_place=in_place))
            for module in range(len(self.kind.modules))
        )

    def _backward(self, modules: int, *, to_x: bool, to_arguments: bool) -> Function:
        """From the modules that are bits of a number: a set would be built at every step."""
        present = frozenset(n for n in range(len(self.kind.modules)) if modules >> n & 1)

        def make(kind: SetKind) -> Function:
            return Backward(self._code, kind, present, to_x=to_x, to_arguments=to_arguments).function()

        return _shared(self.kind, (self._code, present, to_x, to_arguments), make)


@lru_cache(maxsize=1024)
def program(kind: SetKind) -> SetProgram:
    """Adapters of the same spec share their programs: a compiled model need not be compiled again for another of them."""
    return SetProgram(kind)


def _shared(kind: SetKind, what: Hashable, make: Callable[[SetKind], Made]) -> Made:
    """The code of a kind that differs only in sizes which that code does not read; else it is made for this kind."""
    alike = _made(kind.outline, what)
    for found in alike:
        if found.read.items() <= kind.sizes.items():
            return found
    alike.append(make(kind))
    return alike[-1]


@lru_cache(maxsize=4096)
def _made(outline: SetKind, what: Hashable) -> list[Any]:
    """The code made so far for kinds of an outline."""
    return []
