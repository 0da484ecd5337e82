"""The ledger of the base: what adapters make of each parameter, whatever module it was reached through.

A parameter is its own bits and an ordered list of what is added to them. Nothing is undone by putting back what was there before:
``settle`` writes what the list comes to, so that merges may end in any order, and with the list empty the bits are there again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn


class Addition(Protocol):
    """Something that an adapter adds to a weight of the base."""

    @property
    def holder(self) -> object:
        """The adapter's state."""

    @property
    def is_active(self) -> bool:
        """Whether it is to be in the weight now."""

    def added_to(self, values: Tensor) -> Tensor:
        """The sum, in the wider of the two dtypes."""


class BaseParameter:
    """A parameter of a base: its own bits and its flag, and who holds it.

    While somebody holds it, it is frozen, but for what its one ``trainer`` trains.
    """

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter
        self.requires_grad = parameter.requires_grad  # as the model had it
        self.holders: list[object] = []
        self.trainer: object | None = None
        self.adapted_by: list[object] = []  # who has a site in it
        self.own: Tensor | None = None  # its bits, while something is added to them
        self.additions: tuple[Addition, ...] = ()
        self._written: tuple[Addition, ...] | None = ()  # what the parameter holds beside its bits; None: not known
        self._version = parameter._version if not parameter.is_inference() else 0

    # Flags

    def hold(self, holder: object) -> None:
        """Freeze it for somebody."""
        if holder not in self.holders:
            self.holders.append(holder)
        self._flag()

    def let_go(self, holder: object) -> None:
        """The opposite; when nobody holds it any more, it has the flag that the model had."""
        self.holders = [each for each in self.holders if each is not holder]
        self.adapted_by = [each for each in self.adapted_by if each is not holder]
        if self.trainer is holder:
            self.trainer = None
        self._flag()

    def _flag(self) -> None:
        wanted = self.trainer is not None if self.holders else self.requires_grad
        if self.parameter.requires_grad != wanted:
            self.parameter.requires_grad_(wanted)

    # Numbers

    @property
    def bits(self) -> Tensor:
        """The values that it has of its own."""
        return self.parameter.detach() if self.own is None else self.own

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is added to it, and nothing half taken off."""
        return not self.additions and self._written == () and self.own is None

    @property
    def was_changed(self) -> bool:
        """Whether somebody else has written to it since something was added."""
        return bool(self.additions) and self._written is not None and self.parameter._version != self._version

    def add(self, addition: Addition) -> None:
        """Put something at the end of the list, and write it."""
        self.additions = (*self.additions, addition)
        self.settle()

    def take(self, holder: object) -> None:
        """Take everything of an adapter off the list."""
        left = tuple(each for each in self.additions if each.holder is not holder)
        if left != self.additions:
            self.additions = left
        self.settle()

    def keep(self, holder: object) -> None:
        """Let what an adapter added be part of the parameter's own bits from now on; or what somebody else wrote there."""
        mine = [each for each in self.additions if each.holder is holder]
        left = tuple(each for each in self.additions if each.holder is not holder)
        if mine and self.was_changed and not left:
            self.own, self.additions, self._written = None, (), ()
        elif mine:
            self.own, self.additions, self._written = self._sum(self.bits, mine), left, None
        self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Let the parameter have its own bits and what is active of the list. It may be called again at any time."""
        wanted = tuple(each for each in self.additions if each.is_active)
        if wanted != self._written:
            with torch.inference_mode(False):
                if self.own is None:
                    self.own = self.parameter.detach().clone()
                values = self._sum(self.own, wanted)
            self._written = None  # if this is interrupted, nobody believes what is there
            self.parameter.copy_(values)
            self._version, self._written = self.parameter._version, wanted
        if not self.additions:
            self.own = None

    @torch.no_grad()
    def _sum(self, bits: Tensor, additions: Iterable[Addition]) -> Tensor:
        values = bits
        for each in additions:
            values = each.added_to(values)
        return values.to(bits.dtype)

    def move(self, parameter: nn.Parameter) -> None:
        """Let it stand for another parameter, which the model has in the place of this one."""
        _known.pop(id(self.parameter), None)
        self.parameter = parameter
        _known[id(parameter)] = self
        self._flag()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._version = self.parameter._version  # a copy has a count of its own
        _known[id(self.parameter)] = self


# Each entry keeps its parameter alive, so no other parameter can have its id; who holds the parameter keeps the entry alive.
_known: WeakValueDictionary[int, BaseParameter] = WeakValueDictionary()


def entry(parameter: nn.Parameter) -> BaseParameter:
    """The entry of a parameter, new if nobody has one."""
    found = known(parameter)
    if found is None:
        found = _known[id(parameter)] = BaseParameter(parameter)
    return found


def known(parameter: object) -> BaseParameter | None:
    """The entry of a parameter, if somebody has one."""
    return _known.get(id(parameter))
