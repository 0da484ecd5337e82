"""Small real architectures with random weights, and an input for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTModel,
)


def llama() -> nn.Module:
    """Two layers, eight heads of which four carry keys and values."""
    config = LlamaConfig(
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=96,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=50,
    )
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = BertConfig(hidden_size=48, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4, vocab_size=50)
    return BertModel(config, add_pooling_layer=False)


def gpt2() -> nn.Module:
    return GPT2Model(GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=50, n_positions=32))


def vit() -> nn.Module:
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4, image_size=16, patch_size=8
    )
    return ViTModel(config, add_pooling_layer=False)


def roberta() -> nn.Module:
    """A classifier: its head has a dense layer."""
    config = RobertaConfig(
        hidden_size=48, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4, vocab_size=50, num_labels=3
    )
    return RobertaForSequenceClassification(config)


def mixtral() -> nn.Module:
    """Three experts in one parameter, all of which every token has: so that no rounding chooses others."""
    config = MixtralConfig(
        hidden_size=48,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=3,
        vocab_size=50,
        experts_implementation="eager",
    )
    return MixtralForCausalLM(config)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {"llama": llama, "bert": bert, "gpt2": gpt2, "vit": vit}
OTHERS: dict[str, Callable[[], nn.Module]] = {"roberta": roberta, "mixtral": mixtral}  # each for what it alone has


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model in evaluation mode (no dropout), its weights the same at every call."""
    torch.manual_seed(0)
    return {**ARCHITECTURES, **OTHERS}[name]().to(dtype).eval()


def widen_norms(model: nn.Module) -> nn.Module:
    """Llama's own RMSNorm, and Mixtral's, rounds to float32, in which a difference of 1e-16 can become one of 1e-8."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__ in ("LlamaRMSNorm", "MixtralRMSNorm"):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon, dtype=child.weight.dtype)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm.requires_grad_(False))
    return model


def inputs(name: str, batch: int = 3, seed: int = 1) -> Tensor:
    """Token ids (batch, 7), or images."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return torch.randn(batch, 3, 16, 16, generator=generator)
    return torch.randint(0, 50, (batch, 7), generator=generator)


def embeddings(model: nn.Module) -> nn.Module:
    """The module whose output the gradient of the input is taken at."""
    return model.embeddings if isinstance(model, ViTModel) else model.get_input_embeddings()


def run(model: nn.Module, x: Tensor) -> Tensor:
    """The model's first output, (batch, tokens, features), or a classifier's (batch, labels)."""
    if x.is_floating_point():
        return model(x.to(next(model.parameters()).dtype))[0]
    bidirectional = isinstance(model, BertModel | RobertaForSequenceClassification)
    return model(x)[0] if bidirectional else model(x, use_cache=False)[0]


@torch.no_grad()
def randomise(adapter: nn.Module, std: float = 0.3, seed: int = 2) -> None:
    """An adapter at its zero start proves nothing: give every trained factor random numbers, and move what else is trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.factors.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    for path, base in adapter.trained_base.base.items():  # a norm of the model stays one
        moved = torch.randn(base.shape, generator=generator, dtype=torch.float64) * min(std, 0.3)
        adapter.trained_base[path].copy_(base + moved)


def weight_at(model: nn.Module, path: str) -> Tensor:
    """The weight of a module, or a parameter, by its path."""
    module, _, name = path.rpartition(".")
    found = getattr(model.get_submodule(module), name)
    return found.weight if isinstance(found, nn.Module) else found


def enliven(adapter: nn.Module, seed: int = 2) -> None:
    """Random numbers at which an update is neither lost beside the weights nor drowns them."""
    if not adapter.sites:  # nothing is trained but parameters of the model
        randomise(adapter, seed=seed)
        return
    path, task = adapter.sites[0].path, 0 if adapter.spec.tasks else None
    weight = weight_at(adapter.model, path).float().norm()
    std = 0.3
    for _ in range(12):
        randomise(adapter, std, seed)
        ratio = adapter.delta(path, task).float().norm() / weight
        if 0.1 <= ratio <= 1.0:
            return
        std *= 1.5 if ratio < 0.1 else 0.67
