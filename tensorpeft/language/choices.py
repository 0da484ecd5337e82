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
        earlier: list[Selector] = []
        for name, text in node.items:
            with findings.under(key):
                selector = parse_selector(name)
                hidden = [other for other in earlier if _covers(selector, other)]
                for other in hidden:
                    message = f"`{other}` never counts, since `{selector}` fits the same sites"
                    findings.add(key, f"{message} and stands after it; expected the general entries first", other.span)
                earlier = [*(other for other in earlier if other not in hidden), selector]
                if isinstance(text, Scalar):
                    yield selector, text


def expression(node: Node | None, key: str, findings: Findings) -> Expression:
    """A number or arithmetic, or one for each selector; 1 where it does not parse, which is a finding under ``key``."""
    found: list[tuple[Selector, Expression]] = []
    for selector, text in entries(node, key, findings):
        with findings.under(key):
            found.append((selector, parse_arithmetic(text)))
    if not found:
        return Number(1)
    return found[0][1] if [at for at, _ in found] == [EVERYWHERE] else Choice(tuple(found), node.span if node else None)


def _covers(selector: Selector, other: Selector) -> bool:
    """Whether every site of another selector is one of this one's; which sites a pattern fits, only a model says."""
    named = not selector.matrices or (other.matrices != () and {*other.matrices} <= {*selector.matrices})
    return named and (selector.layers is None or (other.layers is not None and {*other.layers} <= {*selector.layers}))
