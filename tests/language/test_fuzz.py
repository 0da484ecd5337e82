"""Mutated specs: whatever the text, a spec or a located SpecError, within a second and 200 MB."""

from __future__ import annotations

import gc
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from os import environ
from random import Random

import pytest

from tensorpeft.language.errors import SpecError
from tensorpeft.language.loader import load_spec
from tensorpeft.language.shipped import method_paths
from tensorpeft.language.spec import Spec

N_EXAMPLES = 10_000
SPECS = [path.read_text(encoding="utf-8") for path in method_paths().values()]
SPECS += [str(load_spec(name)) for name in method_paths()]
HEAD = "tensorpeft: 1\ntarget: {matrices: [query, value]}\n"
SPECS += [
    HEAD
    + """update:
  "*": B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]
  key, value layers 0-3, 7: W[d_out, d_in] * u[matrix, layer, d_out] - C[layer, d_out, m] * W[m, d_in]
rank: {r: {"*": 8, value: 4, layers 0-5: d_in / 8}, m: d_in}
factors:
  B: {init: 'svd(W).U[:r] * S ** (1 / 2)', lr: 16}
  A: {init: 'svd(W).V[-r:]', frozen: true}
  u: {init: ones}
  C: {init: 'formula(equal(d_out, mod(m, size(m))) * cos(pi * m))'}
start: subtract
scale: {"*": 2, down: sqrt(r)}
ragged: {d_out: group, "*": slice}
""",
    HEAD
    + """modes: [d_in = i1 * i2, i2 = j1(4) * j2, s = i1 * t]
rank: {t: 2, budget: 20k}
update: G[matrix, layer, d_out, p] * H[s, p, q] * K[q, i2, t] + D[matrix, layer, d_out, d_in]
factors: {G: {init: zeros}, D: {init: zeros}, H: {init: orthogonal}, K: {init: normal(1 / sqrt(d_in + t))}}
mask:
  D[d_out, d_in]: {"*": top(0.01), query: sample(1000)}
  H[p, q]: where(less(p, q))
scores: scores.npz
dropout: {x: 0.1, p: 0.05}
train: [biases, norms, "classifier.*"]
""",
]
TOKEN = re.compile(r"\w+|\s+|[^\w\s]")

WORDS = sorted({word for text in SPECS for word in re.findall(r"[\w.]+", text)})
SIGNS = [
    *"[]{}():,*+-=/|>&!%@`'\"#?~<.;\\\t\n \r\0\x07\x85\u2028\ufeff",
    "**",
    "- ",
    ": ",
    "\n  ",
    "\n\n",
    "---",
    "...",
]
NASTY = [
    "on", "off", "yes", "null", "~", "true", "010", "-0", "0x1F", "0o17", "1e-3", "1e999", ".nan", ".inf", "1_000", "12:30:45",
    "2001-01-01", "1000000000000000000", "9" * 400, "-1", "0", "0.5", "4.0", "é", "数", "٣", "😀", "\ud83d",
    "&a [x]", "*a", "<<: *a", "!!python/object/apply:os.system [ls]", "!!int 3", "%YAML 1.2\n---", "? [a]\n: b",
    "[" * 60, "{a: " * 60, "(" * 200, "((((r))))", "1+" * 80, "a: &a [b, b]\nc: &c [*a, *a]\nd: [*c, *c]", "- " * 50,
    '"\\ud800"', '"\\UFFFFFFFF"', "'", '"', "|\n  B[d_out]\n", ">-\n  zeros\n", "x" * 5000, "structure: cp", "structure: tt",
    "structure: tucker", "modes: [slot = layer * matrix, d_out, d_in = i1(8) * i2]", "share: {A: [layer]}", "frozen: [A, B]",
    "rank: {r: n * 2, n: r}", "rank: 2 ** 2 ** 2 ** 99", "scale: (-1) ** 0.5", "scale: 10 ** 400", "alpha: 1e308",
    "W[d_out, d_in]", "sqrt(-1)", "min(1)", "a" * 70, "svd(W).U[:r]",
    "kaiming_uniform(a=1, a=2)", "keep(0)", "heads: {side: d_in, count: 3}",
    "start: subtract", "start(B)", "formula(r)", "formula(", "qr(W).Q[:r]", "svd(W).S[-r:] * S", "layers 0-3", "layers 9-1",
    "layers 0-65535",
    "{query: 4}", "{'*': 4, '*': 5}", "rank: {budget: 20k}", "budget: 1G", "scores: a.npz", "where(r)", "top(3)",
    "update: {query: B[d_out]}",
    "dropout: {x: 0.5}", "train: [head]", "lr: 2", "pi", "size(r)", "gcd(0, 0)", "mod(r, 0)", "exp(10 ** 5)", "identity",
    "orthogonal", "W[m, n]",
    "i2 = j1 * j2", "a = b * a", "tasks: 3", "task, ", "start: nonzero", "ragged: error", "expert", "seed: 18446744073709551616",
]  # fmt: skip


def _insert(text: str, at: int, extra: str) -> str:
    return text[:at] + extra + text[at:]


def _insert_line(text: str, at: int, extra: str) -> str:
    at = text.find("\n", at) + 1
    return text[:at] + extra + "\n" + text[at:]


def _replace_token(text: str, at: int, extra: str) -> str:
    found = TOKEN.search(text, at)
    return text[: found.start()] + extra + text[found.end() :] if found else text


def _delete_token(text: str, at: int, extra: str) -> str:
    return _replace_token(text, at, "")


def _delete_line(text: str, at: int, extra: str) -> str:
    end = text.find("\n", at) + 1
    return text[:at] + text[end:] if end else text[:at]


