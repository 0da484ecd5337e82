"""Which indices the mask rules keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tensorpeft.language.errors import InternalError, SpecError
from tensorpeft.language.keywords import MASK_RULES
from tensorpeft.language.loader import load_spec
from tensorpeft.language.spec import MaskRule
from tensorpeft.language.syntax import Call, Name, Number
from tensorpeft.model.cards import model_shape
from tensorpeft.model.shape import Key, Site
from tensorpeft.network.masks import kept_indices, masks_at
from tensorpeft.network.network import Block, Network
from tensorpeft.pipeline import front

SMALL = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "vocab_size": 100,
}


def rule(text: str, where: str = "B[d_out]") -> MaskRule:
    spec = load_spec(f"tensorpeft: 1\ntarget: all-linear\nstructure: matrix\nrank: 2\nmask: {{'{where}': '{text}'}}")
    return spec.masks[0]


def kept_of(rule: MaskRule, key: Key, size: int, seed: int) -> np.ndarray:
    (mask,) = masks_at([(rule, (0,))], Site("model", str(key[0]), int(key[1]), size, size))
    return kept_indices(mask, key, (size,), seed)


def test_bernoulli_keeps_each_index_with_its_probability() -> None:
    counts = [len(kept_of(rule("bernoulli(0.13)"), ("query", layer), 1000, 0)) for layer in range(200)]
    z = (sum(counts) - 0.13 * 200_000) / np.sqrt(200_000 * 0.13 * 0.87)
    assert abs(z) < 4
    assert stats.kstest(counts, stats.norm(130, np.sqrt(1000 * 0.13 * 0.87)).cdf).pvalue > 1e-3


def test_bernoulli_never_keeps_nothing() -> None:
    kept = [kept_of(rule("bernoulli(0.001)"), ("query", layer), 4, 0) for layer in range(50)]
    assert all(len(indices) >= 1 for indices in kept)
    assert len({int(indices[0]) for indices in kept}) > 1


@pytest.mark.parametrize(("text", "count"), [("keep(5)", 5), ("keep(0.25)", 8), ("keep(1)", 1), ("keep(0.001)", 1)])
def test_keep_keeps_exactly_as_many(text: str, count: int) -> None:
    kept = kept_of(rule(text), ("value", 1), 32, 7)
    assert len(set(kept.tolist())) == count
    assert np.array_equal(kept, np.sort(kept))
    assert 0 <= kept.min() <= kept.max() < 32


def test_more_is_a_superset_of_fewer() -> None:
    """One draw for each index: a larger number, or a larger probability, adds to what a smaller one keeps."""
    for name, few, many in (("keep", "4", "9"), ("bernoulli", "0.2", "0.6")):
        small = kept_of(rule(f"{name}({few})"), ("value", 1), 32, 7)
        large = kept_of(rule(f"{name}({many})"), ("value", 1), 32, 7)
        assert set(small) < set(large)


def test_depends_on_seed_factor_mode_and_key_alone() -> None:
    masks = [
        tuple(kept_of(rule("keep(8)", where), key, 32, seed))
        for where in ("B[d_out]", "A[d_in]", "B[r]")
        for key in (("query", 0), ("query", 1), ("value", 0))
        for seed in (0, 1)
    ]
    assert len(set(masks)) == len(masks)
    assert masks[0] == tuple(kept_of(rule("keep(8)"), ("query", 0), 32, 0))


def test_a_matrix_may_have_a_value_of_its_own() -> None:
    one = rule("keep(5, value=9)")
    assert len(kept_of(one, ("query", 0), 32, 0)) == 5
    assert len(kept_of(one, ("value", 0), 32, 0)) == 9


def test_keeping_more_than_there_is() -> None:
    with pytest.raises(SpecError, match=r"`keep\(40\)` keeps 40 indices of `d_out`, which has only 32"):
        kept_of(rule("keep(40)"), ("query", 0), 32, 0)


def test_what_is_masked_is_not_counted() -> None:
    text = "tensorpeft: 1\ntarget: {matrices: [query, down]}\nstructure: matrix\nrank: 3\n"
    text += "mask: {'B[d_out]': keep(5), 'A[d_in]': keep(0.25)}"
    network = front(text, model_shape(SMALL)).network
    sizes = {block.name: block.count for block in network.blocks}
    assert sizes == {"B": 4 * 5 * 3, "A_d_in32": 2 * 8 * 3, "A_d_in48": 2 * 12 * 3}


def test_other_targets_change_no_mask() -> None:
    def kept(target: str) -> dict[tuple, list[int]]:
        text = f"tensorpeft: 1\ntarget: {target}\nstructure: matrix\nrank: 3\nmask: {{'B[d_out]': bernoulli(0.4)}}"
        blocks = front(text, model_shape(SMALL)).network.blocks
        return {key: kept[0].tolist() for b in blocks if b.kept for key, kept in b.kept.items()}

    alone, together = kept("{matrices: [value]}"), kept("all-linear")
    assert alone == {key: together[key] for key in alone}
    assert len(together) == 14


def test_masks_that_leave_nothing_in_common() -> None:
    text = "tensorpeft: 1\ntarget: {matrices: [query]}\nstructure: matrix\nrank: 8\nseed: 1\n"
    text += "mask: {'B[r]': keep(1), 'A[r]': keep(1)}"
    with pytest.raises(
        SpecError, match=r"the masks leave nothing of mode `r` at query of layer 0 \(model\.layers\.0\."
    ):
        front(text, model_shape(SMALL))


def test_a_side_that_another_factor_carries_in_parts() -> None:
    text = (
        "tensorpeft: 1\ntarget: {matrices: [query]}\nrank: 2\nupdate: B[d_out, r] * g[layer, head] * A[r, d_in]\n"
        "factors: {g: {init: zeros}}\nmask: {'B[d_out]': keep(4)}"
    )
    with pytest.raises(SpecError, match="`d_out` cannot be masked: another factor of the product carries a part of it"):
        front(text, model_shape(SMALL))


def test_a_value_for_a_matrix_that_is_not_there() -> None:
    spec = load_spec("partial_lora", mask={"B[d_out]": "bernoulli(0.1, qeury=0.2)"})
    with pytest.raises(SpecError) as error:
        front(spec, model_shape("llama-2-7b"))
    assert error.value.problems[0].message == (
        "`bernoulli(0.1, qeury=0.2)` gives a value for `qeury`, which is no matrix of the target; did you mean `query`?"
    )


# Entries over several modes, rules by site, scores


def network_of(text: str, target: str = "{matrices: [query, value]}", **config: int) -> Network:
    return front(f"tensorpeft: 1\ntarget: {target}\n{text}", model_shape(SMALL | config)).network


def block_of(network: Network, name: str) -> Block:
    return next(block for block in network.blocks if block.name == name)


PAIR = "structure: matrix\nrank: 3\n"
SPARSE = "update: D[matrix, layer, d_out, d_in]\nfactors: {D: {init: zeros}}\n"


@pytest.mark.parametrize(
    ("rule", "count"), [("keep(40)", 40), ("keep(0.9)", 922), ("keep(1024)", 1024), ("keep(1)", 1)]
)
def test_so_many_entries_are_kept(rule: str, count: int) -> None:
    block = block_of(network_of(SPARSE + f"mask: {{'D[d_out, d_in]': {rule}}}", "{matrices: [query]}"), "D")
    if count == 1024:  # all of them
        assert block.shape == (1, 2, 32, 32)
        return
    assert block.shape == (2 * count,)
    assert block.key_shape(("query", 1)) == (count,)
    kept = [set(entries.positions.tolist()) for entries in block.entries.values()]
    assert all(len(each) == count and min(each) >= 0 and max(each) < 1024 for each in kept)
    assert count < 40 or kept[0] != kept[1]
    assert block.positions.tolist() == [
        *block.entries["query", 0].positions,
        *(1024 + block.entries["query", 1].positions),
    ]


def test_entries_are_kept_anywhere_and_with_their_probability() -> None:
    text = SPARSE + "mask: {'D[d_out, d_in]': bernoulli(0.2)}"
    entries = [
        block_of(network_of(text + f"\nseed: {seed}"), "D_d_out32").entries["query", 0].positions for seed in range(100)
    ]
    counts = np.bincount(np.concatenate(entries), minlength=1024)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert abs(sum(map(len, entries)) - 100 * 1024 * 0.2) < 4 * np.sqrt(100 * 1024 * 0.2 * 0.8)
    few = network_of(SPARSE + "mask: {'D[d_out, d_in]': bernoulli(0.0001)}", "{matrices: [query]}")
    assert all(entries.count >= 1 for entries in block_of(few, "D").entries.values())


def test_a_mask_of_some_modes_leaves_the_others_whole() -> None:
    text = "update: B[layer, d_out, r, s] * A[r, s, d_in]\nrank: {r: 3, s: 2}\nfactors: {B: {init: zeros}}\n"
    block = block_of(network_of(text + "mask: {'B[d_out, s]': keep(7)}", "{matrices: [query]}"), "B")
    for entries in block.entries.values():
        rows, bonds, others = np.unravel_index(entries.positions, (32, 3, 2))
        pairs = set(zip(rows.tolist(), others.tolist(), strict=True))
        assert len(pairs) == 7
        assert {(row, bond, other) for row, other in pairs for bond in range(3)} == set(
            zip(rows.tolist(), bonds.tolist(), others.tolist(), strict=True)
        )


def test_masks_of_modes_and_of_entries_meet() -> None:
    text = SPARSE + "mask: {'D[d_out, d_in]': bernoulli(0.5), 'D[d_out]': keep(4), 'D[d_in]': keep(6)}"
    network = network_of(text, "{matrices: [query]}")
    alone = network_of(SPARSE + "mask: {'D[d_out]': keep(4), 'D[d_in]': keep(6)}", "{matrices: [query]}")
    all_entries = network_of(SPARSE + "mask: {'D[d_out, d_in]': bernoulli(0.5)}", "{matrices: [query]}")
    for key, entries in block_of(network, "D").entries.items():
        rows, columns = block_of(alone, "D").kept[key]
        expected = set(block_of(all_entries, "D").entries[key].positions.tolist()) & {
            32 * row + col for row in rows for col in columns
        }
        assert set(entries.positions.tolist()) == expected
    for group in network.groups:
        key = group.terms[0].operands[0].keys[0]
        rows, columns = np.unravel_index(block_of(network, "D").entries[key].positions, (32, 32))
        assert set(group.terms[0].rows) == set(rows)
        assert set(group.terms[0].columns) == set(columns)


def test_where_keeps_a_band() -> None:
    text = "update: P[matrix, layer, d_out, r] * M[layer, r, s] * Q[matrix, layer, s, d_in]\nrank: {r: 6, s: 6}\n"
    text += "factors: {M: {init: zeros}}\n"
    text += "mask: {'M[r, s]': 'where(less(max(r - s, s - r), 2))', 'P[d_out]': 'where(mod(d_out, 2))'}"
    network = network_of(text, "{matrices: [query]}")
    band = [6 * r + s for r in range(6) for s in range(6) if abs(r - s) < 2]
    assert all(entries.positions.tolist() == band for entries in block_of(network, "M").entries.values())
    assert all(kept[0].tolist() == list(range(1, 32, 2)) for kept in block_of(network, "P").kept.values())
    with pytest.raises(SpecError, match=r"`where\(less\(d_out, 0\)\)` keeps nothing of `P\[d_out\]`"):
        network_of(text.replace("mod(d_out, 2)", "less(d_out, 0)"))


def test_rules_differ_from_site_to_site() -> None:
    text = (
        PAIR
        + "mask: {'B[d_out]': {'*': keep(9), value: keep(4), 'layers 1': 'keep(2, value=3)'}, 'A[d_in]': {query: keep(5)}}"
    )
    network = network_of(text)
    kept = {
        key: len(axes[0]) for name in ("B_d_out32", "B_d_out16") for key, axes in block_of(network, name).kept.items()
    }
    assert kept == {("query", 0): 9, ("query", 1): 2, ("value", 0): 4, ("value", 1): 3}
    columns = {key: axes[1] if axes[1] is None else len(axes[1]) for key, axes in block_of(network, "A").kept.items()}
    assert columns == {("query", 0): 5, ("query", 1): 5, ("value", 0): None, ("value", 1): None}


def test_one_tensor_has_one_mask() -> None:
    text = "update: B[layer, d_out, r] * A[r, d_in]\nrank: 3\nfactors: {B: {init: zeros}}\nmask: {'A[d_in]': {query: keep(4)}}"
    with pytest.raises(SpecError) as caught:
        network_of(text)
    assert caught.value.problems[0].message == (
        "`A` is one tensor for query of layer 0 (model.layers.0.self_attn.q_proj) and value of layer 0 "
        "(model.layers.0.self_attn.v_proj), for which its masks differ; expected the same mask"
    )


def scored(tmp_path: Path, text: str, **arrays: np.ndarray) -> str:
    np.savez(tmp_path / "scores.npz", **{name.replace("_", "."): array for name, array in arrays.items()})
    (tmp_path / "spec.yaml").write_text(
        f"tensorpeft: 1\ntarget: {{matrices: [query, value]}}\nscores: scores.npz\n{text}"
    )
    return str(tmp_path / "spec.yaml")


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {f"{m}_{n}": generator.random((d, 32)) for m, d in (("query", 32), ("value", 16)) for n in range(2)}


def test_the_rows_columns_and_entries_of_the_largest_scores(tmp_path: Path) -> None:
    scores = weights()
    path = scored(tmp_path, PAIR + "mask: {'B[d_out]': top(5), 'A[d_in]': top(0.25)}", **scores)
    network = front(path, model_shape(SMALL)).network
    for name in ("B_d_out32", "B_d_out16"):
        for (matrix, layer), (rows, _) in block_of(network, name).kept.items():
            assert set(rows) == set(np.argsort(scores[f"{matrix}_{layer}"].sum(1))[-5:])
    for (matrix, layer), (_, columns) in block_of(network, "A").kept.items():
        assert set(columns) == set(np.argsort(scores[f"{matrix}_{layer}"].sum(0))[-8:])
    path = scored(tmp_path, SPARSE + "mask: {'D[d_out, d_in]': top(20)}", **scores)
    for block in front(path, model_shape(SMALL)).network.blocks:
        for (matrix, layer), entries in block.entries.items():
            assert set(entries.positions) == set(np.argsort(scores[f"{matrix}_{layer}"].ravel())[-20:])


def test_scores_of_heads_and_of_a_shared_tensor_are_sums(tmp_path: Path) -> None:
    scores = weights()
    text = "update: h[head, r] * k[head_dim, r] * w[layer, width, r]\nrank: 3\nfactors: {k: {init: zeros}}\n"
    path = scored(tmp_path, text + "ragged: {head: group}\nmask: {'h[head]': top(1)}", **scores)
    (kept,) = block_of(front(path, model_shape(SMALL)).network, "h").kept.values()
    heads = sum(scores[f"query_{n}"].reshape(2, 2, 8, 32).sum((1, 2, 3)) for n in range(2))  # two serve one
    heads = heads + sum(scores[f"value_{n}"].reshape(2, 8, 32).sum((1, 2)) for n in range(2))
    assert kept[0].tolist() == [int(heads.argmax())]


def test_equal_scores_keep_the_first(tmp_path: Path) -> None:
    path = scored(
        tmp_path, PAIR + "mask: {'B[d_out]': top(3)}", **{k: np.ones(v.shape[0]) for k, v in weights().items()}
    )
    for name in ("B_d_out32", "B_d_out16"):
        block = block_of(front(path, model_shape(SMALL)).network, name)
        assert all(rows.tolist() == [0, 1, 2] for rows, _ in block.kept.values())


def test_samples_are_drawn_by_their_scores(tmp_path: Path) -> None:
    scores = {key: np.arange(len(array), dtype=float) for key, array in weights().items()}
    path = scored(tmp_path, PAIR + "mask: {'B[d_out]': sample(1)}", **scores)
    drawn = [
        int(block_of(front(load_spec(path, seed=seed), model_shape(SMALL)).network, "B_d_out16").kept["value", 0][0][0])
        for seed in range(400)
    ]
    expected = np.arange(16) / 120 * 400
    assert 0 not in drawn
    assert stats.chisquare(np.bincount(drawn, minlength=16)[1:], expected[1:]).pvalue > 1e-3


def test_scores_stand_under_the_path_too(tmp_path: Path) -> None:
    arrays = weights()
    path = scored(tmp_path, PAIR + "mask: {'B[d_out]': top(5)}")
    expected = scored(tmp_path, PAIR + "mask: {'B[d_out]': top(5)}", **arrays)
    by_name = [block.kept for block in front(expected, model_shape(SMALL)).network.blocks]
    letter = {"query": "q", "value": "v"}
    np.savez(
        tmp_path / "scores.npz",
        **{f"model.layers.{key[-1]}.self_attn.{letter[key[:5]]}_proj": array for key, array in arrays.items()},
    )
    by_path = [block.kept for block in front(path, model_shape(SMALL)).network.blocks]
    assert str(by_name) == str(by_path)


WHERE = "query of layer 0 (model.layers.0.self_attn.q_proj)"
DAMAGED = {
    "a missing file": (None, "the scores `scores.npz` cannot be read: no such file or directory"),
    "no archive": (b"nothing", "the scores `scores.npz` cannot be read: "),
    "an array": ("array", "`scores.npz` is a single array; expected an archive, as `numpy.savez` writes it"),
    "a pickle": ({"query.0": np.array([{}])}, "the scores `scores.npz` cannot be read: object arrays cannot be loaded"),
    "another site": (
        {"quer.0": np.ones(32)},
        f"`scores.npz` has no scores `query.0` for {WHERE}; did you mean `quer.0`?",
    ),
    "another shape": (
        {"query.0": np.ones((3, 4))},
        f"the scores in `scores.npz` of {WHERE} are 3 x 4, expected 32 (d_out), or 32 x 32 (d_out x d_in)",
    ),
    "not finite": (
        {"query.0": np.full(32, np.nan)},
        f"the scores in `scores.npz` of {WHERE} are not all finite numbers",
    ),
    "negative": ({"query.0": -np.ones(32)}, "`sample(3)` draws 3 by their scores, and some are negative"),
    "zeros": ({"query.0": np.arange(32) == 5}, "`sample(3)` draws 3 by their scores, and only 1 are above 0"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_scores_that_cannot_be_used(name: str, tmp_path: Path) -> None:
    content, message = DAMAGED[name]
    path, file = scored(tmp_path, PAIR + "mask: {'B[d_out]': sample(3)}"), tmp_path / "scores.npz"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is None:
        file.unlink()
    elif content == "array":
        with file.open("wb") as opened:
            np.save(opened, np.ones(3))
    else:
        np.savez(file, **content)
    with pytest.raises(SpecError) as caught:
        front(path, model_shape(SMALL))
    (problem,) = caught.value.problems
    assert problem.message.startswith(message)
    assert problem.span is not None


@pytest.mark.parametrize("name", MASK_RULES)
def test_every_rule_of_the_language_keeps_something(name: str) -> None:
    argument = Name("d_out") if name == "where" else Number(0.5)
    known = replace(rule("keep(1)"), rule=Call(name, (argument,)))
    (mask,) = masks_at([(known, (0,))], Site("model", "query", 0, 32, 32))
    kept = kept_indices(mask, ("query", 0), (32,), 0, scores=np.arange(32.0), sizes={})
    assert 0 < len(kept) < 32


def test_a_rule_that_is_unknown_here_keeps_nothing() -> None:
    known = replace(rule("keep(1)"), rule=Call("block", (Number(4),)))
    with pytest.raises(InternalError, match=r"`block\(4\)` of `B` is a mask rule that keeps nothing"):
        kept_of(known, ("query", 0), 32, 0)


def test_keeping_over_half_of_the_entries_leaves_out_what_as_many_fewer_would_keep() -> None:
    """Entries are drawn until there are enough; above half, those that are left out are drawn instead."""
    grid = (12, 10)
    for count in (61, 90, 119):
        kept, left = (entries_of(rule(f"keep({n})", "B[d_out, r]"), grid) for n in (count, 120 - count))
        assert len(kept) == count
        assert sorted([*kept, *left]) == list(range(120))
    assert len(entries_of(rule("keep(60)", "B[d_out, r]"), grid)) == 60
    assert entries_of(rule("keep(120)", "B[d_out, r]"), grid).tolist() == list(range(120))


def entries_of(rule: MaskRule, grid: tuple[int, int]) -> np.ndarray:
    (mask,) = masks_at([(rule, (0, 1))], Site("model", "query", 0, *grid))
    return kept_indices(mask, ("query", 0), grid, 0)
