"""A network as a picture.

Factors are boxes, modes are labels between them, and a line says that a factor carries a mode. x enters on the left. What is
bound from outside, the site and the task, are rails below: a factor that carries one has a knot on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree as ET

from tensorpeft.language.syntax import Spectral
from tensorpeft.network.graph import is_copy
from tensorpeft.network.network import Network, Operand
from tensorpeft.network.rank import lora_rank
from tensorpeft.reporting import svg
from tensorpeft.reporting.counting import formulas
from tensorpeft.reporting.panels import GraphNode, Panel, columns, heights, panels, sites_of, span_of
from tensorpeft.reporting.svg import Box

_MARGIN, _GAP, _ROW, _RAIL = 24, 56, 62, 28  # px: around, between columns, between rows, between rails
_BOX, _LABEL = 42, 24  # px: heights of a factor and of a mode
_WRAPPED = 100  # characters in a line of text

_SIDES = ("input", "output")
_FACTORS = ("trained", "seeded", "stored", "base", "masked")
_BADGES = {"starts-at-zero": "0", "starts-from-W": "W"}
# what the legend says of a class; before it, the classes that its sample has besides
_MEANINGS = (
    ("", "trained", "trained factor, and its numbers"),
    ("frozen", "seeded", "frozen, made again when loaded"),
    ("frozen", "stored", "frozen, in the checkpoint"),
    ("", "base", "base weight"),
    ("trained", "masked", "masked: what is left out does not exist"),
    ("", "starts-at-zero", "starts at zero"),
    ("", "starts-from-W", "starts from the base weight"),
    ("", "input", "index of the input"),
    ("", "output", "index of the output"),
    ("", "bond", "bond, summed over"),
    ("bond", "copy", "copy tensor: ties more than two"),
    ("", "minimum-cut", "minimum cut: dW has rank {rank:,} at most"),
    ("", "site", "bound to a site"),
    ("", "task", "bound to a row of the batch"),
)


def drawing(network: Network) -> str:
    """The network of an adapter as an SVG picture: a panel for every product of its update, and a legend.

    Classes and ``data-factor``, ``data-mode`` of the elements say what they stand for.
    """
    root = ET.Element("svg", xmlns="http://www.w3.org/2000/svg")
    ET.SubElement(root, "style").text = svg.STYLE
    background = ET.SubElement(root, "rect", fill="#fff")
    spec = network.spec
    y = svg.paragraph(root, _MARGIN, _MARGIN + 8, f"{spec.name} on {network.model.name}", "title", _WRAPPED)
    for formula in formulas(spec):
        y = svg.paragraph(root, _MARGIN, y, formula, "small", _WRAPPED)
    right, used = _MARGIN + _WRAPPED * svg.CHARACTER, set[str]()
    for panel in panels(network):
        group = ET.SubElement(root, "g", {"class": "panel"})
        sign = "- " if panel.sign < 0 else "+ " if panel.is_summand else ""
        end, y = _panel(group, panel, sign, y + 14)
        right = max(right, end)
        used.update(name for element in group.iter("g") for name in element.get("class", "").split())
    y = _legend(root, used, lora_rank(network), y + 16, right)
    for key, value in {"width": right + _MARGIN, "height": y + _MARGIN}.items():
        root.set(key, f"{value:g}")
        background.set(key, f"{value:g}")
    root.set("viewBox", f"0 0 {root.get('width')} {root.get('height')}")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode") + "\n"


def _panel(group: ET.Element, panel: Panel, sign: str, top: float) -> tuple[float, float]:
    """Draw a product; its right end and its bottom. Lines come first, what covers their ends after them."""
    top = svg.paragraph(group, _MARGIN, top, sign + sites_of(panel.sites), "name", 2 * _WRAPPED)
    places = _places(panel, top)
    right = max(place.right for place in places.values())
    bottom = max(place.bottom for place in places.values()) + 30
    rails = {mode: bottom + _RAIL * at for at, mode in enumerate(panel.rails)}
    labels = max((svg.width(_sized(mode, panel)) for mode in rails), default=0) + 18
    for y in rails.values():
        svg.line(group, "rail", (_MARGIN, y), (max(right, _MARGIN + labels + _GAP), y))
    for number, mode in panel.edges:
        if mode not in rails:
            _edge(group, panel, number, mode, places)
    _drops(group, panel, places, rails)
    for mode, y in rails.items():
        _mode(group, panel, mode, Box(_MARGIN + labels / 2, y, labels, _LABEL - 2))
    for node, place in places.items():
        if isinstance(node, int):
            _factor(group, panel, node, place)
        else:
            _mode(group, panel, node, place)
    return right, (max(rails.values()) + _LABEL if rails else bottom)


def _places(panel: Panel, top: float) -> dict[GraphNode, Box]:
    """The boxes of all nodes but the rails."""
    found = columns(panel)
    middle = top + (max(map(len, found)) - 1) / 2 * _ROW + _BOX / 2
    left, places = float(_MARGIN), {}
    for column in found:
        sizes = {n: (svg.width(*_lines(panel, n)) + 22, _BOX if isinstance(n, int) else _LABEL) for n in column}
        widest = max(width for width, _ in sizes.values())
        for node, height in heights(column).items():
            places[node] = Box(left + widest / 2, middle + height * _ROW, *sizes[node])
        left += widest + _GAP
    return places


def _lines(panel: Panel, node: GraphNode) -> tuple[str, ...]:
    """The lines of text on a factor or a mode."""
    if isinstance(node, str):
        return (_sized(node, panel),)
    operand = panel.operands[node]
    return operand.factor, "base weight" if operand.is_base else f"{panel.counts[node]:,}"


def _sized(mode: str, panel: Panel) -> str:
    return f"{mode} = {span_of(panel.sizes[mode])}"


def _edge(group: ET.Element, panel: Panel, number: int, mode: str, places: dict[GraphNode, Box]) -> None:
    a, b = sorted((places[number], places[mode]), key=lambda place: place.x)
    bend = (b.left - a.right) / 2
    steps = f"M {a.right:g} {a.y:g} C {a.right + bend:g} {a.y:g} {b.left - bend:g} {b.y:g} {b.left:g} {b.y:g}"
    _named(svg.path(group, "edge", steps), panel.operands[number].factor, mode)


def _drops(group: ET.Element, panel: Panel, places: dict[GraphNode, Box], rails: dict[str, float]) -> None:
    """From every factor down to its rails; left of what stands below it in its column."""
    below: dict[float, int] = {}
    for number in sorted((n for n in places if isinstance(n, int)), key=lambda n: -places[n].y):
        place, factor = places[number], panel.operands[number].factor
        at = below[place.x] = below.get(place.x, -1) + 1
        carried = [mode for mode in panel.graph.neighbors(number) if mode in rails]
        if not carried:
            continue
        x = min(other.left for other in places.values() if other.x == place.x) - 10 * at if at else place.x
        start = f"M {place.left + 8:g} {place.bottom:g} v 6 H {x:g}" if at else f"M {x:g} {place.bottom:g}"
        svg.path(group, "drop", f"{start} V {max(rails[mode] for mode in carried):g}")
        for mode in carried:
            _named(svg.dot(group, "knot", x, rails[mode], 4), factor, mode)


def _named(element: ET.Element, factor: str, mode: str) -> None:
    element.set("data-factor", factor)
    element.set("data-mode", mode)


def _factor(group: ET.Element, panel: Panel, number: int, place: Box) -> None:
    operand = panel.operands[number]
    kinds = tuple(_kinds(operand))
    drawn = ET.SubElement(group, "g", {"class": " ".join(("factor", *kinds)), "data-factor": operand.factor})
    ET.SubElement(drawn, "title").text = _told(operand)
    svg.rectangle(drawn, "shape", place, 4)
    name, count = _lines(panel, number)
    svg.label(drawn, place.x, place.y - 3, name, "name")
    svg.label(drawn, place.x, place.y + 13, count, "small")
    for kind in kinds:
        if kind in _BADGES:
            svg.badge(drawn, place.right, place.top, _BADGES[kind])


def _kinds(operand: Operand) -> Iterator[str]:
    """The CSS classes of a factor: trained or frozen, and what is special about it."""
    block = operand.block
    if operand.is_base:
        yield "base"
        return
    yield "trained" if block.trainable else "frozen"
    if not block.trainable:
        yield "seeded" if block.seeded else "stored"
    if block.kept is not None:
        yield "masked"
    if isinstance(block.rule.init, Spectral):
        yield "starts-from-W"
    elif block.rule.init.name == "zeros":
        yield "starts-at-zero"


def _told(operand: Operand) -> str:
    block = operand.block
    shape = " x ".join(f"{axis.mode} {axis.size:,}" for axis in block.axes)
    return f"{operand.factor}: {shape}" if operand.is_base else f"{block.name}: {shape}; {block.rule.init}"


def _mode(group: ET.Element, panel: Panel, mode: str, place: Box) -> None:
    kind = panel.graph.nodes[mode]["kind"]
    copied = mode not in panel.rails and is_copy(panel.graph, mode)
    kinds = ["mode", kind, *["copy"] * copied, *["minimum-cut"] * (mode in panel.cut)]
    drawn = ET.SubElement(group, "g", {"class": " ".join(kinds), "data-mode": mode})
    _shape(drawn, kind, place)
    svg.label(drawn, place.x - 2 * (kind in _SIDES), place.y + 4, _sized(mode, panel))
    if mode in panel.cut:
        svg.rectangle(drawn, "cut", Box(place.x, place.y, place.width + 16, place.height + 12), 4)


def _shape(drawn: ET.Element, kind: str, place: Box) -> None:
    if kind in _SIDES:
        svg.arrow(drawn, "shape", place)
    else:
        svg.rectangle(drawn, "shape", place, place.height / 2)


def _legend(root: ET.Element, used: set[str], rank: int, top: float, right: float) -> float:
    """Draw what the CSS classes that occur mean; the bottom of the legend."""
    group = ET.SubElement(root, "g", {"class": "legend"})
    x, y = float(_MARGIN), top
    for besides, kind, told in _MEANINGS:
        if kind not in used:
            continue
        told = told.format(rank=rank)
        if x > _MARGIN and x + 32 + svg.width(told) > right:
            x, y = float(_MARGIN), y + _LABEL
        sample, place = ET.SubElement(group, "g", {"class": f"{besides} {kind}".strip()}), Box(x + 12, y, 24, 14)
        if kind in _BADGES:
            svg.badge(sample, place.x, place.y, _BADGES[kind])
        elif kind == "minimum-cut":
            svg.rectangle(sample, "cut", place, 4)
        elif kind in _FACTORS:
            svg.rectangle(sample, "shape", place, 4)
        else:
            _shape(sample, kind, place)
        svg.label(sample, x + 32, y + 4, told, "small", "start")
        x += 32 + svg.width(told) + 20
    return y
