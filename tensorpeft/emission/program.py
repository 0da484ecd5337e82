"""The program of a kind of input set: its functions, those that no compiler follows made when they are first needed."""

from __future__ import annotations

from functools import cache, cached_property, lru_cache

from tensorpeft.emission.set_code import SetCode
from tensorpeft.emission.set_graph import Function
from tensorpeft.emission.set_kind import SetKind


class SetProgram:
    """The functions of a kind of input set."""

    def __init__(self, kind: SetKind) -> None:
        self.kind = kind
        self._code = SetCode(kind)
        self.forward = self._code.forward
        self.new_landings = tuple(self._code.landing(n, in_place=False) for n in range(len(kind.modules)))
        self.backward = cache(self._code.backward)

    @cached_property
    def landings(self) -> tuple[Function, ...]:
        """Of each module: its updates added in the memory of its output. ``new_landings`` leave the output as it is."""
        return tuple(self._code.landing(n, in_place=True) for n in range(len(self.kind.modules)))

    @property
    def whole(self) -> Function:
        """The backward pass from all modules to everything."""
        return self.backward(frozenset(range(len(self.kind.modules))), to_x=True, to_pieces=True)


@lru_cache(maxsize=1024)
def program(kind: SetKind) -> SetProgram:
    """Adapters of the same spec share their programs: a compiled model need not be compiled again for another of them."""
    return SetProgram(kind)
