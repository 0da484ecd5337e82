"""Pictures of every structure: well-formed, with the nodes and edges of the network, and nothing on top of anything else."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import combinations
from xml.etree import ElementTree as ET

import pytest

from tensorpeft.language.loader import load_spec
from tensorpeft.language.shipped import method_paths
from tensorpeft.model.shape import ModelShape
from tensorpeft.network.lower import lower
from tensorpeft.network.network import Network
from tensorpeft.network.rank import lora_rank, minimum_cut
from tensorpeft.pipeline import shape_of
from tensorpeft.reporting.drawing import drawing
from tensorpeft.reporting.panels import columns, panels
from tensorpeft.reporting.svg import CHARACTER
from tests.catalogue_page import fitted, without_scores
from tests.published import CLASSIFIER
from tests.structures import CASES, STRUCTURES, model

SVG = "{http://www.w3.org/2000/svg}"
LONE = dict(reversed(CASES))  # each structure with the first of its models
SPECS = {**STRUCTURES, **{name: name for name in method_paths()}}


@cache
def shapes(name: str) -> tuple[ModelShape, ...]:
    """Models of which a structure, or a shipped spec, fits one."""
    return (shape_of(model(LONE[name])),) if name in LONE else (shape_of(CLASSIFIER), shape_of("mixtral-8x7b"))


@cache
def network(name: str) -> Network:
    return fitted(without_scores(load_spec(SPECS[name])), *shapes(name))


def drawn(name: str) -> ET.Element:
    return ET.fromstring(drawing(network(name)))


def of_class(root: ET.Element, kind: str) -> list[ET.Element]:
    return [element for element in root.iter() if kind in element.get("class", "").split()]


def box(group: ET.Element) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of a node."""
    (shape,) = of_class(group, "shape")
    if shape.tag == f"{SVG}rect":
        x, y, width, height = (float(shape.get(key)) for key in ("x", "y", "width", "height"))
        return x, y, x + width, y + height
    corners = [tuple(map(float, corner.split(","))) for corner in shape.get("points").split()]
    return (
        min(x for x, _ in corners),
        min(y for _, y in corners),
        max(x for x, _ in corners),
        max(y for _, y in corners),
    )


@pytest.mark.parametrize("name", SPECS)
def test_nodes_and_edges_are_those_of_the_network(name):
    found = of_class(drawn(name), "panel")
    wanted = {}
    for group in network(name).groups:
        for term in group.terms:
            edges = tuple((o.factor, mode) for o in term.operands for mode in (*o.modes, *o.site_modes))
            wanted.setdefault((term.sign, edges, term.d_out, term.d_in), term)
    assert len(found) == len(wanted)
    for panel, ((_, edges, d_out, d_in), term) in zip(found, wanted.items(), strict=True):
        ends = [*of_class(panel, "edge"), *of_class(panel, "knot")]
        assert Counter((end.get("data-factor"), end.get("data-mode")) for end in ends) == Counter(edges)
        factors = Counter(node.get("data-factor") for node in of_class(panel, "factor"))
        assert factors == Counter(operand.factor for operand in term.operands)
        modes = [node.get("data-mode") for node in of_class(panel, "mode")]
        assert sorted(modes) == sorted({mode for _, mode in edges})
        assert {node.get("data-mode") for node in of_class(panel, "output")} == set(d_out)
        assert {node.get("data-mode") for node in of_class(panel, "input")} == set(d_in)
        ties = Counter(mode for _, mode in edges) + Counter((*d_out, *d_in))
        assert {node.get("data-mode") for node in of_class(panel, "copy")} == {
            mode for mode, n in ties.items() if n > 2 and mode in (*term.sizes,) and mode != "task"
        }


@pytest.mark.parametrize("name", SPECS)
def test_nothing_overlaps_and_all_is_inside(name):
    root = drawn(name)
    width, height = float(root.get("width")), float(root.get("height"))
    assert root.get("viewBox") == f"0 0 {width:g} {height:g}"
    nodes = [node for panel in of_class(root, "panel") for kind in ("factor", "mode") for node in of_class(panel, kind)]
    boxes = [box(node) for node in nodes]
    for node, (left, top, right, bottom) in zip(nodes, boxes, strict=True):
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert all(len(text.text) * CHARACTER < right - left for text in node.iter(f"{SVG}text") if len(text.text) > 1)
    for (left, top, right, bottom), (other_left, other_top, other_right, other_bottom) in combinations(boxes, 2):
        assert right <= other_left or other_right <= left or bottom <= other_top or other_bottom <= top
    told = of_class(of_class(root, "legend")[0], "small")
    assert all(float(text.get("x")) + len(text.text) * CHARACTER <= width for text in told)


@pytest.mark.parametrize("name", SPECS)
def test_edges_join_neighbouring_columns(name):
    for panel in panels(network(name)):
        column = {node: at for at, nodes in enumerate(columns(panel)) for node in nodes}
        assert {abs(column[a] - column[b]) for a, b in panel.edges if b not in panel.rails} <= {1}


def kinds(name: str) -> dict[str, set[str]]:
    return {node.get("data-factor"): {*node.get("class").split()} for node in of_class(drawn(name), "factor")}


def test_factors_are_told_apart():
    assert kinds("vera") == {
        "b": {"factor", "trained", "starts-at-zero"},
        "B": {"factor", "frozen", "seeded"},
        "d": {"factor", "trained"},
        "A": {"factor", "frozen", "seeded"},
    }
    assert kinds("shared_a")["A"] == {"factor", "frozen", "stored"}
    assert kinds("partial_lora")["A"] == {"factor", "trained", "masked"}
    assert [node.get("data-mode") for node in of_class(drawn("shared_a"), "task")] == ["task", None]  # and the legend's


def test_the_minimum_cut_is_marked():
    (term,) = network("lora").groups[0].terms
    assert minimum_cut(term) == ("r",)
    root = drawn("lora")
    assert [node.get("data-mode") for node in of_class(root, "minimum-cut")] == ["r", None]
    told = [text.text for text in of_class(root, "small")]
    assert f"minimum cut: dW has rank {lora_rank(network('lora'))} at most" in told


def test_numbers_are_those_of_the_blocks():
    texts = [text.text for text in of_class(drawn("shared_a"), "small")]
    assert {"1,179,648", "147,456"} <= set(texts)
    labels = {text.text for text in of_class(drawn("shared_a"), "label")}
    assert {"task = 8", "matrix = 2", "layer = 12", "d_in = 768", "d_out = 768", "r = 8"} == labels


def test_sizes_that_differ_are_all_told():
    picture = ET.fromstring(drawing(lower(load_spec("lorta"), shape_of("llama-3-70b"))))
    labels = [text.text for text in of_class(picture, "label")]
    assert labels.count("head = 8 | 64") == 1  # the outputs of query, key and value
    assert labels.count("head = 64") == 1  # the input of out
    titles = [text.text for text in of_class(picture, "name")]
    assert "240 sites: query, key, value of layers 0-79, dW 8,192 x 8,192 | 1,024 x 8,192" in titles
