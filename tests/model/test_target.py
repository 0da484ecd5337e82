"""Which sites a target means, and what is said when it means none."""

from __future__ import annotations

import itertools

import pytest

from tensorpeft.checkpoint.header import Header
from tensorpeft.language.errors import SpecError
from tensorpeft.language.source import Source, Span
from tensorpeft.language.spec import Target
from tensorpeft.model.cards import model_shape
from tensorpeft.model.shape import Linear, ModelShape, Site
from tensorpeft.model.sites import resolve
from tensorpeft.model.target import choose, site_rows

SMALL = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 100,
}
LLAMA = model_shape({"model_type": "llama", **SMALL, "num_key_value_heads": 2})
BERT = model_shape(
    {
        "model_type": "bert",
        **SMALL,
        "max_position_embeddings": 64,
        "type_vocab_size": 2,
        "architectures": ["BertForSequenceClassification"],
    }
)
GPT2 = model_shape(
    {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}
)


def plain(*modules: str) -> ModelShape:
    """A model without a family, of square modules."""
    return ModelShape("Plain", resolve([Linear(module, 8, 8) for module in modules], None), (("width", 8),), 0)


HYBRID = plain(*(f"layers.{n}.{m}" for n in range(4) for m in (("attn.q", "mlp.up") if n % 2 else ("mlp.up",))), "head")


def target(matrices: list[str], exclude: list[str] = [], layers: tuple[int, ...] | None = None) -> Target:  # noqa: B006
    """A target as it would be read from ``a, b / c``, the words of which are its entries."""
    text = " ".join([*matrices, "/", *exclude])
    starts = itertools.accumulate((len(word) + 1 for word in text.split(" ")), initial=0)
    places = zip(text.split(" "), starts, strict=False)
    spans = [Span(Source("spec.yaml", text), at, at + len(word)) for word, at in places if word != "/"]
    return Target(tuple(matrices), tuple(exclude), layers, tuple(spans))


def keys(*args, shape: ModelShape) -> list[tuple[str, int]]:
    return [site.key for site in choose(target(*args), shape)]


def grid(matrices: list[str], layers: range) -> list[tuple[str, int]]:
    return [(matrix, layer) for matrix in matrices for layer in layers]


def error(*args, shape: ModelShape) -> str:
    with pytest.raises(SpecError) as caught:
        choose(target(*args), shape)
    return str(caught.value)


@pytest.mark.parametrize(
    ("shape", "entry", "matrices"),
    [
        (LLAMA, "query", ["query"]),
        (LLAMA, "q_proj", ["query"]),
        (LLAMA, "self_attn.q_proj", ["query"]),
        (LLAMA, "*.self_attn.*", ["query", "key", "value", "out"]),
        (LLAMA, "self_attn.*", ["query", "key", "value", "out"]),
        (LLAMA, "[kv]_proj", ["key", "value"]),
        (LLAMA, "qu*", ["query"]),
        (LLAMA, "layers.{layer}.mlp.up_proj", ["up"]),
        (LLAMA, "model.layers.{layer}.mlp.{matrix}", ["gate", "up", "down"]),
        (LLAMA, "all-linear", ["query", "key", "value", "out", "gate", "up", "down"]),
        (BERT, "attention.output.dense", ["out"]),
        (BERT, "all-linear", ["query", "key", "value", "out", "fc1", "fc2"]),
        (GPT2, "value", ["value"]),
        (GPT2, "attn.c_proj", ["out"]),
        (GPT2, "c_attn", ["query", "key", "value"]),
        (GPT2, "c_proj", ["out", "fc2"]),
    ],
)
def test_an_entry(shape, entry, matrices):
    assert keys([entry], shape=shape) == grid(matrices, range(dict(shape.sizes)["layers"]))


def test_a_suffix_ends_at_dots():
    assert "matches nothing" in error(["_proj"], shape=LLAMA)


def test_a_module_outside_the_layers():
    assert keys(["query", "lm_head"], shape=LLAMA)[-1] == ("lm_head", 0)
    assert keys(["classifier", "pooler.dense"], shape=BERT) == [("pooler.dense", 0), ("classifier", 0)]


def test_of_alternatives_the_first_that_the_model_has():
    assert keys(["down|fc2"], shape=LLAMA) == keys(["fc2 | down"], shape=LLAMA) == grid(["down"], range(3))
    assert keys(["down|fc2"], shape=BERT) == grid(["fc2"], range(3))
    with pytest.raises(SpecError, match=r"`up\|gate` matches nothing in bert"):
        choose(target(["up|gate"]), BERT)


def test_a_role_comes_before_a_module_of_that_name():
    shape = plain("layers.0.out", "layers.0.attn.out.fc", "layers.1.out", "layers.1.attn.out.fc")
    assert keys(["out"], shape=shape) == [("out", 0), ("out", 1)]


def test_the_order_is_the_model_s():
    entries = ["value", "down_proj", "query", "*.o_proj"]
    expected = grid(["query", "value", "out", "down"], range(3))
    assert all(keys(list(order), shape=LLAMA) == expected for order in itertools.permutations(entries))


def test_layers_restrict_what_is_in_the_layers():
    assert keys(["query", "lm_head"], [], (2, 0), shape=LLAMA) == [("query", 0), ("query", 2), ("lm_head", 0)]


def test_exclude():
    assert keys(["all-linear"], ["mlp.*", "key", "o_proj"], shape=LLAMA) == grid(["query", "value"], range(3))


def test_a_plain_model_has_the_names_of_its_paths():
    shape = plain(*(f"blocks.{n}.{m}" for n in range(2) for m in ("self.q", "self.o", "cross.q")), "head")
    names = ["self.query", "out", "cross.query"]
    assert keys(["all-linear"], shape=shape) == grid(names, range(2))
    assert keys(["q"], shape=shape) == keys(["query"], shape=shape) == grid(["self.query", "cross.query"], range(2))


