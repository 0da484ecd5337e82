"""Names where no family's table tells them: common names that are roles, towers, lists that are no layers, experts."""

from __future__ import annotations

import pytest

from tensorpeft.language.errors import SpecError
from tensorpeft.language.spec import Target
from tensorpeft.model.shape import Linear, ModelShape
from tensorpeft.model.sites import resolve
from tensorpeft.model.target import choose


def plain(*modules: str) -> ModelShape:
    """A model without a family, of square modules."""
    return ModelShape("Plain", resolve([Linear(module, 8, 8) for module in modules], None), (("width", 8),), 0)


def layers(*modules: str, stack: str = "layers", number: int = 2) -> list[str]:
    return [f"{stack}.{n}.{module}" for n in range(number) for module in modules]


def names(*modules: str) -> dict[str, str]:
    """The name of each path of the second layer, or of what is in none."""
    return {site.module: site.matrix for site in plain(*modules).sites if site.layer == 1 or site.stack is None}


@pytest.mark.parametrize(
    ("modules", "roles"),
    [
        (
            (
                "attention.self.query",
                "attention.self.key",
                "attention.output.dense",
                "intermediate.dense",
                "output.dense",
            ),
            ("query", "key", "out", "fc1", "fc2"),
        ),
        (
            (
                "attention.wq",
                "attention.wk",
                "attention.wv",
                "attention.wo",
                "feed_forward.w1",
                "feed_forward.w2",
                "feed_forward.w3",
            ),
            ("query", "key", "value", "out", "gate", "down", "up"),
        ),
        (("attn.to_q", "attn.to_kv", "attn.to_out.0"), ("query", "to_kv", "out")),
        (("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"), ("qkv", "out", "fc1", "fc2")),
        (("mixer.in_proj", "mixer.out_proj"), ("in_proj", "out_proj")),  # no attention
        (("indexer.wk", "patch.proj"), ("wk", "proj")),
        (("attn.q_proj", "attn.gate_proj", "mlp.up_proj"), ("query", "gate_proj", "up_proj")),  # no whole MLP
        (("a.wi", "a.wo", "b.wi_0", "b.wi_1", "b.wo"), ("fc1", "fc2", "gate", "up", "down")),
    ],
)
def test_common_names_are_roles_where_their_neighbours_say_so(modules, roles):
    expected = {f"layers.1.{module}": role for module, role in zip(modules, roles, strict=True)}
    assert names(*layers(*modules)) == expected


def test_a_router_is_no_gate():
    """The first layer has an MLP, where the others have a router and experts."""
    parts = ("gate", "up", "down")
    dense = [f"layers.0.mlp.{part}_proj" for part in parts]
    mixture = [f"layers.{n}.mlp.experts.{e}.{part}_proj" for n in (1, 2) for e in (0, 1) for part in parts]
    shape = plain(*dense, *mixture, "layers.1.mlp.gate", "layers.2.mlp.gate")
    assert {site.matrix for site in shape.sites} == {
        *(f"{at}.{part}" for at in ("mlp", "experts") for part in parts),
        "router",
    }
    assert [site.key for site in choose(Target(("*.router",)), shape)] == [("router", 1), ("router", 2)]
    up = choose(Target(("experts.up",), layers=(1,)), shape)
    assert [site.key for site in up] == [("experts.up", 1, expert) for expert in (0, 1)]


def test_towers_have_their_names_in_front_where_they_share_a_role():
    eye = layers("attention.query", "attention.output.dense", "mlp.fc1", "mlp.fc2", stack="model.eye.encoder.layer")
    ear = layers("self_attn.q_proj", "self_attn.o_proj", stack="model.ear.layers")
    talk = [f"model.talk.blocks.{n}.{a}.{m}" for n in range(2) for a in ("attn", "cross") for m in ("q", "o")]
    assert {name.rpartition(".1.")[::2]: role for name, role in names(*eye, *ear, *talk).items()} == {
        ("model.eye.encoder.layer", "attention.query"): "eye.encoder.query",
        ("model.eye.encoder.layer", "attention.output.dense"): "eye.encoder.out",
        ("model.eye.encoder.layer", "mlp.fc1"): "fc1",
        ("model.eye.encoder.layer", "mlp.fc2"): "fc2",
        ("model.ear.layers", "self_attn.q_proj"): "ear.query",
        ("model.ear.layers", "self_attn.o_proj"): "ear.out",
        ("model.talk.blocks", "attn.q"): "attn.query",
        ("model.talk.blocks", "attn.o"): "attn.out",
        ("model.talk.blocks", "cross.q"): "cross.query",
        ("model.talk.blocks", "cross.o"): "cross.out",
    }


def test_stages_begin_with_a_name():
    linears = [Linear(f"stages.{n}.blocks.{m}.{name}", 8 << n, 8) for n in (0, 1) for m in (0, 1) for name in "qk"]
    found = {site.matrix for site in resolve(linears, None)}
    assert found == {"stages.0.query", "stages.0.key", "stages.1.query", "stages.1.key"}


def test_a_list_of_one_module_is_no_layer():
    """`all-linear` is all of a model without layers, however its modules are kept."""
    shape = plain("attn.to_q", "attn.to_k", "attn.to_out.0", "table.0", "table.1x", "head")
    assert [site.matrix for site in choose(Target(("all-linear",)), shape)] == [
        "query",
        "key",
        "out",
        "table.0",
        "1x",
        "head",
    ]
    inside = choose(Target(("all-linear",)), plain(*layers("fc1", "fc2"), "head.1"))
    assert [site.key for site in inside] == [("fc1", 0), ("fc1", 1), ("fc2", 0), ("fc2", 1)]
    assert {site.stack for site in plain("layers.0.fc1", "layers.0.fc2").sites} == {"layers"}  # one layer is one


TOWERS = plain(*layers("attn.q", "attn.k", stack="text.layers"), *layers("attn.qkv", "attn.proj", stack="eye.layers"))


def test_a_query_that_another_tower_may_hide():
    with pytest.raises(SpecError) as caught:
        choose(Target(("query",)), TOWERS)
    assert str(caught.value) == (
        "`query` may be a part of `qkv` too, and no table says which; write `*.query` for all that are known"
    )
    assert [site.key for site in choose(Target(("*.query",)), TOWERS)] == [("query", 0), ("query", 1)]
    assert len(choose(Target(("q", "qkv")), TOWERS)) == 4


def test_a_value_that_only_a_fused_weight_may_hold():
    with pytest.raises(SpecError) as caught:
        choose(Target(("value",)), TOWERS)
    assert str(caught.value) == (
        "`value` matches nothing in Plain, which has `query`, `key`, `qkv`, `out`; it may be a part of `qkv`"
    )


def test_all_linear_that_would_leave_out_most():
    """Two heads in a list are layers of their own; what is meant is somewhere else."""
    shape = plain("encoder1.q", "encoder1.k", "encoder2.q", "encoder2.k", "neck", "heads.0", "heads.1")
    with pytest.raises(SpecError) as caught:
        choose(Target(("all-linear",)), shape)
    assert str(caught.value) == (
        "`all-linear` means what is inside the layers, which is 2 in `heads` here, and would leave out more: "
        "`encoder1.q`, `encoder1.k`, `encoder2.q`, `encoder2.k` and 1 more; name the matrices that are meant"
    )
    assert len(choose(Target(("encoder1.*", "encoder2.*", "heads")), shape)) == 6