def _repeat(text: str, at: int, extra: str) -> str:
    return _insert(text, at, text[max(0, at - len(extra) - 10) : at])


def _swap(text: str, at: int, extra: str) -> str:
    return text[:at] + text[at : at + 2][::-1] + text[at + 2 :]


MUTATIONS = [_insert, _insert_line, _replace_token, _replace_token, _delete_token, _delete_line, _repeat, _swap]
CHARACTERS = [range(0x20), range(0x20, 0x7F), range(0x7F, 0x3000), range(0x3000, 0x110000)]  # surrogates among them


def load(text: str) -> Spec | SpecError:
    try:
        return load_spec(text)
    except SpecError as error:
        return error


@contextmanager
def bounds() -> Iterator[None]:
    """At most a second of CPU time and 200 MB; the garbage of the test's own making is not collected meanwhile."""
    gc.disable()
    began, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
        assert time.process_time() - began < 1.0
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200 * 1024  # KiB
    finally:
        gc.enable()


def check(text: str) -> None:
    """A text becomes a spec that its canonical text repeats, or problems with places."""
    with bounds():
        found = load(text)
    if isinstance(found, SpecError):
        assert found.problems
        assert all(problem.span is not None for problem in found.problems)
        assert str(found).encode("utf-8")  # can be printed
    else:
        canonical = str(found)
        again = load_spec(canonical)
        assert again == found
        assert str(again) == canonical


def mutated(draw: Random) -> str:
    """A spec with one to four mutations."""
    text = draw.choice(SPECS)
    for _ in range(draw.randint(1, 4)):
        words = draw.choice((WORDS, SIGNS, NASTY, None))
        extra = draw.choice(words) if words else chr(draw.choice(draw.choice(CHARACTERS)))
        text = draw.choice(MUTATIONS)(text, draw.randrange(1024) * len(text) // 1024, extra)
    return text + "\n"


@pytest.mark.parametrize("batch", range(10))
def test_mutated_specs(batch: int) -> None:
    """The same at every run, others with FUZZ_SEED; a failure tells which."""
    seed = int(environ.get("FUZZ_SEED", "9"))  # the same at each run; others on demand
    for number in range(N_EXAMPLES // 10):
        text = mutated(Random(f"{seed} {number}"))
        try:
            check(text)
        except Exception as error:
            raise AssertionError(f"the spec {text!r}: {error!r}") from error


SHORT = HEAD + "structure: matrix\nrank: 4\n"
BOMBS = {
    "aliases": "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60)),
    "brackets": HEAD + "rank: " + "[" * 30_000,
    "closed brackets": HEAD + "rank: " + "[" * 30_000 + "]" * 30_000,
    "block depth": "\n".join(" " * i + "a:" for i in range(300)),
    "list depth": "- " * 30_000,
    "question marks": "? " * 30_000,
    "unknown keys": HEAD + "".join(f"k{i}: 1\n" for i in range(1000)),
    "unknown factors": SHORT + "factors:\n" + "".join(f"  k{i}: {{init: zeros}}\n" for i in range(500)),
    "duplicate keys": "a: 1\n" * 1000,
    "unparsable masks": SHORT + "mask:\n" + "".join(f"  B[k{i}: keep(2)\n" for i in range(1000)),
    "many layers": SHORT.replace("4", "")
    + "scale:\n"
    + "".join(f"  query{i} layers {i}-{i + 1023}: 2\n" for i in range(250)),
    "hidden selectors": SHORT + "scale:\n" + "".join(f"  layers {i}: 2\n" for i in reversed(range(250))) + "  '*': 1\n",
    "chain of starts": HEAD
    + "update: "
    + "+".join(f"A{i}[r]" for i in range(600))
    + "\nfactors:\n"
    + "".join(f"  A{i}: {{init: start(A{i + 1})}}\n" for i in range(600)),
    "chain of zeros": HEAD
    + "update: A0[d_out]*B[d_in]+"
    + "+".join(f"A{i}[d_out]*A{i + 1}[d_in]" for i in range(300))
    + "\nfactors:\n"
    + "".join(f"  A{i}: {{init: zeros}}\n" for i in range(301)),
    "nested modes": SHORT + "modes: [" + ", ".join(f"m{i} = m{i + 1} * m{i + 1}" for i in range(60)) + "]\n",
    "chain of ranks": HEAD
    + "update: B[d_out, k0] * A[k0, d_in]\nrank:\n"
    + "".join(f"  k{i}: k{i + 1}\n" for i in range(990)),
    "many factors": HEAD + "update: " + "*".join(f"A{i}[r]" for i in range(1000)) + "\nrank: 4\n",
    "many products": HEAD + "update: " + "+".join(f"A{i}[r]" for i in range(1000)) + "\nrank: 4\n",
    "many modes": HEAD + "update: A[" + ",".join(f"a{i}" for i in range(1500)) + "]\n",
    "minus signs": HEAD + "update: A[d_in]\nscale: " + "-" * 60_000 + "1\n",
    "powers": SHORT + "scale: " + "9**" * 60 + "9\n",
    "products of large numbers": SHORT + "scale: " + "99999999999999999999*" * 20 + "9\n",
    "one long line": HEAD + "name: " + "x" * 65_000,
    "one long quote": HEAD + "update: '" + " '' " * 16_000 + "'\n",
    "many lines": HEAD + "update: >\n" + "  a\n\n" * 12_000,
    "large text": HEAD + "# " + "x" * 1_000_000,
    "rank": HEAD + "structure: cp\nrank: 1000000000000000000\n",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_bombs(text: str) -> None:
    check(text + "\n")
