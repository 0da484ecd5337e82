"""Updates that multiply by the base weight: HiRA's W * (B A), IA3's W * u, and W between other factors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import tensorpeft as tp
from tensorpeft.language.spec import BASE_WEIGHT
from tensorpeft.model.shape import Site
from tensorpeft.network.lower import lower
from tensorpeft.network.network import Network, Term
from tensorpeft.planning.plan import plan
from tensorpeft.planning.regime import Regime
from tensorpeft.runtime.attach import attach_programs
from tensorpeft.runtime.program_cache import Programs
from tensorpeft.scanning.scan import scan
from tests.models import inputs, randomise, run
from tests.runtime.reference import AT_SITE, LETTERS, modes_at, stored_at, unpacked
from tests.runtime.test_oracle import by_adapter, by_formula, errors, measured, named_factors
from tests.structures import model

HEAD = "tensorpeft: 1\ntarget: {matrices: [query, value]}\nfactors: {W0: {frozen: true}, B: {init: zeros}}\n"
SPECS = {
    "hira": "rank: 3\nscale: 2\nupdate: W0[d_out, d_in] * B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]",
    "rows": "update: B[matrix, layer, d_out] * W0[d_out, d_in]",
    "columns": "update: W0[d_out, d_in] * B[matrix, layer, d_in]",
    "both": "update: A[layer, d_out] * W0[d_out, d_in] * B[matrix, d_in]",
    "parts": "modes: [d_out = o1(4) * o2, d_in = i1 * i2]\n"
    "update: W0[d_out, d_in] * B[matrix, layer, o1, i1] * A[matrix, o2, i2]",
    "beside another": "rank: 3\nstart: nonzero\n"
    "update: C[matrix, layer, d_out, r] * D[layer, r, d_in] - W0[d_out, d_in] * B[layer, d_in]",
    "masked": "rank: 3\nupdate: W0[d_out, d_in] * B[matrix, layer, d_out, r] * A[r, d_in]\n"
    "mask: {'B[d_out]': keep(0.4), 'A[d_in]': keep(0.5)}",
}


def with_base(network: Network) -> Network:
    """The network with its frozen factor W0 as the base weight."""

    def term(old: Term) -> Term:
        return replace(
            old, operands=tuple(replace(o, factor=BASE_WEIGHT) if o.factor == "W0" else o for o in old.operands)
        )

    groups = tuple(replace(group, terms=tuple(map(term, group.terms))) for group in network.groups)
    return replace(network, groups=groups, blocks=tuple(b for b in network.blocks if b.factor != "W0"))


def attached(base: nn.Module, name: str, tokens: int = 4096) -> tp.Adapter:
    network = with_base(lower(tp.load_spec(HEAD + SPECS[name]), scan(base)))
    return attach_programs(base, Programs(plan(network, Regime(tokens)), adapts=True))


def dense(base: nn.Module, adapter: tp.Adapter, factors: dict[str, Tensor]) -> dict[str, Tensor]:
    """dW of every module, each product by one einsum."""
    blocks = {block.name: block for block in adapter.network.blocks}
    whole = {n: f if not blocks[n].packed else unpacked(blocks[n], f) for n, f in factors.items()}
    found: dict[str, Tensor] = {}
    for site in adapter.sites:
        module = base.get_submodule(site.module)
        rows = torch.from_numpy(site.row_indices())
        weight = (module.weight.t() if hasattr(module, "nf") else module.weight)[rows]
        change = at_site(adapter, whole, site, weight)
        found.setdefault(site.module, change.new_zeros(site.module_d_out, site.d_in)).index_add_(0, rows, change)
    return found


def at_site(adapter: tp.Adapter, whole: dict[str, Tensor], site: Site, weight: Tensor) -> Tensor:
    total = torch.zeros_like(weight)
    for product in adapter.spec.update.products:
        modes = modes_at(adapter, site).of(product)
        names: dict[str, str] = {}
        inputs, tensors = [], []
        for reference in product.factors:
            atoms = [a for m in reference.modes for a in modes.atoms(m) if a not in AT_SITE]
            inputs.append("".join(names.setdefault(a, LETTERS[len(names)]) for a in atoms))
            tensors.append(
                weight.reshape([modes.sizes[a] for a in atoms])
                if reference.factor == "W0"
                else stored_at(adapter, whole, reference, site, modes)
            )
        output = "".join(names[a] for side in ("d_out", "d_in") for a in modes.atoms(side))
        change = torch.einsum(f"{','.join(inputs)}->{output}", *tensors).reshape(weight.shape)
        total = total + product.sign * modes.scale * change
    return total


@pytest.mark.parametrize("tokens", [1, 4096])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", SPECS)
def test_equals_one_einsum(name: str, architecture: str, tokens: int) -> None:
    base, x = model(architecture), inputs(architecture)
    adapter = attached(base, name, tokens)
    randomise(adapter)
    leaves = {n: f.detach().clone().requires_grad_(f.requires_grad) for n, f in named_factors(adapter).items()}
    changes = dense(base, adapter, leaves)
    with adapter.disabled(), by_formula(base, changes):
        truth = measured(base, x, leaves)
    found = errors(by_adapter(base, adapter, x), truth)
    assert max(found.values()) <= 1e-12, found
    for path, change in changes.items():
        assert (adapter.delta(path) - change).norm() <= 1e-12 * change.norm()


def test_the_base_weight_is_neither_stored_nor_counted() -> None:
    adapter = attached(model("llama"), "hira")
    assert [name for name, _ in adapter.named_parameters()] == ["factors.B_d_out64", "factors.B_d_out32", "factors.A"]
    assert not list(adapter.buffers())


def test_a_merge_changes_no_base_weight_that_an_update_reads() -> None:
    base, x = model("gpt2"), inputs("gpt2")
    first = tp.attach(base, tp.load_spec("lora"))
    second = attached(base, "hira")
    randomise(first)
    randomise(second)
    path = second.sites[0].module
    with torch.no_grad():
        truth, change = run(base, x), second.delta(path)
        first.merge()
        assert (run(base, x) - truth).norm() <= 1e-12 * truth.norm()
        second.merge()
        assert torch.equal(second.delta(path), change)
        assert (run(base, x) - truth).norm() <= 1e-12 * truth.norm()
        second.unmerge()
        first.unmerge()
        assert torch.equal(run(base, x), truth)


class Quantised(nn.Module):
    """A linear module whose weight is no matrix of numbers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.linear = [linear]
        self.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear[0](x)


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_what_goes_through_the_base_costs_no_product(name: str) -> None:
    def flops(adapted: nn.Module) -> int:
        adapted.get_input_embeddings().requires_grad_()  # a base without adapter has gradients of activations too
        with FlopCounterMode(display=False) as counter:
            run(adapted, inputs("llama")).sum().backward()
        return counter.get_total_flops()

    base = model("llama").requires_grad_(False)
    without = flops(base)
    adapter = attached(base, name)
    assert flops(base) == without
    second = tp.attach(base, "lora")
    with second.disabled():
        assert flops(base) == without
    with adapter.disabled():
        of_second = flops(base)
    assert flops(base) > of_second  # W is multiplied
    second.detach()
    assert flops(base) == without


