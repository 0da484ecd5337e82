"""Files that commit 2e9e349 wrote load for ever: the same factors, the same dW, the same outputs.

They stand in ``written/``, each beside what it gave then. ``write`` wrote them, and is kept to say how; it is not run again.
"""

from __future__ import annotations

from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tensorpeft as tp

WRITTEN = Path(__file__).parent / "written"
PARTIAL = {"B[d_out]": "keep(3)", "A[d_in, r]": "keep(0.5)"}
SPECS: dict[str, tuple[str, dict[str, object]]] = {
    "lora": ("lora", {"rank": 2, "train": ["biases", "norms"]}),
    "lorta": ("lorta", {"rank": 3}),
    "dora": ("dora", {"rank": 2}),
    "partial_lora": ("partial_lora", {"rank": 2, "seed": 5, "mask": PARTIAL}),
    "scored": (
        "targeted_lora",
        {"rank": 2, "mask": {"B[d_out]": "top(3)"}, "scores": "scores.npz"},
    ),  # the file holds the indices
    "vera": ("vera", {"rank": 4}),  # the file holds no A and no B
}


class Attention(nn.Module):
    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8, eps=1e-6)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.o_proj(torch.tanh(self.q_proj(h) * self.k_proj(h)) + self.v_proj(h))


def model() -> nn.Module:
    """Two attentions whose numbers no generator has drawn: fractions that float32 has exactly."""
    made = nn.ModuleDict({"layers": nn.ModuleList(Attention() for _ in range(2))})
    made.forward = lambda x: made["layers"][1](made["layers"][0](x))
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.copy_(fractions(parameter, 5 + number % 4))
    return made


def fractions(like: Tensor, step: int) -> Tensor:
    return ((torch.arange(like.numel()) * step % 31 - 15).view(like.shape) / 16).to(like.dtype)


def given(adapter: tp.Adapter, base: nn.Module) -> dict[str, Tensor]:
    """What an adapter gives: the dW of every site, and the output of the model."""
    deltas = {site.path: adapter.delta(site.path) for site in adapter.sites}
    x = fractions(torch.empty(3, 8), 7)
    return {key: tensor.detach().contiguous() for key, tensor in {**deltas, "output": base(x)}.items()}


def write(folder: Path) -> None:
    for name, (spec, options) in SPECS.items():
        base, to = model(), folder / name
        to.mkdir(parents=True)
        if name == "scored":
            sites = [f"{matrix}.{layer}" for matrix in ("query", "value") for layer in (0, 1)]
            scores = {site: np.arange(8.0) * (3 + 2 * n) % 8 for n, site in enumerate(sites)}
            np.savez(to / "scores.npz", **scores)
        with chdir(to):
            adapter = tp.attach(base, tp.load_spec(spec, **options))
        with torch.no_grad():
            for number, parameter in enumerate(p for p in adapter.parameters() if p.requires_grad):
                parameter.copy_(fractions(parameter, 3 + 2 * number))
        adapter.save(to)
        save_file(given(adapter, base), to / "given.safetensors")
        (to / "scores.npz").unlink(missing_ok=True)


@pytest.mark.parametrize("name", SPECS)
def test_a_file_of_then_gives_what_it_gave(name: str) -> None:
    base = model()
    adapter = tp.load(base, WRITTEN / name)
    expected = load_file(WRITTEN / name / "given.safetensors")
    found = given(adapter, base)
    assert found.keys() == expected.keys()
    assert any(expected[site.path].any() for site in adapter.sites)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_it_is_written_again_as_it_was_but_for_its_version(name: str, tmp_path: Path) -> None:
    old = WRITTEN / name / "adapter.safetensors"
    if tp.__version__ == "0.1.0":
        assert tp.load(model(), old.parent).save(tmp_path).read_bytes() == old.read_bytes()
    else:
        assert load_file(tp.load(model(), old.parent).save(tmp_path)).keys() == load_file(old).keys()
