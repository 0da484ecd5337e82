"""Files that are not what was saved: each is refused with its message, and the model stays as it was.

The messages are in ``golden/``, with ``FOLDER`` for the folder; ``--update-golden`` rewrites them.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

import tensorpeft as tp
from tests.checkpoint import sample
from tests.checkpoint.sample import FILE, Parts

GOLDEN = Path(__file__).parent / "golden"
Damage = Callable[[Path], object]


def bytes_of(folder: Path) -> bytes:
    return (folder / FILE).read_bytes()


def cut(length: int) -> Damage:
    return lambda folder: (folder / FILE).write_bytes(bytes_of(folder)[:length])


def flip(find: bytes, bit: int, at: int = 0) -> Damage:
    """Flip a bit of the byte that lies ``at`` bytes after the start of a text; in the tensors' data for an empty text."""

    def damage(folder: Path) -> None:
        content = bytearray(bytes_of(folder))
        place = content.index(find) + at if find else 8 + int.from_bytes(content[:8], "little") + at
        content[place] ^= 1 << bit
        (folder / FILE).write_bytes(content)

    return damage


def edit(change: Callable[[Parts], object], *, sign: bool = True) -> Damage:
    """Take the file apart, change it, put it together again."""

    def damage(folder: Path) -> None:
        parts = sample.parts(folder)
        change(parts)
        parts.write(folder, sign=sign)

    return damage


def header(**values: object) -> Damage:
    return edit(lambda parts: parts.header.update(values))


def factor(name: str, **values: object) -> Damage:
    return edit(lambda parts: parts.header["factors"][name].update(values))


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor], *, told: bool) -> Damage:
    """Another tensor, of which the header is told or not."""

    def other(parts: Parts) -> None:
        changed = change(parts.tensors[name].clone())
        if told:
            parts.set(name, changed)
        else:
            parts.tensors[name] = changed

    return edit(other)


