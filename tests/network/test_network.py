"""What is stored, who uses it, and the numbers it starts from."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tensorpeft.language.errors import InternalError, SpecError
from tensorpeft.language.keywords import INITIALISERS
from tensorpeft.language.syntax import Call, Name, Number
from tensorpeft.model.cards import model_shape
from tensorpeft.network.initialisers import initial_values
from tensorpeft.network.network import Block, Key, Network
from tensorpeft.pipeline import front

LLAMA = model_shape(
    {
        "model_type": "llama",
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 100,
    }
)


def network_of(text: str, target: str = "{matrices: [query, value]}") -> Network:
    return front(f"tensorpeft: 1\ntarget: {target}\n{text}", LLAMA).network


def stored(network: Network) -> dict[str, tuple[int, ...]]:
    return {block.name: block.shape for block in network.blocks}


def test_one_tensor_for_a_factor_and_one_more_for_each_ragged_size() -> None:
    assert stored(network_of("structure: matrix\nrank: 5")) == {
        "B_d_out64": (1, 3, 64, 5),
        "B_d_out32": (1, 3, 32, 5),
        "A": (2, 3, 5, 64),
    }


def test_a_factor_without_site_modes_is_one_tensor_a_size() -> None:
    update = "update: B[d_out, r] * A[r, d_in]\nrank: {r: 5}\nfactors: {B: {init: zeros}}"
    assert stored(network_of(update, "all-linear")) == {
        "B_d_out64": (64, 5),
        "B_d_out32": (32, 5),
        "B_d_out96": (96, 5),
        "A_d_in64": (5, 64),
        "A_d_in96": (5, 96),
    }
    assert stored(network_of(update + "\nragged: slice", "all-linear")) == {"B": (96, 5), "A": (5, 96)}


def test_axes_are_in_the_order_that_the_spec_writes() -> None:
    update = "update: B[d_out, layer, r, matrix] * A[r, d_in]\nrank: {r: 5}\nfactors: {B: {init: zeros}}"
    block = network_of(update, "{matrices: [query, out]}").blocks[0]
    assert [(axis.mode, axis.size) for axis in block.axes] == [("d_out", 64), ("layer", 3), ("r", 5), ("matrix", 2)]
    assert block.keys[:2] == (("query", 0), ("query", 1))


def test_sites_that_fill_no_grid_have_one_axis() -> None:
    block = network_of("structure: matrix\nrank: 5", "{matrices: ['*.0.*.q_proj', '*.2.*.o_proj']}").blocks[0]
    assert [(axis.mode, axis.size) for axis in block.axes] == [("site", 2), ("d_out", 64), ("r", 5)]
    assert block.keys == (("query", 0), ("out", 2))


def test_a_packed_factor_holds_what_the_masks_keep() -> None:
    network = network_of("structure: matrix\nrank: 5\nmask: {'B[d_out]': bernoulli(0.3)}", "{matrices: [query]}")
    block = network.blocks[0]
    kept = {key: len(indices) for key, (indices, _) in block.kept.items()}
    assert len(set(kept.values())) > 1
    assert block.shape == (5 * sum(kept.values()),)
    assert block.key_sizes == tuple(5 * kept[key] for key in block.keys)


def test_sites_of_one_shape_are_one_group() -> None:
    network = network_of("structure: matrix\nrank: 5", "all-linear")
    shapes = [{(site.d_out, site.d_in) for site in group.sites} for group in network.groups]
    assert all(len(shape) == 1 for shape in shapes)
    assert [len(group.sites) for group in network.groups] == [6, 6, 6, 3]  # query out, key value, gate up, down
    masked = network_of("structure: matrix\nrank: 5\nmask: {'A[r]': keep(2)}", "all-linear")
    assert [len(group.sites) for group in masked.groups] == [1] * 21


def test_a_mask_of_a_shared_factor_keeps_groups_together() -> None:
    update = "update: B[d_out, r] * d[matrix, layer, r] * A[r, d_in]\nrank: {r: 5}\nfactors: {d: {init: zeros}}"
    network = network_of(update + "\nmask: {'A[r]': keep(2)}", "all-linear")
    assert [len(group.sites) for group in network.groups] == [6, 6, 6, 3]
    assert all(term.sizes["r"] == 2 for group in network.groups for term in group.terms)


def test_it_prints_itself() -> None:
    lines = str(network_of("structure: matrix\nrank: 5\nalpha: 10")).splitlines()
    assert lines == [
        "network adapter on llama: dW = alpha / r * (B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in])",
        "  B_d_out64[matrix=1, layer=3, d_out=64, r=5] zeros, trained, 960",
        "  B_d_out32[matrix=1, layer=3, d_out=32, r=5] zeros, trained, 480",
        "  A[matrix=2, layer=3, r=5, d_in=64] kaiming_uniform(a=sqrt(5)), trained, 1,920",
        "  3 sites like query of layer 0 (model.layers.0.self_attn.q_proj)",
        "    B * A: d_out=64, d_in=64",
        "  3 sites like value of layer 0 (model.layers.0.self_attn.v_proj)",
        "    B * A: d_out=32, d_in=64",
    ]


# Initial values


def values(block: Block, seed: int = 0) -> dict[Key, np.ndarray]:
    return {key: np.broadcast_to(value, block.key_shape(key)) for key, value in initial_values(block, seed)}


def of(text: str, factor: str, target: str = "{matrices: [query, value]}", seed: int = 0) -> dict[tuple, np.ndarray]:
    """The initial values of a factor by key and shape, over all of its blocks."""
    blocks = [block for block in network_of(text, target).blocks if block.factor == factor]
    return {(key, value.shape): value for block in blocks for key, value in values(block, seed).items()}


PAIR = (
    "update: B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]\nrank: {{r: 16}}\n"
    "factors: {{B: {{init: zeros}}, A: {{init: '{}'}}}}"
)
BOUNDS = {
    "kaiming_uniform": np.sqrt(6 / 64),
    "kaiming_uniform(a=sqrt(5))": 1 / np.sqrt(64),
    "kaiming_uniform(fan=r)": np.sqrt(6 / 16),
    "kaiming_uniform(a=sqrt(5), fan=r)": 1 / np.sqrt(16),
    "xavier_uniform": np.sqrt(6 / (64 + 16)),
    "uniform(0.25)": 0.25,
}


@pytest.mark.parametrize("init", BOUNDS)
def test_uniform_initialisers_fill_their_bounds(init: str) -> None:
    drawn = np.stack(list(of(PAIR.format(init), "A").values()))
    bound = BOUNDS[init]
    assert bound * 0.99 < drawn.max() <= bound
    assert -bound <= drawn.min() < -bound * 0.99
    assert abs(drawn.std() / (bound / np.sqrt(3)) - 1) < 0.03
    assert abs(drawn.mean()) < 4 * bound / np.sqrt(3 * drawn.size)


def test_normal_and_constant_initialisers() -> None:
    drawn = np.stack(list(of(PAIR.format("normal(0.02)"), "A").values()))
    assert abs(drawn.std() / 0.02 - 1) < 0.05
    assert all((value == 0.1).all() for value in of(PAIR.format("constant(0.1)"), "A").values())
    assert all((value == 1).all() for value in of(PAIR.format("ones"), "A").values())
    assert not any(value.any() for value in of(PAIR.format("ones"), "B").values())


def test_every_key_and_every_seed_has_numbers_of_its_own() -> None:
    drawn = [v.tobytes() for seed in (0, 1) for v in of(PAIR.format("normal(1)"), "A", seed=seed).values()]
    assert len(set(drawn)) == len(drawn) == 12


RANDOM = PAIR.format("normal(1)").replace("zeros", "normal(1)") + "\nstart: nonzero"


@pytest.mark.parametrize(
    "target", ["all-linear", "{matrices: [value, out, query]}", "{matrices: [query], layers: [0, 2]}"]
)
def test_the_target_changes_no_number(target: str) -> None:
    for factor in ("A", "B"):
        alone, other = of(RANDOM, factor), of(RANDOM, factor, target)
        common = alone.keys() & other.keys()
        assert len(common) in (2, 6)
        assert all(np.array_equal(alone[key], other[key]) for key in common)


def test_a_wider_target_keeps_the_shared_slice() -> None:
    vera = "update: b[matrix, layer, d_out] * B[d_out, r] * d[matrix, layer, r] * A[r, d_in]\nrank: {r: 7}\nragged: slice\n"
    vera += "factors: {A: {init: normal(1), frozen: true}, B: {init: uniform(1), frozen: true}, b: {init: zeros}}"
    for factor in ("A", "B"):
        ((_, narrow),) = of(vera, factor).items()
        ((_, wide),) = of(vera, factor, "all-linear").items()
        assert wide.size > narrow.size
        assert np.array_equal(wide[tuple(slice(size) for size in narrow.shape)], narrow)


def test_a_masked_factor_has_the_numbers_of_the_whole_one() -> None:
    masked = next(b for b in network_of(RANDOM + "\nmask: {'A[d_in]': keep(9)}").blocks if b.factor == "A")
    whole = of(RANDOM, "A")
    for key, value in values(masked).items():
        rows, columns = masked.kept[key]
        assert rows is None
        assert value.shape == (16, 9)
        assert np.array_equal(value, whole[key, (16, 64)][:, columns])


def test_another_factor_or_rank_changes_no_number() -> None:
    lora = "update: B[layer, d_out, r] * A[layer, r, d_in]\nrank: {r: 4}\nfactors: {B: {init: zeros}, A: {init: normal(1)}}"
    longer = lora.replace("* A", "* C[r] * A").replace("r: 4", "r: 9")
    few, many = of(lora, "A"), of(longer, "A")
    assert all(np.array_equal(few[(layer,), (4, 64)], many[(layer,), (9, 64)][:4]) for layer in range(3))


def test_arithmetic_over_sizes() -> None:
    spec = PAIR.format("normal(1 / sqrt(d_in + d_out))")
    for (key, _), drawn in of(spec.replace("B[matrix, layer, d_out, r]", "B[matrix, layer, r, d_out]"), "A").items():
        d_out = 64 if key[0] == "query" else 32
        assert abs(drawn.std() * np.sqrt(64 + d_out) - 1) < 0.1
    assert all((value == 16 / 64).all() for value in of(PAIR.format("constant(r / d_in)"), "A").values())


def test_arithmetic_over_sizes_that_differ() -> None:
    text = "update: B[matrix, layer, d_out, r] * A[layer, r, d_in]\nrank: {r: 4}\n"
    text += "factors: {B: {init: zeros}, A: {init: normal(1 / d_out)}}"
    with pytest.raises(SpecError) as caught:
        network_of(text)
    assert caught.value.problems[0].message == (
        "`normal(1 / d_out)` speaks of `d_out`, which is 32 and 64 at the sites that share factor `A`; expected one number"
    )


def test_arithmetic_over_the_layer_of_a_factor() -> None:
    for (key, _), value in of(PAIR.format("formula(equal(mod(layer, 2), r) + d_in * layer)"), "A").items():
        r, d_in = np.ogrid[:16, :64]
        np.testing.assert_array_equal(value, (key[1] % 2 == r) + d_in * key[1])


def test_tensors_of_one_name() -> None:
    text = "update: B[layer, d_out, r] * B_d_out64[r, s] * A[matrix, layer, s, d_in]\nrank: {r: 4, s: 3}\n"
    with pytest.raises(SpecError) as caught:
        network_of(text + "factors: {B: {init: zeros}}")
    (problem,) = caught.value.problems
    assert problem.message == (
        "a tensor of `B` is called `B_d_out64` too, since its sizes differ; expected another name"
    )
    assert problem.span.position == (3, 30)


def test_formulas_over_indices() -> None:
    text = PAIR.format("formula(r / size(r) + 2 * equal(mod(d_in, 3), 1) - d_in ** 2 * cos(pi * r))")
    for (_, shape), value in of(text, "A").items():
        r, d_in = np.ogrid[:16, :64]
        expected = r / 16 + 2 * (d_in % 3 == 1) - d_in**2 * np.cos(np.pi * r)
        assert shape == (16, 64)
        np.testing.assert_allclose(value, expected, rtol=1e-14)
    masked = network_of(text + "\nmask: {'A[r, d_in]': keep(30), 'B[d_out]': keep(3)}")
    block = next(block for block in masked.blocks if block.factor == "A")
    for key, value in values(block).items():
        assert np.array_equal(value, of(text, "A")[key, (16, 64)].ravel()[block.entries[key].positions])


def test_a_formula_without_a_value() -> None:
    with pytest.raises(SpecError, match=r"`1 / d_in` has no finite value at some index"):
        of(PAIR.format("formula(1 / d_in)"), "A")


def test_orthogonal_and_identity() -> None:
    drawn = of(PAIR.format("orthogonal"), "A")
    for value in drawn.values():
        np.testing.assert_allclose(value @ value.T, np.eye(16), atol=1e-14)
    assert len({value.tobytes() for value in drawn.values()}) == 6
    tall = of(PAIR.format("orthogonal").replace("A[matrix, layer, r, d_in]", "A[matrix, layer, d_in, r]"), "A")
    for value in tall.values():
        np.testing.assert_allclose(value.T @ value, np.eye(16), atol=1e-14)
    assert all(np.array_equal(value, np.eye(16, 64)) for value in of(PAIR.format("identity"), "A").values())


def test_a_copy_starts_from_the_numbers_of_another() -> None:
    text = "update: B[layer, d_out, r] * A[layer, r, d_in] - B0[layer, d_out, r] * A0[layer, r, d_in]\nrank: {r: 4}\n"
    text += "factors: {B: {init: normal(1)}, B0: {init: start(B), frozen: true}, A0: {init: start(A), frozen: true}}\n"
    for mask in ("", "mask: {'A[d_in]': keep(7), 'B[d_out, r]': keep(0.3)}"):
        blocks = {block.name: block for block in network_of(text + mask, "{matrices: [query]}").blocks}
        for name in ("A", "B"):
            first, copy = values(blocks[name]), values(blocks[f"{name}0"])
            assert first.keys() == copy.keys()
            assert all(np.array_equal(first[key], copy[key]) and np.abs(copy[key]).max() > 0.1 for key in first)
            assert blocks[name].shape == blocks[f"{name}0"].shape
            assert blocks[f"{name}0"].seeded
    shown = str(network_of(text, "{matrices: [query]}"))
    assert "start(B), seeded" in shown


ARGUMENTS = {"constant": Number(0.5), "uniform": Number(0.5), "normal": Number(0.5), "formula": Name("d_in")}


def test_every_initialiser_of_the_language_has_numbers_of_its_own() -> None:
    """But for `start`: a block has the initialiser of the factor that it starts from."""
    block = network_of(PAIR.format("normal(1)")).blocks[-1]
    drawn = {}
    for name in INITIALISERS.keys() - {"start"}:
        init = Call(name, (ARGUMENTS[name],) if name in ARGUMENTS else ())
        numbers = values(replace(block, init=init))["query", 0]
        assert numbers.shape == (16, 64)
        assert np.isfinite(numbers).all()
        drawn[name] = numbers.tobytes()
    assert len(set(drawn.values())) == len(INITIALISERS) - 1


def test_an_initialiser_that_is_unknown_here_draws_nothing() -> None:
    block = network_of(PAIR.format("normal(0.02)")).blocks[-1]
    with pytest.raises(InternalError, match=r"`truncated_normal\(0.02\)` of `A` is an initialiser that draws nothing"):
        list(initial_values(replace(block, init=Call("truncated_normal", block.init.args)), 0))