@pytest.mark.parametrize("name", ["rows", "columns"])
def test_beside_another_adapter_only_the_base_is_multiplied(name: str) -> None:
    """W is the base's alone: neither does the other adapter's update come into it, nor does the other one see another input."""
    base, x = model("llama"), inputs("llama")
    adapter = attached(base, name)
    randomise(adapter)
    changes = {path: adapter.delta(path) for path in dict.fromkeys(site.module for site in adapter.sites)}
    alone = run(base, x)
    second = tp.attach(base, tp.load_spec("lora", rank=2))
    randomise(second, seed=1)
    both = {path: change + second.delta(path) for path, change in changes.items()}
    found = run(base, x)
    with adapter.disabled(), second.disabled(), by_formula(base, both):
        truth = run(base, x)
    assert (found - truth).norm() <= 1e-12 * truth.norm()
    second.detach()
    assert torch.equal(run(base, x), alone)


@pytest.mark.parametrize(("name", "refused"), [("rows", True), ("columns", False)])
def test_of_a_quantised_weight_what_adds_to_its_input_works(name: str, refused: bool) -> None:
    base, x = model("plain"), inputs("plain")
    with_weight = attached_to_mix(base, name)
    randomise(with_weight)
    truth = run(base, x)
    values = named_factors(with_weight)
    with_weight.detach()
    base.blocks[0]["mix"] = Quantised(base.blocks[0]["mix"])
    adapter = attached_to_mix(base, name)
    adapter.factors.put(values)
    if refused:  # its bias is not known, and so neither is W x
        with pytest.raises(tp.AdapterError, match="is no plain matrix of numbers"):
            run(base, x)
    else:
        assert (run(base, x) - truth).norm() <= 1e-12 * truth.norm()


def attached_to_mix(base: nn.Module, name: str) -> tp.Adapter:
    text = HEAD.replace("query, value", "'*.mix'") + SPECS[name]
    return attach_programs(
        base, Programs(plan(with_base(lower(tp.load_spec(text), scan(base))), Regime()), adapts=True)
    )


def test_a_quantised_base_weight_is_refused() -> None:
    base = model("plain")
    base.blocks[0]["mix"] = Quantised(base.blocks[0]["mix"])
    text = HEAD.replace("query, value", "'*.mix'") + "update: B[matrix, layer, d_out] * W0[d_out, d_in]"
    adapter = attach_programs(
        base, Programs(plan(with_base(lower(tp.load_spec(text), scan(base))), Regime()), adapts=True)
    )
    message = (
        f"adapter `{adapter.name}` multiplies by the base weight `W`, but that of `blocks.0.mix` (Quantised) "
        "is no plain matrix of numbers"
    )
    with pytest.raises(tp.AdapterError) as caught:
        run(base, inputs("llama"))
    assert str(caught.value) == message
    with pytest.raises(tp.AdapterError) as caught:
        adapter.delta("blocks.0.mix")
    assert str(caught.value) == message
