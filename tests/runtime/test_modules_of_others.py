"""Modules and hooks of other people: their forward is W x + b only if it is known to be, and their memory is theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.bitnet import AutoBitLinear
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

import tensorpeft as tp
from tests.runtime import small
from tests.runtime.small import close, move, or_refused, spec

UPDATES = {"lora": small.LORA, "ia3": small.IA3, "dora": small.DORA}
updates = pytest.mark.parametrize("update", UPDATES)


def attached(model: nn.Module, update: str, target: str = "0") -> tp.Adapter:
    return move(model, tp.attach(model, spec(UPDATES[update], target)))


def changed(model: nn.Module, adapter: tp.Adapter, path: str = "0.weight") -> dict[str, Tensor]:
    """The parameters of a model with the update in place."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if small.PREFIX not in name}
    return weights | {path: weights[path] + small.change(adapter, weights[path])}


# Hooks of others see (W + dW) x, whenever they were registered, and what they give goes on


def twice(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


def squared(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].square(),)


def with_kwargs(module: nn.Module, args: Any, named: Any, output: Tensor) -> Tensor:
    return output + 1


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "output": lambda module: module.register_forward_hook(twice),
    "output, always": lambda module: module.register_forward_hook(twice, always_call=True),
    "output, first": lambda module: module.register_forward_hook(twice, prepend=True),
    "output, with keywords": lambda module: module.register_forward_hook(with_kwargs, with_kwargs=True),
    "input": lambda module: module.register_forward_pre_hook(squared),
    "input, first": lambda module: module.register_forward_pre_hook(squared, prepend=True),
}


@updates
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_hook_of_another_changes_what_it_changes_of_the_merged_model(when, hook, update):
    model, twin = small.net(), small.net()
    if when == "before":
        HOOKS[hook](model[0])
    adapter = attached(model, update)
    if when == "after":
        HOOKS[hook](model[0])
    HOOKS[hook](twin[0])
    expected = torch.func.functional_call(twin, changed(model, adapter), (small.x(),))
    for _ in range(2):
        assert close(model(small.x()), expected)
    adapter.merge()
    assert close(model(small.x()), expected)


@updates
@pytest.mark.parametrize("when", ["before", "after", "first"])
def test_a_hook_of_another_sees_the_whole_output(when, update):
    model, seen = small.net(), []

    def register(**named: Any) -> None:
        model[0].register_forward_hook(lambda module, args, output: seen.append(output), **named)

    if when == "before":
        register()
    adapter = attached(model, update)
    if when != "before":
        register(prepend=when == "first")
    model(small.x())
    weights = changed(model, adapter)
    expected = nn.functional.linear(small.x(), weights["0.weight"], weights["0.bias"])
    assert close(seen[-1], expected)  # later too: what it keeps is not written to


@updates
def test_a_hook_for_all_modules(update):
    model, twin = small.net(), small.net()
    adapter = attached(model, update)
    weights = changed(model, adapter)

    def of_linears(module: nn.Module, args: Any, output: Any) -> Any:
        return 2 * output if isinstance(module, nn.Linear) else None

    handle = nn.modules.module.register_module_forward_hook(of_linears)
    try:
        found = model(small.x())
        expected = torch.func.functional_call(twin, weights, (small.x(),))
    finally:
        handle.remove()
    assert close(found, expected)


def test_a_hook_on_the_whole_model_runs_it_again():
    """It calls a part of the model: the update is there, once."""
    model, seen = small.net(), []
    adapter = attached(model, "lora")
    model.register_forward_hook(lambda module, args, output: seen.append(model[0](small.x())))
    output = model(small.x())
    weights = changed(model, adapter)
    assert close(output, small.with_changes(small.net(), {"0.weight": weights["0.weight"] - model[0].weight}))
    assert close(seen[0], nn.functional.linear(small.x(), weights["0.weight"], weights["0.bias"]))


# A forward that is no W x + b


class Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 3 * super().forward(input)


class Tanh(nn.Linear):
    """Autograd keeps its output."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


class Normed(nn.Linear):
    """Not linear in its weight."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight / self.weight.norm(), self.bias)


class Flattened(nn.Linear):
    """Its input is not the input of the product."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flip(-1))


class Tuple(nn.Linear):
    """As Megatron's."""

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.linear(input, self.weight), self.bias


class Keyword(nn.Linear):
    """Its input is not the first keyword that it is called with."""

    def forward(self, input: Tensor, scale: float = 1.0) -> Tensor:
        return scale * super().forward(input)


class Caching(nn.Linear):
    """It keeps what it returns, and returns it again."""

    def forward(self, input: Tensor) -> Tensor:
        if not hasattr(self, "kept"):
            self.kept = super().forward(input)
        return self.kept


