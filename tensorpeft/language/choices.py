"""Values that differ from site to site: a mapping from selectors to them, of which the last that fits a site counts."""

from __future__ import annotations

from collections.abc import Iterator

from tensorpeft.language.diagnostics import Findings
from tensorpeft.language.grammar import parse_arithmetic, parse_selector
from tensorpeft.language.nodes import MappingNode, Node, Scalar
from tensorpeft.language.syntax import EVERYWHERE, Choice, Expression, Number, Selector


def entries(node: Node | None, key: str, findings: Findings) -> Iterator[tuple[Selector, Scalar]]:
    """Pairs of a selector and the text that it has under a node; a text without a selector is for all sites.

    A selector that does not parse, or that a later one hides, is a finding under ``key``.
    """
    if isinstance(node, Scalar):
        yield EVERYWHERE, node
    elif isinstance(node, MappingNode):
        earlier: list[_Reach] = []
        for name, text in node.items:
            with findings.under(key):
                reach = _Reach(parse_selector(name))
                for hidden in [other.selector for other in earlier if reach.covers(other)]:
                    message = (
                        f"`{hidden}` never counts, since `{reach.selector}` fits the same sites and stands after it"
                    )
                    findings.add(key, f"{message}; expected the general entries first", hidden.span)
                earlier = [other for other in earlier if not reach.covers(other)] + [reach]
                if isinstance(text, Scalar):
                    yield reach.selector, text


def expression(node: Node | None, key: str, findings: Findings) -> Expression:
    """A number or arithmetic, or one for each selector; 1 where it does not parse, which is a finding under ``key``."""
    found: list[tuple[Selector, Expression]] = []
    for selector, text in entries(node, key, findings):
        with findings.under(key):
            found.append((selector, parse_arithmetic(text)))
    if not found:
        return Number(1)
    if [selector for selector, _ in found] == [EVERYWHERE]:
        return found[0][1]
    return Choice(tuple(found), node.span if node else None)


class _Reach:
    """The matrices and layers that a selector names. Patterns count as names: which modules they fit, only a model says."""

    def __init__(self, selector: Selector) -> None:
        self.selector = selector
        self.matrices = frozenset(selector.matrices)
        self.layers = None if selector.layers is None else frozenset(selector.layers)

    def covers(self, other: _Reach) -> bool:
        """Whether every site of another selector is one of this selector's."""
        matrices = not self.matrices or (bool(other.matrices) and other.matrices <= self.matrices)
        layers = self.layers is None or (other.layers is not None and other.layers <= self.layers)
        return matrices and layers
