"""Which indices the mask rules keep."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tensorpeft.compile import front
from tensorpeft.language.errors import SpecError
from tensorpeft.language.load import load_spec
from tensorpeft.language.spec import MaskRule
from tensorpeft.network.families import model_shape
from tensorpeft.network.masks import kept_indices

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


def test_bernoulli_keeps_each_index_with_its_probability() -> None:
    counts = [len(kept_indices(rule("bernoulli(0.13)"), ("query", layer), 1000, 0)) for layer in range(200)]
    z = (sum(counts) - 0.13 * 200_000) / np.sqrt(200_000 * 0.13 * 0.87)
    assert abs(z) < 4
    assert stats.kstest(counts, stats.norm(130, np.sqrt(1000 * 0.13 * 0.87)).cdf).pvalue > 1e-3


def test_bernoulli_never_keeps_nothing() -> None:
    kept = [kept_indices(rule("bernoulli(0.001)"), ("query", layer), 4, 0) for layer in range(50)]
    assert all(len(indices) >= 1 for indices in kept)
    assert len({int(indices[0]) for indices in kept}) > 1


@pytest.mark.parametrize(("text", "count"), [("keep(5)", 5), ("keep(0.25)", 8), ("keep(1)", 1), ("keep(0.001)", 1)])
def test_keep_keeps_exactly_as_many(text: str, count: int) -> None:
    kept = kept_indices(rule(text), ("value", 1), 32, 7)
    assert len(set(kept.tolist())) == count
    assert np.array_equal(kept, np.sort(kept))
    assert 0 <= kept.min() <= kept.max() < 32


def test_more_is_a_superset_of_fewer() -> None:
    """One draw for each index: a larger number, or a larger probability, adds to what a smaller one keeps."""
    for name, few, many in (("keep", "4", "9"), ("bernoulli", "0.2", "0.6")):
        small = kept_indices(rule(f"{name}({few})"), ("value", 1), 32, 7)
        large = kept_indices(rule(f"{name}({many})"), ("value", 1), 32, 7)
        assert set(small) < set(large)


def test_depends_on_seed_factor_mode_and_key_alone() -> None:
    masks = [
        tuple(kept_indices(rule("keep(8)", where), key, 32, seed))
        for where in ("B[d_out]", "A[d_in]", "B[r]")
        for key in (("query", 0), ("query", 1), ("value", 0))
        for seed in (0, 1)
    ]
    assert len(set(masks)) == len(masks)
    assert masks[0] == tuple(kept_indices(rule("keep(8)"), ("query", 0), 32, 0))


def test_a_matrix_may_have_a_value_of_its_own() -> None:
    one = rule("keep(5, value=9)")
    assert len(kept_indices(one, ("query", 0), 32, 0)) == 5
    assert len(kept_indices(one, ("value", 0), 32, 0)) == 9


def test_keeping_more_than_there_is() -> None:
    with pytest.raises(SpecError, match=r"`keep\(40\)` keeps 40 indices of `d_out`, which has only 32"):
        kept_indices(rule("keep(40)"), ("query", 0), 32, 0)


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