class Monkey(nn.Linear):
    """Its forward is replaced on the instance, as quantisers and offloaders do."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        original = self.forward
        self.forward = lambda input: 3 * original(input)


CLASSES = (Scaled, Tanh, Normed, Flattened, Tuple, Keyword, Monkey)


@updates
@pytest.mark.parametrize("of", CLASSES)
def test_a_class_with_a_forward_of_its_own(of, update):
    """It runs with W + dW in place of W, or attach refuses it by name."""
    torch.manual_seed(0)
    model = nn.Sequential(of(6, 6)).double()
    before = small.traces(model) if of is not Monkey else None
    adapter = or_refused(lambda: attached(model, update))
    if adapter is None:
        assert before is None or small.traces(model) == before
        return
    with adapter.disabled():
        expected = torch.func.functional_call(
            model[0], {k[2:]: v for k, v in changed(model, adapter).items()}, (small.x(),)
        )
    found = model(small.x())
    for one, other in zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]:
        assert close(one, other)
    output = found[0] if isinstance(found, tuple) else found
    output.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter.factors.parameters())
    adapter.merge()
    merged = model(small.x())
    assert close(merged[0] if isinstance(merged, tuple) else merged, output)


def test_the_refusal_names_the_class():
    class Peculiar(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    model = nn.Sequential(Peculiar(6, 6)).double()
    try:
        adapter = attached(model, "lora")
    except tp.TensorpeftError as error:
        assert "Peculiar" in str(error)  # noqa: PT017 - that it works is as good
    else:
        with adapter.disabled():
            weights = {k[2:]: v for k, v in changed(model, adapter).items()}
            expected = torch.func.functional_call(model[0], weights, (small.x(),))
        assert close(model(small.x()), expected)


@pytest.mark.parametrize("named", [{"scale": 2.0, "input": 0}, {"input": 0, "scale": 2.0}, {"input": 0}], ids=str)
@updates
def test_an_input_by_keyword(update, named):
    model = nn.ModuleDict({"0": Keyword(6, 6)}).double()
    adapter = or_refused(lambda: attached(model, update))
    if adapter is None:
        return
    weights = {k[2:]: v for k, v in changed(model, adapter).items()}
    named = named | {"input": small.x()}
    expected = torch.func.functional_call(Keyword(6, 6).double(), weights, (), named)
    assert close(model["0"](**named), expected)


@pytest.mark.parametrize(
    "module", [nn.Linear(6, 6), nn.Embedding(9, 6), nn.Conv1d(6, 6, 3)], ids=lambda m: type(m).__name__
)
def test_torch_s_own_modules_take_their_input_by_keyword(module):
    model = nn.ModuleDict({"0": module}).double()
    attached(model, "lora")
    x = torch.arange(5) if isinstance(module, nn.Embedding) else torch.randn(2, 6, 6, dtype=torch.float64)
    assert torch.equal(model["0"](input=x), model["0"](x))


def bitlinear() -> nn.Module:
    return AutoBitLinear(6, 6)


def online_bitlinear() -> nn.Module:
    return AutoBitLinear(6, 6, online_quant=True)


def grouped() -> nn.Module:
    return DeepseekV4GroupedLinear(6, 8, 2)


@pytest.mark.parametrize("made", [bitlinear, online_bitlinear, grouped])
@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # BitNet's quantisers are compiled
def test_classes_of_transformers(made):
    torch.manual_seed(0)
    module = made().float()
    model, x = nn.Sequential(module), torch.randn(5, 6) if made is not grouped else torch.randn(5, 2, 6)
    adapter = or_refused(lambda: attached(model, "lora"))
    if adapter is None:
        return
    with adapter.disabled():
        weights = {k[2:]: v for k, v in changed(model, adapter).items()}
        expected = torch.func.functional_call(model[0], weights, (x,))
    found = model(x)
    assert torch.allclose(found, expected, atol=1e-5)
    adapter.merge()
    assert torch.allclose(model(x), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("target", ["query", "linear1", "linear2", "out"])
def test_torch_s_encoder_with_padding(target):
    """In evaluation it packs the rows into a nested tensor, and hands weights to one kernel."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, dropout=0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[False] * 5, [False, False, False, True, True]])
    adapter = or_refused(lambda: move(model, tp.attach(model, spec(small.LORA, target))))
    if adapter is None:
        return
    with torch.no_grad():
        found = or_refused(lambda: model(x, src_key_padding_mask=mask))
        adapter.merge()
        merged = model(x, src_key_padding_mask=mask)
    assert found is None or close(found[~mask], merged[~mask])


# Memory of others


@updates
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_hook_keeps_stays(when, update):
    model, kept = small.net(), []

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        kept.append((output, output.detach().clone(), output.square()))

    if when == "before":
        model[0].register_forward_hook(keep)
    adapter = attached(model, update)
    if when == "after":
        model[0].register_forward_hook(keep)
    output = model(small.x())
    assert all(torch.equal(values, copied) for values, copied, _ in kept)
    (output.sum() + kept[0][2].sum()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in adapter.factors.parameters())


@updates
def test_a_module_that_returns_what_it_keeps(update):
    model = nn.Sequential(Caching(6, 6)).double()
    adapter = or_refused(lambda: attached(model, update))
    if adapter is None:
        return
    weights = changed(model, adapter)
    expected = nn.functional.linear(small.x(), weights["0.weight"], weights["0.bias"])
    for _ in range(3):
        assert close(model(small.x()), expected)


@updates
def test_an_input_that_others_hold_stays(update):
    model = small.net()
    attached(model, update)
    x = small.x()
    model(x)
    assert torch.equal(x, small.x())
    view = small.x().repeat(2, 1)
    model(view[:5])
    assert torch.equal(view, small.x().repeat(2, 1))


@updates
def test_the_output_of_an_identity_is_its_input(update):
    """A module may return a view of what is not its own."""

    class Into(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            self.buffer[:] = nn.functional.linear(input, self.weight, self.bias)
            return self.buffer[:5]

    module = Into(6, 6)
    module.register_buffer("buffer", torch.zeros(5, 6))
    model = nn.Sequential(module).double().requires_grad_(False)
    adapter = or_refused(lambda: attached(model, update))
    if adapter is None:
        return
    weights = changed(model, adapter)
    with torch.no_grad():
        for _ in range(2):
            assert close(model(small.x()), nn.functional.linear(small.x(), weights["0.weight"], weights["0.bias"]))
