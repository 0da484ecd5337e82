"""The structures of ``structures.yaml`` as texts of specs, and the one model for them that no family knows."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from tests.models import build, widen_norms

_TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())

STRUCTURES: dict[str, str] = {
    name: yaml.safe_dump({"tensorpeft": 1, **{key: value for key, value in row.items() if key != "models"}})
    for name, row in _TABLE.items()
}
CASES: list[tuple[str, str]] = [(name, model) for name, row in _TABLE.items() for model in row["models"].split()]


class Plain(nn.Module):
    """Two blocks of linear modules of three shapes, around which nothing is standard."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 24)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"mix": nn.Linear(24, 24), "grow": nn.Linear(24, 48), "shrink": nn.Linear(48, 24)})
            for _ in range(2)
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, ids: Tensor, use_cache: bool = False) -> tuple[Tensor]:
        h = self.words(ids)
        for block in self.blocks:
            h = h + block["shrink"](torch.tanh(block["grow"](torch.tanh(block["mix"](h)))))
        return (h,)


def model(name: str) -> nn.Module:
    """A small model in float64, in which nothing rounds to float32."""
    if name != "plain":
        return widen_norms(build(name, torch.float64))
    torch.manual_seed(0)
    return Plain().double().eval()
