"""The command line: what it prints, where, and with which exit code. The printed texts are files in ``golden/``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from tensorpeft import cli
from tensorpeft.cli import main
from tensorpeft.language.errors import SpecError
from tensorpeft.language.loader import load_spec
from tensorpeft.language.shipped import method_paths
from tensorpeft.model.cards import cards
from tensorpeft.pipeline import report as reported
from tensorpeft.reporting.catalogue import catalogue

GOLDEN = Path(__file__).parent / "golden"
SHIPPED = Path(__file__).resolve().parents[1] / "specs"
WRONG = """\
tensorpeft: 1
name: wrong
target: {matrices: [query]}
structure: matrx
rank: -1
"""


def call(*args: str) -> Result:
    return CliRunner().invoke(main, args, prog_name="tensorpeft")


def done(*args: str) -> str:
    result = call(*args)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


TRANSCRIPTS = {
    "report_lorta.txt": ["report", "lorta", "--model", "llama-3-70b"],
    "report_lorta.md": ["report", "lorta", "--model", "llama-3-70b", "--format", "md"],
    "report_lorta.json": ["report", "lorta", "--model", "llama-3-70b", "--format", "json"],
    "report_vera.html": ["report", "vera", "--model", "vit-base", "--format", "html"],
    "report_shared_a.txt": ["report", "shared_a", "--model", "roberta-base"],
    "report_partial_lora.txt": [
        "report",
        "partial_lora",
        "--model",
        "roberta-base",
        "--set",
        "mask={'B[d_out]': keep(100)}",
    ],
    "comparison.txt": ["report", "lora", "lorta", "vera", "--model", "llama-2-7b", "--set", "rank=1,4,16,64"],
    "comparison.md": ["sweep", "lora", "lorta", "--model", "llama-2-7b", "--budget", "600k,2.5M", "--format", "md"],
    "expand_lorta.yaml": ["expand", "lorta"],
}


@pytest.mark.parametrize("name", TRANSCRIPTS)
def test_printed_texts(name, update_golden):
    path, found = GOLDEN / name, done(*TRANSCRIPTS[name])
    if update_golden:
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")


REFUSED = [
    ["report", "lroa", "--model", "llama-2-7b"],
    ["report", "lora", "--model", "llama-2-8b"],
    ["report", "lora", "--model", "llama-2-7b", "--set", "rank"],
    ["report", "lora", "--model", "llama-2-7b", "--set", "rnak=4"],
    ["report", "lora", "--model", "llama-2-7b", "--set", "rank=4,0"],
    ["report", "lora", "--model", "llama-2-7b", "--set", "matrices=[query, valeu]"],
    ["report", "lorta", "--model", "llama-2-7b", "--set", "matrices=[down]"],
    ["expand", "missing.yaml"],
    ["check", "wrong.yaml", "lroa"],
    ["sweep", "lora", "vera", "--model", "llama-2-7b", "--budget", "10k"],
    ["sweep", "constant.yaml", "--model", "llama-2-7b", "--budget", "10k"],
]
ABSENT = """\
tensorpeft: 1
name: absent
target: {matrices: [fc1]}
structure: matrix
rank: 4
"""
CONSTANT = """\
tensorpeft: 1
name: constant
target: {matrices: [query]}
rank: {r: 4}
update: b[matrix, layer, d_out] * B[d_out, r] * A[r, d_in]
factors: {b: {init: zeros}, B: {init: normal(1), frozen: true}, A: {init: normal(1), frozen: true}}
"""


def test_refusals(update_golden, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text(WRONG, encoding="utf-8")
    Path("constant.yaml").write_text(CONSTANT, encoding="utf-8")
    said = []
    for command in REFUSED:
        result = call(*command)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        said.append(f"$ tensorpeft {' '.join(command)}\n{result.stderr}")
    path = GOLDEN / "refusals.txt"
    if update_golden:
        path.write_text("\n".join(said), encoding="utf-8")
    assert "\n".join(said) == path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["report", "lora"], "--model"),
        (["report", "--model", "llama-2-7b"], "SPEC"),
        (["report", "lora", "--modle", "llama-2-7b"], "--model"),
        (["report", "lora", "--model", "llama-2-7b", "--format", "yaml"], "json"),
        (["reprot", "lora"], "reprot"),
        (["sweep", "lora", "--model", "llama-2-7b"], "Give --set or --budget."),
        (["sweep", "lora", "--model", "llama-2-7b", "--budget", "1k", "--set", "rank=4"], "--budget finds the rank"),
        (["sweep", "lora", "--model", "llama-2-7b", "--budget", "10q"], "'10q' is not a number of parameters"),
        (["sweep", "lora", "--model", "llama-2-7b", "--budget", "10k,"], "'' is not a number of parameters"),
        (["sweep", "lora", "--model", "llama-2-7b", "--budget", "inf"], "'inf' is not a number of parameters"),
        (["sweep", "lora", "--model", "llama-2-7b", "--budget", "2.5"], "'2.5' is not a number of parameters"),
        (["sweep", "lora", "--model", "llama-2-7b", "--budget", "1e4"], "'1e4' is not a number of parameters"),
        (["sweep", "lora", "--model", "llama-2-7b", "--budget", "-3"], "'-3' is not a number of parameters"),
    ],
)
def test_wrong_options(command, named):
    result = call(*command)
    assert result.exit_code == 2
    assert named in result.stderr
    assert result.stdout == ""


def test_check_tells_the_right_from_the_wrong(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(WRONG, encoding="utf-8")
    result = call("check", "lora", str(path), "vera")
    assert result.exit_code == 2
    assert result.stdout == "lora: ok\nvera: ok\n"
    assert f"{path}:4:12: " in result.stderr  # both of its problems
    assert f"{path}:5:7: " in result.stderr


def test_check_as_data(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(WRONG, encoding="utf-8")
    result = call("check", "lora", str(path), "lroa", "--format", "json")
    assert (result.exit_code, result.stderr) == (2, "")
    right, wrong, unknown = json.loads(result.stdout)
    assert right == {"spec": "lora", "ok": True, "problems": []}
    assert [(p["source"], p["line"], p["column"]) for p in wrong["problems"]] == [(str(path), 4, 12), (str(path), 5, 7)]
    assert wrong["problems"][0]["message"].startswith("`structure` is the text `matrx`; expected one of ")
    message = "no method is called `lroa`; did you mean `lora`?"
    assert unknown["problems"] == [{"message": message, "source": None, "line": None, "column": None}]
    assert call("check", "lora", "--format", "json").exit_code == 0


def test_check_of_everything_that_ships():
    files = sorted(map(str, SHIPPED.glob("*.yaml")))
    assert done("check", *files).splitlines() == [f"{file}: ok" for file in files]


def test_expanding_is_idempotent(tmp_path):
    once = tmp_path / "once.yaml"
    once.write_text(done("expand", "partial_lora"), encoding="utf-8")
    assert done("expand", str(once)) == once.read_text(encoding="utf-8")
    assert load_spec(once) == load_spec("partial_lora")


def test_several_values_are_a_product_in_order():
    shown = done(
        "report",
        "lora",
        "--model",
        "vit-base",
        "--format",
        "json",
        "--set",
        "rank=1,4",
        "--set",
        "matrices=[query, key],[out]",
    )
    rows = json.loads(shown)
    assert [row["settings"] for row in rows] == [
        {"rank": "1", "matrices": "[query, key]"},
        {"rank": "1", "matrices": "[out]"},
        {"rank": "4", "matrices": "[query, key]"},
        {"rank": "4", "matrices": "[out]"},
    ]
    assert [row["trainable"] for row in rows] == [12 * 1536 * n for n in (2, 1, 8, 4)]
    assert rows[0]["stored"] == 12 * 1536 * 2
    assert rows[0]["bytes"]["checkpoint"] == 4 * 12 * 1536 * 2


def test_json_of_one_spec_is_an_object():
    found = json.loads(done("report", "vera", "--model", "vit-base", "--format", "json", "--set", "rank=2"))
    wanted = ["trainable", "frozen_stored", "frozen_seeded", "stored", "base", "flops_per_token", "lora_rank"]
    assert all(type(found[key]) is int for key in wanted)
    assert found["trainable"] == 24 * (768 + 2)
    assert found["frozen_seeded"] == 2 * 768 * 2
    assert found["percent"] == pytest.approx(100 * 24 * 770 / 85_798_656)
    assert [factor["name"] for factor in found["factors"]] == ["b", "B", "d", "A"]
    assert found["factors"][0] == {
        "name": "b",
        "factor": "b",
        "modes": ["matrix", "layer", "d_out"],
        "shape": [2, 12, 768],
        "count": 18432,
        "trainable": True,
        "stored": True,
        "masked": False,
        "init": "zeros",
        "lr": 1.0,
    }


@pytest.mark.parametrize("budget", [4292, 4293, 100_000, 1_000_000])
def test_a_budget_is_used_up(budget):
    """LoRTA on q, k, v, o of Llama-2-7B has 4 + 32 + 32 + 128 + 4096 = 4,292 numbers for each step of its rank."""
    shown = done("sweep", "lorta", "--model", "llama-2-7b", "--budget", str(budget), "--format", "json")
    (row,) = json.loads(shown)
    assert row["trainable"] == budget // 4292 * 4292
    assert row["settings"] == {"budget": str(budget), "rank": str(budget // 4292)}


def test_what_does_not_fit_is_listed_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("constant.yaml").write_text(CONSTANT, encoding="utf-8")
    Path("absent.yaml").write_text(ABSENT, encoding="utf-8")
    specs = ["lora", "lorta", "constant.yaml", "absent.yaml"]
    command = ["sweep", *specs, "--model", "llama-2-7b", "--budget", "10k,100k"]
    rows = json.loads(done(*command, "--format", "json"))
    fitting, refused = rows[:2], rows[2:]
    assert [(row["name"], row["settings"]["budget"]) for row in fitting] == [("lorta", "10000"), ("lorta", "100000")]
    assert all("refused" not in row for row in fitting)
    assert [(row["name"], row["settings"]) for row in refused] == [
        (name, {"budget": budget}) for name in ("lora", "constant", "absent") for budget in ("10000", "100000")
    ]
    reasons = [row["refused"].splitlines()[0] for row in refused[::2]]
    assert "the budget is 10,000, but rank 1 trains 524,288 numbers already" in reasons[0]
    assert "131,072 numbers are trained at every rank" in reasons[1]
    assert reasons[2].startswith("absent.yaml:3:21: `fc1` matches nothing in llama-2-7b")
    shown = done(*command)
    assert all(reason in shown for reason in reasons)


def test_a_sweep_of_the_whole_catalogue():
    """Every method has its row, at a rank of which the next does not fit, or the reason why not."""
    rows = json.loads(done("sweep", "--model", "roberta-base", "--budget", "300k", "--format", "json"))
    assert sorted(row["name"] for row in rows) == sorted(method_paths())
    assert len({row["name"] for row in rows if "refused" not in row}) > len(rows) / 2
    for row in rows:
        if "refused" not in row:
            rank = int(row["settings"]["rank"])
            assert row["trainable"] == count(row["name"], "roberta-base", rank=rank)
            assert row["trainable"] <= 300_000
            assert exceeds(row["name"], rank + 1, 300_000)


def exceeds(name: str, rank: int, budget: int) -> bool:
    """Whether a rank trains more; or is refused, as where blocks must divide the sides or the weight has no more vectors."""
    try:
        return count(name, "roberta-base", rank=rank) > budget
    except SpecError as refusal:
        return "do not multiply to" in str(refusal) or "768 in all" in str(refusal)


def count(name: str, model: str, **overrides: object) -> int:
    return reported(load_spec(name, **overrides), model=model).trainable


def test_explain():
    shown = done("explain", "lorta", "--model", "vit-base", "--set", "rank=2")
    assert shown.startswith("lorta on vit-base")
    assert re.search(r"A_width +width 768 x r 2 +1,536 +trained", shown)
    assert re.search(r"r +2 +A_matrix, .*, A_width +bond, summed over, copy tensor, in the minimum cut", shown)
    assert "all, for 4,096 tokens" in shown
    assert "# once per forward pass\ndef prologue(dtype, " in shown
    assert re.search(
        r"# at 12 inputs like that of .*q_proj, .*k_proj, .*v_proj: what its sites .*\ndef forward\(x, ", shown
    )
    assert shown.count("def epilogue(y, ") == 4
    assert shown.count("def backward(g0, ") == 2


def test_explain_as_data():
    shown = json.loads(done("explain", "lora", "--model", "vit-base", "--format", "json"))
    (product,) = shown["products"]
    assert product["factors"] == ["B", "A"]
    assert len(product["sites"]) == 24
    assert ["A", "d_in"] in product["edges"]
    cut = [mode for mode in product["modes"] if mode["minimum_cut"]]
    assert cut == [{"name": "r", "kind": "bond", "sizes": [8], "copy": False, "minimum_cut": True}]
    assert sum(step["flops"] * step["runs"] for step in shown["steps"]) == 24 * 4096 * 2 * 8 * 2 * 768
    query, value = (f"layers.0.attention.{role}_proj" for role in "qv")
    where = f"at 12 inputs like that of {query}, {value}"
    assert [listing["caption"] for listing in shown["code"]] == [
        "once per forward pass",
        f"{where}: what its sites have in common",
        f"{where}: the output of {query}",
        f"{where}: the output of {value}",
        f"{where}: backward",
    ]


def test_explain_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    result = call("explain", "lora", "--model", "vit-base")
    assert result.exit_code == 0
    assert result.stdout.startswith("lora on vit-base")
    assert "def prologue" not in result.stdout
    assert result.stderr == "torch is not installed, so there is no code to show\n"


def test_a_picture_needs_no_torch(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    path = tmp_path / "lora.svg"
    assert done("explain", "lora", "--model", "vit-base", "-o", str(path)) == ""
    picture = path.read_text(encoding="utf-8")
    assert picture == done("explain", "lora", "--model", "vit-base", "--format", "svg")
    assert ElementTree.fromstring(picture).tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize("command", ["report", "explain"])
def test_html_has_the_picture(command):
    picture = done("explain", "lora", "--model", "vit-base", "--format", "svg")
    assert picture in done(command, "lora", "--model", "vit-base", "--format", "html")


def test_the_ending_of_a_file_says_the_format(tmp_path):
    for ending in ("json", "md", "html", "txt"):
        path = tmp_path / f"report.{ending}"
        done("report", "lora", "--model", "vit-base", "-o", str(path))
        form = "text" if ending == "txt" else ending
        assert path.read_text(encoding="utf-8") == done("report", "lora", "--model", "vit-base", "--format", form)
    path = tmp_path / "report.html"
    done("report", "lora", "--model", "vit-base", "--format", "json", "-o", str(path))
    assert json.loads(path.read_text(encoding="utf-8"))["name"] == "lora"


def test_the_catalogue_names_all_that_ships():
    first_words = {line.partition(" ")[0] for line in done("catalogue").splitlines()}
    assert {path.stem for path in SHIPPED.glob("*.yaml")} <= first_words
    assert set(cards()) <= first_words
    assert done("catalogue", "--format", "json") == catalogue().to_json()


def test_output_goes_to_a_file(tmp_path):
    path = tmp_path / "report.json"
    command = ["report", "lora", "--model", "vit-base", "--format", "json"]
    assert done(*command, "-o", str(path)) == ""
    assert path.read_text(encoding="utf-8") == done(*command) == done(*command, "-o", "-")
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_replaced_as_a_whole_or_kept(tmp_path, monkeypatch):
    path = tmp_path / "report.txt"
    path.write_text("before", encoding="utf-8")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    result = call("report", "lora", "--model", "vit-base", "-o", str(path))
    assert result.exit_code == 1
    assert result.stderr == f"Error: Could not open file '{path}': No space left on device\n"
    assert path.read_text(encoding="utf-8") == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_output_follows_a_link(tmp_path):
    path, link = tmp_path / "report.txt", tmp_path / "link.txt"
    path.touch()
    link.symlink_to(path)
    done("report", "lora", "--model", "vit-base", "-o", str(link))
    assert link.is_symlink()
    assert path.read_text(encoding="utf-8").startswith("lora on vit-base")


def test_a_config_file_is_a_model(tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "vocab_size": 100,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    found = json.loads(done("report", "lora", "--model", str(path), "--format", "json"))
    assert found["trainable"] == 2 * 2 * 8 * (64 + 64)


# that take long to import, and who needs them
HEAVY = {"lark", "jsonschema", "yaml", "numpy", "networkx", "opt_einsum", "tabulate", "safetensors", "torch"}
READS = {"lark", "jsonschema", "yaml"}


@pytest.mark.parametrize(
    ("command", "needs"),
    [
        ("--help", set()),
        ("--version", set()),
        ("report --help", set()),
        ("check lorta", READS),
        ("expand lorta", READS),
        ("report lorta --model llama-3-70b", HEAVY - {"networkx", "safetensors", "torch"}),
        ("report lorta --model llama-3-70b --format json", HEAVY - {"networkx", "tabulate", "safetensors", "torch"}),
        ("catalogue --format json", READS | {"numpy"}),
    ],
)
def test_a_command_imports_what_it_needs(command, needs):
    environment = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])}
    run = [sys.executable, "-X", "importtime", "-m", "tensorpeft", *command.split()]
    told = subprocess.run(run, capture_output=True, text=True, check=True, env=environment).stderr
    imported = {line.rpartition("|")[2].strip() for line in told.splitlines()}
    assert {"click", "tensorpeft.cli"} <= imported
    assert HEAVY & imported == needs
