"""Random damage: a file is refused, or it holds what was saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tensorpeft as tp
from tests.checkpoint import sample


@cache
def intact() -> bytes:
    with TemporaryDirectory() as folder:
        return sample.adapter_on(sample.model()).save(folder).read_bytes()


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def copied(content: bytes, place: int, source: int, length: int) -> bytes:
    return content[:place] + content[source : source + length] + content[place + length :]


Damage = Callable[[bytes, int, int], bytes]  # of a content, at two places in it

DAMAGES: st.SearchStrategy[Damage] = st.one_of(
    st.builds(lambda bit: lambda c, p, _: flipped(c, p, bit), st.integers(0, 7)),
    st.just(lambda c, p, _: c[:p]),
    st.builds(lambda s: lambda c, p, _: c[:p] + s + c[p + len(s) :], st.binary(min_size=1, max_size=9)),
    st.builds(lambda s: lambda c, p, _: c[:p] + s + c[p:], st.binary(min_size=1, max_size=9)),
    st.builds(lambda n: lambda c, p, _: c[:p] + c[p + n :], st.integers(1, 64)),
    st.builds(lambda n: lambda c, p, q: copied(c, p, q, n), st.integers(1, 64)),
)
PLACES = st.integers(0, 2**20)


def check(content: bytes) -> None:
    """Load a file: a checkpoint error and an untouched model, or the adapter that was saved."""
    model = sample.model()
    before = sample.state(model)
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / sample.FILE).write_bytes(content)
        try:
            loaded = tp.load(model, folder)
        except tp.CheckpointError:
            assert sample.state(model) == before
            return
    saved = sample.adapter_on(sample.model())
    assert loaded.sites == saved.sites
    for block in saved.network.blocks:
        assert torch.equal(loaded.factors[block.name], saved.factors[block.name])


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(DAMAGES, PLACES, PLACES), min_size=1, max_size=3))
def test_nothing_but_a_checkpoint_error_comes_of_random_damage(chosen: list[tuple[Damage, int, int]]) -> None:
    content = intact()
    for damage, place, other in chosen:
        if content:
            content = damage(content, place % len(content), other % len(content))
    check(content)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


def fields(header: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The paths of all values of a header."""
    inner = header.items() if isinstance(header, dict) else enumerate(header) if isinstance(header, list) else ()
    return [found for key, value in inner for found in [(*path, key), *fields(value, (*path, key))]]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_nothing_but_a_checkpoint_error_comes_of_a_header_that_someone_edited(data: st.DataObject) -> None:
    """The SHA-256 is made right again, so that what the header says is read."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / sample.FILE).write_bytes(intact())
        parts = sample.parts(folder)
        path = data.draw(st.sampled_from(fields(parts.header)))
        place = parts.header
        for step in path[:-1]:
            place = place[step]
        old = place[path[-1]]
        if isinstance(old, str) and data.draw(st.booleans()):
            start, length = data.draw(st.integers(0, len(old))), data.draw(st.integers(0, 8))
            place[path[-1]] = old[:start] + data.draw(st.text(max_size=3)) + old[start + length :]
        else:
            place[path[-1]] = data.draw(ANYTHING)
        parts.write(folder)
        content = (folder / sample.FILE).read_bytes()
    check(content)
