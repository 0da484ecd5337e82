"""The bytes of the file: which they are, that they depend on the adapter alone, and that they come all at once."""

from __future__ import annotations

import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch

import tensorpeft as tp
from tests.checkpoint import sample
from tests.models import build

# elements that are trained or stored, in the small Llama: width 64, 8 query heads and 4 for key and value, 2 layers
STORED = {
    "lora": 2 * 8 * (64 + 64) + 2 * 8 * (64 + 32),
    "vera": 2 * (64 + 256) + 2 * (32 + 256),  # A and B come from the seed
    "shared_a": 2 * 8 * (64 + 8 * 64) + 2 * 8 * (64 + 8 * 32),  # A once, B for 8 tasks
    "lorta": 8 * (4 + 2 + (8 + 4) + 8 + 64),  # a head factor for each of the two head counts
}

SAVE_ALL = """
import sys
import torch
import tensorpeft as tp
heads = {"count": 2}
for method in ("lora", "vera", "shared_a", "partial_lora", "lorta"):
    modules = {name: torch.nn.Linear(8, 8) for name in ("query", "key", "value", "out")}
    spec = tp.load_spec(method, heads=heads) if method == "lorta" else method
    tp.attach(torch.nn.ModuleDict(modules), spec).save(f"{sys.argv[1]}/{method}")
"""


def test_the_bytes_are_the_same_in_two_processes(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SAVE_ALL, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            stderr=subprocess.DEVNULL,
        )
        for seed in ("1", "2")
    ]
    assert [process.wait() for process in running] == [0, 0]
    files = [{p.parent.name: p.read_bytes() for p in (tmp_path / seed).glob(f"*/{sample.FILE}")} for seed in ("1", "2")]
    assert len(files[0]) == 5
    assert files[0] == files[1]


@pytest.mark.parametrize("spec", STORED)
def test_the_file_holds_every_number_once(spec: str, tmp_path: Path) -> None:
    content = tp.attach(build("llama"), spec).save(tmp_path).read_bytes()
    assert len(content) - 8 - int.from_bytes(content[:8], "little") == 4 * STORED[spec]


