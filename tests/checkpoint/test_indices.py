"""What masks keep by scores is saved with the adapter: the file of scores is not needed again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import tensorpeft as tp
from tests.checkpoint.sample import model, outputs, parts

SPEC = """\
tensorpeft: 1
target: {{matrices: [up, down]}}
rank: {{r: 3}}
update: B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]
factors: {{A: {{frozen: true}}, B: {{init: zeros}}}}
scores: {0}
mask:
  B[d_out]: {{"*": top(5), down layers 1: keep(2)}}
  A[d_in]: sample(4)
"""


def saved(tmp_path: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """An adapter in a file, without its scores: its output, and its factors."""
    generator, scores = np.random.default_rng(0), tmp_path / "scores.npz"
    np.savez(scores, **{f"{m}.{n}": generator.random((8, 8)) for m in ("up", "down") for n in range(2)})
    base = model()
    adapter = tp.attach(base, SPEC.format(scores))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    adapter.save(tmp_path)
    scores.unlink()
    return outputs(base), adapter.state_dict()


def test_it_loads_without_the_scores(tmp_path: Path) -> None:
    expected, factors = saved(tmp_path)
    other = model()
    with pytest.raises(tp.SpecError, match="cannot be read"):
        tp.attach(other, SPEC.format(tmp_path / "scores.npz"))
    adapter = tp.load(other, tmp_path)
    assert torch.equal(outputs(other), expected)
    assert all(torch.equal(value, factors[name]) for name, value in adapter.state_dict().items())
    adapter.save(tmp_path / "again")
    names = ["adapter.safetensors", "again/adapter.safetensors"]
    assert (tmp_path / names[0]).read_bytes() == (tmp_path / names[1]).read_bytes()


def test_a_checkpoint_opens_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its spec names one; without the indices it would be read, and a pipe would never end."""
    saved(tmp_path)
    file = parts(tmp_path)
    del file.tensors["mask.B"]
    file.write(tmp_path)
    opened = []
    monkeypatch.setattr("numpy.load", lambda *given, **named: opened.append(given))
    with pytest.raises(tp.CheckpointError, match=r"the indices that `top\(5\)` keeps are not saved"):
        tp.load(model(), tmp_path)
    assert opened == []


DAMAGES = {
    "cut": (lambda t: t[:-1], "the saved indices of factor `B` are damaged, or of another model"),
    "descending": (lambda t: torch.cat([t[:1], t[1:6].flip(0), t[6:]]), "the saved indices of factor `B` are damaged"),
    "too large": (lambda t: torch.cat([t[:5], torch.tensor([8]), t[6:]]), "the saved indices of factor `B` are damaged"),
    "empty": (lambda t: t[:0], "the saved indices of factor `B` are damaged"),
    "others": (lambda t: torch.cat([torch.tensor([5, 0, 1, 2, 3, 4]), t[6:]]), "the mask of factor `B` is another"),
    "floats": (lambda t: t.double(), "the indices `mask.B` are F64 of shape (21,), expected a list of I64"),
    "a grid": (lambda t: t[None], "the indices `mask.B` are I64 of shape (1, 21), expected a list of I64"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_indices_are_refused(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    file = parts(tmp_path)
    change, message = DAMAGES[name]
    file.tensors["mask.B"] = change(file.tensors["mask.B"])
    file.write(tmp_path)
    with pytest.raises(tp.CheckpointError) as caught:
        tp.load(model(), tmp_path)
    assert message in str(caught.value)


def test_indices_of_a_factor_without_a_mask_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    file = parts(tmp_path)
    file.tensors["mask.C"] = file.tensors["mask.B"].clone()
    file.write(tmp_path)
    with pytest.raises(tp.CheckpointError, match=r"it has a tensor `mask\.C`, which is no stored factor of it"):
        tp.load(model(), tmp_path)


def test_no_indices_of_rules_that_the_spec_tells(tmp_path: Path) -> None:
    text = SPEC.replace("scores: {0}\n", "").format().replace("top(5)", "keep(5)").replace("sample", "keep")
    tp.attach(model(), text).save(tmp_path)
    assert parts(tmp_path).tensors.keys() == {"B"}
