"""``specs/README.md`` shows what the catalogue has now; ``--update-golden`` writes it."""

from __future__ import annotations

import pytest

from tensorpeft.language.shipped import method_paths
from tensorpeft.model.family import families
from tests import catalogue_page, published


def test_the_page_is_up_to_date(update_golden):
    page = catalogue_page.PAGE.read_text(encoding="utf-8")
    wanted = catalogue_page.filled(page)
    if update_golden:
        catalogue_page.PAGE.write_text(wanted, encoding="utf-8")
    assert catalogue_page.PAGE.read_text(encoding="utf-8") == wanted


def test_every_family_has_an_architecture_on_the_page():
    assert set(families()) <= set(catalogue_page.ARCHITECTURES), "missing in tests/golden/architectures.yaml"


@pytest.mark.parametrize("name", method_paths())
def test_a_spec_fits_something(name):
    assert any(catalogue_page.outcome(name, shape) is None for shape in catalogue_page.shapes().values())


def test_a_refusal_is_a_key_of_the_spec_and_a_place_in_its_file():
    refusal = catalogue_page.outcome("lora", catalogue_page.shapes()["mamba"])
    assert refusal is not None
    assert refusal.key == "target"
    assert refusal.message == "`query` matches nothing"
    assert refusal.place == "specs/lora.yaml:5:21"


def test_every_published_count_is_on_the_page():
    page = catalogue_page.PAGE.read_text(encoding="utf-8")
    table = page.partition("<!-- published counts -->")[2].partition("<!-- end -->")[0]
    rows = table.strip().splitlines()[2:]
    assert len(rows) == len(published.ROWS)
    for shown, row in zip(rows, published.ROWS, strict=True):
        cells = [cell.strip() for cell in shown.strip("|").split("|")]
        assert cells[6] == f"{row['count']:,}"
        assert cells[7] == cells[6]
