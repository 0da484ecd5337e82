"""Models with sites that are no linear modules, and what an adapter on them is held to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call

import tensorpeft as tp
from tests.models import randomise

Deltas = Callable[[dict[str, Tensor], dict[str, Tensor]], dict[str, Tensor]]
HEAD = "tensorpeft: 1\ntarget: {matrices: [%s]}\n"


def embedding() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Embedding(10, 6, padding_idx=0)), torch.tensor([[1, 2, 9], [3, 1, 4]])


def scaled_embedding() -> tuple[nn.Module, Tensor]:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 3 * super().forward(ids)

    return nn.Sequential(Scaled(10, 6)), torch.tensor([[1, 2, 9], [3, 1, 4]])


def conv(module: nn.Module, *shape: int) -> Callable[[], tuple[nn.Module, Tensor]]:
    def made() -> tuple[nn.Module, Tensor]:
        return nn.Sequential(copy.deepcopy(module)), torch.randn(shape, generator=torch.Generator().manual_seed(3))

    return made


MODULES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "embedding": embedding,
    "embedding of a class of its own": scaled_embedding,
    "conv1d": conv(nn.Conv1d(4, 6, 3), 2, 4, 7),
    "conv1d, no batch": conv(nn.Conv1d(4, 6, 3), 4, 7),
    "conv2d": conv(nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), dilation=(2, 1)), 2, 4, 7, 5),
    "conv2d, same": conv(nn.Conv2d(4, 6, 3, padding="same", bias=False), 2, 4, 5, 5),
    "conv2d, reflected": conv(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), 2, 4, 5, 5),
    "conv3d": conv(nn.Conv3d(2, 6, 2, padding=1, padding_mode="circular"), 2, 2, 3, 4, 3),
}


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    return weight.t() if isinstance(module, nn.Embedding) else weight.flatten(1)


def stored(module: nn.Module, matrix: Tensor) -> Tensor:
    return matrix.t() if isinstance(module, nn.Embedding) else matrix.reshape(module.weight.shape)


def built(module: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    model, x = MODULES[module]()
    return model.double(), x.double() if x.is_floating_point() else x


def all_factors(adapter: tp.Adapter) -> dict[str, Tensor]:
    """Copies of the factors, which take gradients."""
    tensors = [*adapter.factors.named_parameters(), *adapter.factors.named_buffers()]
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors}


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def hold(model: nn.Module, adapter: tp.Adapter, inputs: dict[str, Tensor], deltas: Deltas) -> None:
    """Hold an adapter's outputs, gradients, deltas and merges to the base run with other weights.

    ``deltas`` gives from the factors and the base's weights what is added to some of these, by their names.
    """
    weights = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if "tensorpeft" not in name}
    with adapter.disabled():
        base = first(model(**inputs))
    randomise(adapter)
    factors = all_factors(adapter)
    changes = deltas(factors, weights)
    found = first(model(**inputs))
    with adapter.disabled():
        changed = {name: weights[name] + change for name, change in changes.items()}
        expected = first(functional_call(model, {**weights, **changed}, (), inputs))
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4), dtype=expected.dtype)
    (found * probe).sum().backward()
    (expected * probe).sum().backward()
    assert (found - base).norm() > 1e-3 * base.norm()
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-11)
    for name, parameter in adapter.factors.named_parameters():
        assert torch.allclose(parameter.grad, factors[name].grad, rtol=1e-8, atol=1e-11), name
    adapter.merge()
    assert torch.allclose(first(model(**inputs)), expected, rtol=1e-9, atol=1e-11)
    assert all(torch.allclose(model.get_parameter(name), tensor) for name, tensor in changed.items())
    adapter.unmerge()
    adapter.detach()
    assert torch.allclose(first(model(**inputs)), base, rtol=1e-12, atol=1e-14)  # torch may take another path
    assert {name for name, _ in model.named_parameters()} == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.named_parameters())


EXPERTS = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = {"input_ids": torch.arange(3, 17).view(2, 7)}
PATH = "model.layers.{}.mlp.experts.{}"


def mixture(implementation: str = "eager") -> nn.Module:
    torch.manual_seed(1)
    config = transformers.MixtralConfig(**EXPERTS, experts_implementation=implementation)
    return transformers.MixtralForCausalLM(config).double().eval()


def interleaved() -> nn.Module:
    """Of gpt-oss, whose weights are stored (d_in, d_out), a column of `gate` and one of `up` in turn."""
    torch.manual_seed(1)
    model = (
        transformers.GptOssForCausalLM(transformers.GptOssConfig(**EXPERTS, experts_implementation="eager"))
        .double()
        .eval()
    )
    for name, parameter in model.named_parameters():
        if "experts" in name or "sinks" in name or "router" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


def encoder() -> nn.Module:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