def with_number(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda t: t.index_fill(0, torch.tensor([0]), value)


def torch_archive(folder: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, buffer)
    (folder / FILE).write_bytes(buffer.getvalue())


def text_instead(text: str) -> Damage:
    return lambda folder: (folder / FILE).write_bytes(save({}, {"tensorpeft": text}))


def respelt(old: str, new: str) -> Damage:
    return edit(lambda parts: parts.header.update(spec=parts.header["spec"].replace(old, new)))


DAMAGES: dict[str, Damage] = {
    "no_file": lambda folder: (folder / FILE).unlink(),
    "empty": cut(0),
    "cut_in_the_length": cut(5),
    "cut_in_the_header": cut(700),
    "cut_before_the_data": lambda folder: cut(8 + int.from_bytes(bytes_of(folder)[:8], "little"))(folder),
    "cut_by_one_byte": cut(-1),
    "one_byte_more": lambda folder: (folder / FILE).write_bytes(bytes_of(folder) + b"\0"),
    "pickle": lambda folder: (folder / FILE).write_bytes(pickle.dumps({"weight": [0.0] * 100})),
    "zip": torch_archive,
    "no_metadata": lambda folder: save_file({"B": torch.zeros(2)}, folder / FILE),
    "metadata_of_others": lambda folder: save_file({"B": torch.zeros(2)}, folder / FILE, {"format": "pt"}),
    "metadata_no_json": text_instead("{"),
    "metadata_a_list": text_instead("[1]"),
    "metadata_deep": text_instead("[" * 100_000),
    "metadata_long": text_instead(" " * (16 * 2**20 + 1)),
    "format_missing": edit(lambda parts: parts.header.pop("format")),
    "format_newer": header(format=2),
    "format_text": header(format="1"),
    "flip_in_the_length": lambda folder: (folder / FILE).write_bytes(b"\xff" + bytes_of(folder)[1:]),
    "flip_in_a_digest": flip(b"fingerprint", bit=0, at=20),
    "flip_in_the_spec": flip(b"keep(5)", bit=1, at=5),
    "flip_in_the_rank": flip(b"{r: 3}", bit=0, at=4),
    "flip_in_a_name": flip(b'"d":{"dtype"', bit=0, at=1),
    "flip_in_a_dtype": flip(b'"dtype":"F32"', bit=1, at=10),
    "flip_in_the_data": flip(b"", bit=3, at=17),
    "unsigned_edit": edit(lambda parts: parts.header.update(library="9.9.9"), sign=False),
    "unknown_key": header(extra=1),
    "key_missing": edit(lambda parts: parts.header.pop("library")),
    "wrong_type": header(library=1),
    "site_malformed": edit(lambda parts: parts.header["base"]["sites"].append(["up", 2, 8])),
    "size_zero": factor("d", shape=[0, 3]),
    "dtype_unknown": factor("d", dtype="object"),
    "factor_name_strange": edit(
        lambda parts: parts.header["factors"].update({"../d": parts.header["factors"].pop("d")})
    ),
    "fingerprint_contradicts": edit(lambda parts: parts.header["base"].update(fingerprint="0" * 64)),
    "spec_broken": respelt("d_out, r]", "d_out, r"),
    "spec_misspelt": respelt("init:", "inti:"),
    "spec_a_name": header(spec="lora"),
    "spec_a_path": header(spec="/etc/hostname.yaml"),
    "spec_python": header(spec="!!python/object/apply:os.system ['true']\n"),
    "spec_other_rank": respelt("{r: 3}", "{r: 4}"),
    "spec_other_seed": respelt("seed: 7", "seed: 8"),
    "spec_other_factors": respelt("A", "C"),
    "spec_other_target": respelt("[up, down]", "[up, left]"),
    "tensor_missing": edit(lambda parts: parts.tensors.pop("d")),
    "tensor_extra": edit(lambda parts: parts.tensors.update(dd=torch.zeros(1))),
    "factor_missing": edit(lambda parts: (parts.tensors.pop("d"), parts.header["factors"].pop("d"))),
    "factor_not_stored": edit(
        lambda parts: (parts.tensors.pop("d"), parts.header["factors"]["d"].update(stored=False))
    ),
    "shape_of_tensor": tensor("d", lambda t: t.T.contiguous(), told=False),
    "shape_of_factor": tensor("d", lambda t: t.T.contiguous(), told=True),
    "dtype_of_tensor": tensor("d", lambda t: t.double(), told=False),
    "values_of_tensor": tensor("d", lambda t: t + 1, told=False),
    "not_a_number": tensor("B", with_number(float("nan")), told=True),
    "infinite": tensor("d", with_number(float("inf")), told=True),
    "seeded_factor_differs": factor("A", sha256="0" * 64),
    "mask_differs": factor("B", mask="0" * 64),
}

HEADS = """\
tensorpeft: 1
name: heads
target: {matrices: [up]}
rank: {r: 2}
update: A[head, r] * B[head_dim, r] * C[width, r]
factors: {B: {init: zeros}}
heads: {count: 2}
"""

BASES: dict[str, Callable[[], nn.Module]] = {
    "base_wider": lambda: sample.model(width=16),
    "base_deeper": lambda: sample.model(layers=3),
    "base_shallower": lambda: sample.model(layers=1),
    "base_other_names": lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
    "base_one_matrix_wider": lambda: widened(sample.model()),
}


def widened(model: nn.Module) -> nn.Module:
    model.blocks[1].up = nn.Linear(8, 12)
    return model


def refusal(model: nn.Module, folder: Path) -> str:
    """The message of a load that fails and changes nothing."""
    before = sample.state(model)
    with pytest.raises(tp.CheckpointError) as error:
        tp.load(model, folder)
    assert sample.state(model) == before
    return str(error.value)


def check_golden(name: str, message: str, folder: Path, update: bool) -> None:
    size = (folder / FILE).stat().st_size if (folder / FILE).is_file() else -1
    message = message.replace(str(folder), "FOLDER").replace(f"found {size:,} bytes", "found N bytes") + "\n"
    path = GOLDEN / f"{name}.txt"
    if update:
        path.write_text(message, encoding="utf-8")
    assert message == path.read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sample.adapter_on(sample.model()).save(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused(name: str, folder: Path, update_golden: bool) -> None:
    intact = bytes_of(folder)
    DAMAGES[name](folder)
    assert not (folder / FILE).exists() or bytes_of(folder) != intact
    check_golden(name, refusal(sample.model(), folder), folder, update_golden)


@pytest.mark.parametrize("name", BASES)
def test_another_base_is_refused(name: str, folder: Path, update_golden: bool) -> None:
    check_golden(name, refusal(BASES[name](), folder), folder, update_golden)


def test_other_heads_are_refused(tmp_path: Path, update_golden: bool) -> None:
    """Every module has its size, but the heads that the factors are cut by are others."""
    tp.attach(sample.model(), HEADS).save(tmp_path)
    edit(lambda parts: parts.header.update(spec=parts.header["spec"].replace("count: 2", "count: 4")))(tmp_path)
    check_golden("other_heads", refusal(sample.model(), tmp_path), tmp_path, update_golden)


def test_a_folder_that_is_none_is_refused(folder: Path, update_golden: bool) -> None:
    check_golden("folder_missing", refusal(sample.model(), folder / "typo"), folder, update_golden)
    check_golden("folder_is_the_file", refusal(sample.model(), folder / FILE), folder, update_golden)


def test_a_model_without_weights_is_refused(folder: Path) -> None:
    model = sample.model().to("meta")
    with pytest.raises(tp.AdapterError) as error:
        tp.load(model, folder)
    assert str(error.value) == "the model's weights are on the meta device: load them before the adapter"
    assert not [name for name in dict(model.named_modules()) if "tensorpeft" in name]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_every_golden_text_is_of_some_test() -> None:
    others = {"other_heads", "folder_missing", "folder_is_the_file"}
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {*DAMAGES, *BASES, *others}
