"""The canonical text of a spec says the same spec again, and itself."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

import pytest
import yaml

from tensorpeft.language.loader import load_spec
from tensorpeft.language.shipped import method_paths
from tensorpeft.language.spec import Spec

HEAD = "tensorpeft: 1\ntarget: {matrices: [query]}\n"
TEXTS = {
    "base weight": "update: W[d_out, d_in] * v[matrix, layer, d_out]\nfactors: {v: {init: zeros}}\nstart: zero\n",
    "differences": "update: -B[layer, d_out, r] * A[r, d_in] - C[d_out, r] * A[r, d_in]\nrank: 4\n"
    "factors: {B: {init: zeros}, C: {init: zeros}}\n",
    "expressions": "update: B[d_out, r, n] * L[r, n] * A[r, n, d_in]\nrank: {r: 4, n: 'ceil(min(d_in, d_out) / r)'}\n"
    "factors: {L: {init: zeros}, A: {init: 'kaiming_uniform(a=-1.5, fan=r)', frozen: true, stored: true}}\n"
    "alpha: 0.1\nscale: -alpha ** 2 / sqrt(r) * 1e-7\n",
    "odd names": "update: null[d_out, y] * true[y, d_in]\nrank: {y: 3}\nfactors: {'null': {init: zeros}, 'true': {init: ones}}\n",
    "everything": "structure: tucker\nmodes: [slot = layer * matrix, d_out = o1(2 * 4) * o2, d_in]\nrank: 3\nfrozen: [G]\n"
    "mask: {'A_o2[o2]': 'keep(16, query=0.5)', 'A_d_in[d_in]': bernoulli(1 / 8)}\nragged: error\nseed: 12\n"
    "heads: {side: {query: d_in, '*': d_out}, count: 4}\n",
    "targets": "structure: matrix\nrank: 1\n",
}


@cache
def specs() -> dict[str, Spec]:
    found = {name: load_spec(name) for name in method_paths()}
    found.update({name: load_spec(HEAD + text) for name, text in TEXTS.items()})
    patterns = ["*.attn.q", "h.{layer}.[qk]", "{matrix}_proj", "on", "1e3", "-x", "a.b-c", "all-linear"]
    found["targets"] = load_spec(
        HEAD + TEXTS["targets"], matrices=patterns, exclude=["null", "?"], layers=[3, 1], name="1.0"
    )
    return found


@pytest.mark.parametrize("name", [*method_paths(), *TEXTS])
def test_expanding_is_idempotent(name: str) -> None:
    spec = specs()[name]
    text = str(spec)
    again = load_spec(text)
    assert again == spec
    assert str(again) == text
    assert "structure" not in text


@pytest.mark.parametrize("name", [*method_paths(), *TEXTS])
def test_other_yaml_readers_read_it_too(name: str) -> None:
    spec = specs()[name]
    plain = yaml.safe_load(str(spec))
    update = plain.get("update", {})  # one, one for each choice of sites, or none
    assert (update if isinstance(update, dict) else {"*": update}) == {
        str(at): str(entry) for at, entry in spec.update.entries.items()
    }
    assert tuple(plain["target"]["matrices"]) == spec.target.matrices
    assert {str(key) for key in plain.get("factors", ())} == {name for name, _ in spec.factors}


def test_the_text_is_the_same_in_another_process() -> None:
    code = "import sys; from tensorpeft.language.loader import load_spec; print(load_spec(sys.argv[1]), end='')"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, "vera"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert run.stdout == str(load_spec("vera"))
