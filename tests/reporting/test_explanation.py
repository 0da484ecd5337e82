"""An explanation shows each kind of code once, and all of it as data."""

from __future__ import annotations

from tensorpeft.emission.emit import emit
from tensorpeft.language.loader import load_spec
from tensorpeft.pipeline import front, shape_of
from tensorpeft.reporting.explanation import explanation
from tensorpeft.reporting.page import Listing


def test_code_that_differs_in_numbers_alone_is_told_once():
    plan = front(load_spec("partial_lora", mask={"B[d_out]": "bernoulli(0.5)"}), shape_of("roberta-base"))
    code = tuple(Listing(caption, text) for caption, text in emit(plan).listings())
    found = explanation(plan, code)
    assert len(found.to_data()["code"]) == len(code) > 24
    told = [listing.caption.partition("; and ") for listing in found.listings]
    assert len(told) < 10
    assert sum(1 + int(more.split()[0]) if more else 1 for _, _, more in told) == len(code)
    assert found.listings[0] == code[0]


def test_the_norms_of_dora_are_told_too():
    (norms,) = [
        text for caption, text in emit(front("dora", shape_of("roberta-base"))).listings() if "norms" in caption
    ]
    assert norms.startswith("def norms(")
    assert ".sqrt()" in norms


def test_code_of_other_shapes_is_told_by_itself():
    code = (
        Listing("at 2 sites", "mm(x, 3)"),
        Listing("at 4 sites", "mm(x, 5)"),
        Listing("at 4 sites", "mul(x, 5)"),
        Listing("once", "mm(x, 3)"),
    )
    found = explanation(front("lora", shape_of("roberta-base")), code)
    assert found.listings == (
        Listing("at 2 sites; and 1 that differ in numbers alone", "mm(x, 3)"),
        code[2],
        code[3],
    )