def test_a_plain_model_without_layers_is_adapted_whole():
    assert keys(["all-linear"], shape=plain("fc1", "fc2", "head")) == [("fc1", 0), ("fc2", 0), ("head", 0)]


def test_a_sequential_has_numbers_alone():
    assert keys(["all-linear"], shape=plain("0", "2")) == [("linear", 0), ("linear", 2)]


def test_the_first_number_that_varies_is_the_layer():
    shape = plain(*(f"tower.0.layers.{n}.heads.{e}.up" for n in range(2) for e in range(2)))
    assert keys(["up"], shape=shape) == grid(["heads.0.up", "heads.1.up"], range(2))


def test_the_number_behind_experts_is_the_expert():
    shape = plain(*(f"tower.0.layers.{n}.experts.{e}.up" for n in range(2) for e in range(2)))
    assert keys(["up"], shape=shape) == [("experts.up", layer, expert) for layer in range(2) for expert in range(2)]


def test_a_pattern_says_which_number_is_the_layer_and_which_part_the_matrix():
    shape = plain(*(f"towers.{t}.blocks.{n}.{m}" for t in range(2) for n in range(3) for m in "qk"))
    assert keys(["towers.1.blocks.{layer}.{matrix}"], shape=shape) == grid(["q", "k"], range(3))
    assert keys(["towers.1.blocks.{layer}.q"], shape=shape) == grid(["q"], range(3))


def test_a_pattern_that_gives_two_modules_one_name():
    shape = plain(*(f"towers.{t}.blocks.{n}.q" for t in range(2) for n in range(2)))
    shown = "    blocks.{layer}.{matrix} /\n    ^^^^^^^^^^^^^^^^^^^^^^^"
    assert error(["blocks.{layer}.{matrix}"], shape=shape) == "\n".join(
        f"spec.yaml:1:1: `towers.0.blocks.{n}.q` and `towers.1.blocks.{n}.q` would both be `q` of layer {n}\n{shown}"
        for n in range(2)
    )


HAS = "`query`, `key`, `value`, `out`, `gate`, `up`, `down`, `embed_tokens`, `lm_head`"


def test_an_entry_that_matches_nothing():
    assert error(["qeury", "value"], shape=LLAMA) == (
        f"spec.yaml:1:1: `qeury` matches nothing in llama, which has {HAS}; did you mean `query`?\n"
        "    qeury value /\n"
        "    ^^^^^"
    )


def test_all_problems_come_at_once():
    assert error(["value", "v_porj", "fc1"], ["gate"], (1, 3, 4, 9), shape=LLAMA) == (
        "spec.yaml:1:1: layers 3-4, 9 do not exist: llama has layers 0-2\n"
        "    value v_porj fc1 / gate\n"
        "    ^^^^^\n"
        f"spec.yaml:1:7: `v_porj` matches nothing in llama, which has {HAS}; did you mean `v_proj`?\n"
        "    value v_porj fc1 / gate\n"
        "          ^^^^^^\n"
        f"spec.yaml:1:14: `fc1` matches nothing in llama, which has {HAS}\n"
        "    value v_porj fc1 / gate\n"
        "                 ^^^\n"
        "spec.yaml:1:20: `gate` excludes nothing of `value`\n"
        "    value v_porj fc1 / gate\n"
        "                       ^^^^"
    )


def test_a_layer_that_does_not_exist():
    assert error(["query"], [], (-1,), shape=LLAMA).startswith(
        "spec.yaml:1:1: layer -1 does not exist: llama has layers 0-2\n"
    )
    assert error(["fc1"], [], (0,), shape=plain("fc1", "fc2")).startswith(
        "spec.yaml:1:1: layer 0 does not exist: Plain has no layers\n"
    )


def test_an_exclusion_misspelt():
    assert error(["query", "key"], ["kye"], shape=LLAMA).startswith(
        "spec.yaml:1:13: `kye` excludes nothing of `query`, `key`; did you mean `key`?\n"
    )


def test_nothing_left():
    assert error(["query"], ["q_proj"], shape=LLAMA).startswith(
        "spec.yaml:1:1: the target excludes every matrix that it names\n"
    )


def test_a_matrix_that_some_layers_lack():
    assert error(["q"], shape=HYBRID).startswith(
        "spec.yaml:1:1: `q` is missing in layers 0, 2 of `layers`; "
        "restrict `layers:` to those that have it, or write `*.q` for all that there are\n"
    )
    assert keys(["q"], [], (1, 3), shape=HYBRID) == [("query", 1), ("query", 3)]
    assert keys(["*.q"], shape=HYBRID) == [("query", 1), ("query", 3)]
    assert keys(["layers.1.attn.q"], shape=HYBRID) == [("query", 1)]
    assert len(keys(["all-linear"], shape=HYBRID)) == 6


def fingerprint(sites: tuple[Site, ...]) -> str:
    return Header(spec="", model="", sites=site_rows(sites), factors={}, library="").fingerprint


def test_the_fingerprint_is_of_names_and_sides():
    sites = choose(target(["query", "value"]), LLAMA)
    assert fingerprint(sites) == fingerprint(choose(target(["v_proj", "q_proj"]), LLAMA))
    assert fingerprint(sites) != fingerprint(choose(target(["query", "key"]), LLAMA))
    assert fingerprint(sites) != fingerprint(sites[1:])
    # sha256 of '[["query",0,32,32]]'
    assert fingerprint(sites[:1]) == "dbd0e368be54c49a16ecc592c506aa08be7f99c5f8bc8fe3afb45b1424ffba6b"
