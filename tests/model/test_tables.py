"""The tables under ``specs/models`` are as their schema says, and a slip in a key is told when they are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from tensorpeft.language.errors import ModelError
from tensorpeft.model import cards, family
from tensorpeft.model.cards import model_shape
from tensorpeft.model.tables import FOLDER, read_table
from tests.model.configs import LLAMA

SCHEMA = json.loads((FOLDER / "schema.json").read_text())
KIND_OF = {
    **dict.fromkeys(FOLDER.glob("families/*.yaml"), "family"),
    **dict.fromkeys(FOLDER.glob("*.yaml"), "card"),
    **{path: path.stem for path in FOLDER.glob("conventions/*.yaml")},
}


@pytest.mark.parametrize("path", sorted(KIND_OF), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_table_is_as_its_schema_says(path: Path) -> None:
    validator = Draft202012Validator({**SCHEMA, "$ref": f"#/$defs/{KIND_OF[path]}"})
    table = yaml.safe_load(path.read_text())
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(table)] == []
    assert read_table(path, KIND_OF[path]) == table


def test_the_schema_is_one_itself_and_every_key_of_it_is_used() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    text = "".join(path.read_text() for path in KIND_OF)
    keys = {key for part in SCHEMA["$defs"].values() for key in part.get("properties", {})}
    assert {key for key in keys if f"{key}:" not in text} == set()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the llama table and of a card, read instead of those that ship."""
    for name in ("families/llama.yaml", "llama-2-7b.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((FOLDER / name).read_text())
    for module in (family, cards):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    family._table.cache_clear()
    yield tmp_path
    family._table.cache_clear()


SLIPS = [
    ("families/llama.yaml", "heads: {d_out: heads}, bias: qkv_bias", "heads: {d_out: heads}, bais: qkv_bias",
     "unknown key `bais` in `matrices.query`; did you mean `bias`?"),
    ("families/llama.yaml", "norms: (2", "nroms: (2", "unknown key `nroms`; did you mean `norms`?"),
    ("families/llama.yaml", "heads: {d_out: heads}", "heads: {out: heads}",
     "unknown key `out` in `matrices.query.heads`; did you mean `d_out`?"),
    ("families/llama.yaml", "tied: tied}", "teid: tied}",
     "unknown key `teid` in `classes.ForCausalLM.modules.lm_head`; did you mean `tied`?"),
    ("families/llama.yaml", "reads:", "same:",
     "unknown key `same`; expected one of `like`, `stem`, `prefix`, `config`, `sizes`, `switches`, `matrices`, `reads`, "
     "`uncalled`, `unused`, `modules`, `norms`, `norm_biases`, `parameters`, `biases`, `classes`, `uncounted`"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "right", "wrong", "message"), SLIPS, ids=[wrong for _, _, wrong, _ in SLIPS])
def test_a_slip_in_a_key_of_a_family(name: str, right: str, wrong: str, message: str, folder: Path) -> None:
    assert model_shape(LLAMA).n_parameters
    family._table.cache_clear()
    text = (folder / name).read_text()
    assert right in text
    (folder / name).write_text(text.replace(right, wrong, 1))
    with pytest.raises(ModelError) as caught:
        model_shape(LLAMA)
    assert str(caught.value) == f"config: {folder / name}: {message}"


def test_a_slip_in_a_key_of_a_card(folder: Path) -> None:
    card = folder / "llama-2-7b.yaml"
    with card.open("a") as file:
        file.write("tie_word_embedings: true\n")
    with pytest.raises(ModelError) as caught:
        model_shape("llama-2-7b")
    assert str(caught.value) == (
        "llama-2-7b.yaml: the table of `llama` reads no key `tie_word_embedings`; did you mean `tie_word_embeddings`?"
    )


def test_the_folders_are_listed_once() -> None:
    """A scan asks at every module of a model, and there may be 100,000."""
    assert family.families() is family.families()
    assert cards.cards() is cards.cards()
