"""A model with every kind of site."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tensorpeft as tp
from tests.models import randomise


class Every(nn.Module):
    """Every kind of site: an embedding, a convolution, attention that reads its weights, a linear module."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        h = h + self.conv(h.mT).mT
        for _ in range(2):
            h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.linear(h)


def every() -> tuple[nn.Module, tp.Adapter, Tensor]:
    torch.manual_seed(0)
    model = Every().double()
    adapter = tp.attach(model, tp.load_spec("lora", rank=2, matrices=["all-linear"]))
    randomise(adapter)
    return model, adapter, torch.randint(0, 10, (4, 5))
