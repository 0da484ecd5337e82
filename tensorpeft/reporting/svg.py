"""The shapes and the style of a picture: elements of SVG, by xml.etree. All lengths are pixels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from xml.etree import ElementTree as ET

CHARACTER = 7.25  # the width of a character
LINE = 18  # from one line of text to the next

STYLE = """
text { font: 12px ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace; fill: #1f2933 }
.title { font-weight: bold; font-size: 14px }
.name { font-weight: bold }
.small { font-size: 11px; fill: #52606d }
.edge { fill: none; stroke: #7b8794; stroke-width: 1.5 }
.rail { stroke: #9aa5b1; stroke-width: 2 }
.drop { fill: none; stroke: #9aa5b1; stroke-dasharray: 3 3 }
.knot { fill: #52606d }
.shape { stroke-width: 1.5 }
.trained .shape { fill: #fde8c8; stroke: #c77700 }
.frozen .shape { fill: #e4e7eb; stroke: #7b8794 }
.stored .shape { stroke-width: 3 }
.base .shape { fill: #cbd2d9; stroke: #323f4b; stroke-width: 2.5 }
.masked .shape { stroke-dasharray: 6 3 }
.input .shape { fill: #d5e8fb; stroke: #2b6cb0 }
.output .shape { fill: #dcf3dd; stroke: #2f855a }
.bond .shape { fill: #fff; stroke: #7b8794 }
.site .shape { fill: #f5f7fa; stroke: #9aa5b1 }
.task .shape { fill: #efe3fb; stroke: #7d4bb5 }
.copy .shape { stroke-width: 3 }
.cut { fill: none; stroke: #d64545; stroke-width: 1.5; stroke-dasharray: 4 3 }
.badge { fill: #fff; stroke: #52606d; stroke-width: 1.5 }
.letter { font-size: 10px; font-weight: bold }
"""


@dataclass(frozen=True)
class Box:
    """A rectangle around a middle."""

    x: float
    y: float
    width: float
    height: float

    @property
    def left(self) -> float:
        return self.x - self.width / 2

    @property
    def right(self) -> float:
        return self.x + self.width / 2

    @property
    def top(self) -> float:
        return self.y - self.height / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height / 2


def width(*lines: str) -> float:
    """Of the longest line of text."""
    return max(map(len, lines)) * CHARACTER


def rectangle(parent: ET.Element, kind: str, place: Box, radius: float) -> None:
    """A box with round corners."""
    _put(parent, "rect", kind, x=place.left, y=place.top, width=place.width, height=place.height, rx=radius)


def arrow(parent: ET.Element, kind: str, place: Box) -> None:
    """A label with a tip to the right."""
    tip = place.right - 9
    upper = [(place.left, place.top), (tip, place.top), (place.right, place.y)]
    corners = [*upper, (tip, place.bottom), (place.left, place.bottom)]
    shape = ET.SubElement(parent, "polygon", {"class": kind})
    shape.set("points", " ".join(f"{x:g},{y:g}" for x, y in corners))


def line(parent: ET.Element, kind: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    """A straight line."""
    _put(parent, "line", kind, x1=start[0], y1=start[1], x2=end[0], y2=end[1])


def dot(parent: ET.Element, kind: str, x: float, y: float, radius: float) -> ET.Element:
    """A filled circle."""
    return _put(parent, "circle", kind, cx=x, cy=y, r=radius)


def path(parent: ET.Element, kind: str, steps: str) -> ET.Element:
    """A line along the steps of an SVG path."""
    return ET.SubElement(parent, "path", {"class": kind, "d": steps})


def label(parent: ET.Element, x: float, y: float, content: str, kind: str = "label", anchor: str = "middle") -> None:
    """A text on one line."""
    shown = _put(parent, "text", kind, x=x, y=y)
    shown.set("text-anchor", anchor)
    shown.text = content


def badge(parent: ET.Element, x: float, y: float, letter: str) -> None:
    """A letter in a circle, on the corner of a factor."""
    dot(parent, "badge", x, y, 8)
    label(parent, x, y + 3.5, letter, "letter")


def paragraph(parent: ET.Element, x: float, y: float, content: str, kind: str, characters: int) -> float:
    """Lines of text, broken after operators; where the next line would be."""
    lines = [""]
    for piece in re.split(r"(?<= [*+-] )", content):
        if lines[-1].strip() and len(lines[-1]) + len(piece) > characters:
            lines.append("")
        lines[-1] += piece
    for number, each in enumerate(lines):
        label(parent, x + (number > 0) * 4 * CHARACTER, y, each.rstrip(), kind, "start")
        y += LINE
    return y


def _put(parent: ET.Element, tag: str, kind: str, **numbers: float) -> ET.Element:
    return ET.SubElement(parent, tag, {"class": kind, **{key: f"{value:g}" for key, value in numbers.items()}})