def test_the_header_says_what_the_format_promises(tmp_path: Path) -> None:
    adapter = sample.adapter_on(sample.model())
    adapter.save(tmp_path)
    parts = sample.parts(tmp_path)
    header = parts.header
    rows = [[matrix, layer, 8, 8] for matrix in ("up", "down") for layer in (0, 1)]
    assert header["format"] == 1
    assert header["library"] == tp.__version__
    assert header["sha256"] == sample.signature(header)
    assert header["base"] == {
        "model": "Residual",
        "sites": rows,
        "fingerprint": sha256(sample.canonical(rows).encode()).hexdigest(),
    }
    assert tp.load_spec(header["spec"]) == tp.load_spec(sample.SPEC)
    assert {name: factor["stored"] for name, factor in header["factors"].items()} == {"A": False, "B": True, "d": True}
    assert {name: factor["sha256"] for name, factor in header["factors"].items()} == {
        name: sample.digest(adapter.factors[name].detach()) for name in ("A", "B", "d")
    }
    assert {name: tensor.shape for name, tensor in parts.tensors.items()} == {"B": (2 * 2 * 5 * 3,), "d": (2, 3)}


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_failing_write_leaves_the_old_file(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = sample.adapter_on(sample.model())
    old = adapter.save(tmp_path).read_bytes()
    with torch.no_grad():
        adapter.factors["B"].add_(1)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(step, full)
        with pytest.raises(OSError, match="No space left on device"):
            adapter.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [sample.FILE]
    assert (tmp_path / sample.FILE).read_bytes() == old
    assert adapter.save(tmp_path).read_bytes() != old


SAVE_AND_WAIT = """
import os, sys, time
from pathlib import Path
from tests.checkpoint import sample
adapter = sample.adapter_on(sample.model())
os.fsync = lambda number: print("writing", flush=True) or time.sleep(600)
adapter.save(Path(sys.argv[1]))
"""


def saving(folder: Path) -> subprocess.Popen:
    """A process that has written its draft, and waits before it makes it the file."""
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", SAVE_AND_WAIT, str(folder)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    return process


def test_the_next_save_removes_what_a_killed_one_left_and_nothing_of_one_that_lives(tmp_path: Path) -> None:
    adapter = sample.adapter_on(sample.model())
    others = {".adapter.safetensors.swp", f".adapter.safetensors.{'x' * 16}", f".other.{'0' * 16}"}
    for name in others:
        (tmp_path / name).write_text("of somebody else")
    process = saving(tmp_path)
    try:
        (draft,) = {path.name for path in tmp_path.iterdir()} - others
        adapter.save(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {*others, draft, sample.FILE}
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    adapter.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*others, sample.FILE}


def test_a_draft_that_another_save_took_for_left_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, replace, removed = sample.adapter_on(sample.model()), Path.replace, []

    def late(draft: Path, target: Path) -> Path:
        if len(removed) < 2:
            draft.unlink()
            removed.append(draft)
        return replace(draft, target)

    monkeypatch.setattr(Path, "replace", late)
    adapter.save(tmp_path)
    assert len(removed) == 2
    assert [path.name for path in tmp_path.iterdir()] == [sample.FILE]
    sample.parts(tmp_path)


@pytest.mark.parametrize("mode", [0o640, 0o600, 0o664])
def test_a_file_keeps_its_permissions(mode: int, tmp_path: Path) -> None:
    adapter = sample.adapter_on(sample.model())
    path = adapter.save(tmp_path)
    path.chmod(mode)
    assert adapter.save(tmp_path) == path
    assert path.stat().st_mode & 0o7777 == mode


def test_the_folder_is_on_disk_after_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    monkeypatch.setattr("os.fsync", lambda number: synced.append(os.path.realpath(f"/proc/self/fd/{number}")))
    sample.adapter_on(sample.model()).save(tmp_path)
    draft, folder = map(Path, synced)
    assert draft.parent == folder == tmp_path
    assert draft.name.startswith(f".{sample.FILE}.")


def test_what_cannot_be_loaded_is_not_saved(tmp_path: Path) -> None:
    adapter = sample.adapter_on(sample.model())
    old = adapter.save(tmp_path).read_bytes()
    refused = {
        "factor `B` of adapter `sample` has values that are not finite; nothing was saved": float("nan"),
        "factor `d` of adapter `sample` has values that are not finite; nothing was saved": float("inf"),
    }
    for message, value in refused.items():
        name = message[8]
        with torch.no_grad():
            kept = adapter.factors[name].clone()
            adapter.factors[name].view(-1)[1] = value
        with pytest.raises(tp.AdapterError) as error:
            adapter.save(tmp_path)
        assert str(error.value) == message
        with torch.no_grad():
            adapter.factors[name].copy_(kept)
    assert (tmp_path / sample.FILE).read_bytes() == old


def test_an_adapter_on_the_meta_device_has_nothing_to_save(tmp_path: Path) -> None:
    adapter = tp.attach(sample.model().to("meta"), sample.SPEC)
    with pytest.raises(tp.AdapterError) as error:
        adapter.save(tmp_path / "folder")
    assert str(error.value) == "factor `B` of adapter `sample` is on the meta device: it has no values to save"
    assert not (tmp_path / "folder").exists()


def test_an_adapter_with_a_dtype_of_no_file_is_not_saved(tmp_path: Path) -> None:
    adapter = sample.adapter_on(sample.model())
    adapter.factors["B"].data = adapter.factors["B"].detach().to(torch.complex64)
    with pytest.raises(tp.AdapterError) as error:
        adapter.save(tmp_path)
    expected = "is complex64, expected one of float64, float32, bfloat16, float16; nothing was saved"
    assert str(error.value) == f"factor `B` of adapter `sample` {expected}"
