"""Emitted code is made once for sites that differ in nothing that is in it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tensorpeft as tp
from tensorpeft.emission.emit import emit
from tensorpeft.emission.lowering import SetKind
from tensorpeft.emission.program import program
from tensorpeft.network import mask_packing as packing
from tensorpeft.pipeline import front
from tensorpeft.scanning.scan import scan
from tests.models import build


def kinds(spec: str, **settings: object) -> list[SetKind]:
    planned = front(tp.load_spec(spec, **settings), scan(build("llama")))
    return [call.program.kind for call in emit(planned).sets]


def resized(kind: SetKind, mode: str) -> SetKind:
    """The same, but for one more of a mode."""
    chains = (replace(s, sizes=tuple((m, n + (m == mode)) for m, n in s.sizes)) for s in kind.chains)
    return replace(kind, chains=tuple(chains))


def test_sites_that_keep_other_numbers_of_rows_share_their_code() -> None:
    first, second = kinds("partial_lora")
    assert first.sizes != second.sizes
    ours, others = program(first), program(second)
    assert ours.forward is others.forward
    assert ours.epilogues == others.epilogues
    assert ours.whole is others.whole


@pytest.mark.parametrize(("mode", "is_in_it"), [("r", False), ("i2", True)])
def test_sizes_that_are_in_the_code_keep_it_apart(mode: str, is_in_it: bool) -> None:
    """LoKr's rank is summed over before its sites run; they split the input by its parts."""
    kind = kinds("lokr")[0]
    ours, others = program(kind), program(resized(kind, mode))
    for one, other in ((ours.forward, others.forward), (ours.whole, others.whole)):
        assert (one is not other) == (one.code.code != other.code.code) == is_in_it


def test_emitted_code_prints_every_function() -> None:
    emitted = emit(front("lora", scan(build("llama"))))
    shown = str(emitted)
    assert [line for line in shown.splitlines() if line.startswith("# ")] == [
        f"# {title}" for title, _ in emitted.listings()
    ]
    assert all(text in shown for _, text in emitted.listings())
    assert [shown.count(f"def {name}(") for name in ("prologue", "forward", "backward")] == [1, 1, 1]
    assert shown.count("def epilogue(y, ") == 2


def test_what_masks_keep_is_not_drawn_where_there_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model on the meta device the number of entries is enough: of a large one they would take minutes."""
    model = build("llama")
    truth = {name: parameter.shape for name, parameter in tp.attach(build("llama"), "shira").named_parameters()}
    monkeypatch.setattr(packing, "kept_indices", lambda *_, **__: pytest.fail("drawn"))
    model.to("meta")
    adapter = tp.attach(model, "shira")
    assert {name: parameter.shape for name, parameter in adapter.named_parameters()} == truth
    x = torch.empty(1, 4, 64, device="meta")
    for layer in model.model.layers:
        (layer.self_attn.q_proj(x).sum() + layer.self_attn.v_proj(x).sum()).backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in adapter.parameters())
