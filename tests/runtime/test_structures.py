"""Structures that nobody planned for, held to one einsum (``reference.py``): the mechanism must be right, not the five methods."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tensorpeft as tp
from tests.models import build, inputs, randomise, run, widen_norms
from tests.runtime.reference import updates
from tests.runtime.test_oracle import IDS, by_adapter, by_formula, errors, measured, named_factors

ATTENTION = "target: {matrices: [query, key, value, out]}"
QV = "target: {matrices: [query, value]}"
ALL = "target: all-linear"


class Plain(nn.Module):
    """No family knows it: two blocks of linear modules of three shapes, around which nothing is standard."""

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


def model_of(architecture: str) -> nn.Module:
    if architecture != "plain":
        return widen_norms(build(architecture, torch.float64))
    torch.manual_seed(0)
    return Plain().double().eval()


# name -> (architectures, spec); `tensorpeft: 1` goes in front of each
STRUCTURES: dict[str, tuple[str, str]] = {
    # the shorthands, over many lists of modes
    "matrix": ("llama gpt2 plain", f"{ALL}\nstructure: matrix\nrank: 3\nalpha: 5"),
    "matrix, shared over layers": ("llama", f"{ALL}\nstructure: matrix\nrank: 3\nshare: {{A: [layer], B: [layer]}}"),
    "matrix, A shared by everything": ("llama gpt2", f"{ATTENTION}\nstructure: matrix\nrank: 3\nshare: {{A: [layer, matrix]}}"),
    "matrix by heads": ("llama gpt2", f"{ATTENTION}\nstructure: matrix\nmodes: [matrix, layer, head, head_dim, width]\nrank: 3"),
    "cp of four modes": ("llama gpt2 plain", f"{ALL}\nstructure: cp\nmodes: [matrix, layer, d_out, d_in]\nrank: 3"),
    "cp without matrix": ("llama", f"{ATTENTION}\nstructure: cp\nmodes: [layer, d_out, d_in]\nrank: 3"),
    "cp of a split input": ("llama gpt2", f"{ALL}\nstructure: cp\nmodes: [matrix, layer, d_out, d_in = i1 * i2 * i3]\nrank: 3"),
    "cp of a fused slot": ("llama bert", f"{ATTENTION}\nstructure: cp\nmodes: [slot = layer * matrix, d_out, d_in]\nrank: 3"),
    "cp by heads and tasks": ("llama gpt2", f"{ATTENTION}\ntasks: 3\nstructure: cp\nmodes: [task, matrix, layer, head, head_dim, width]\nrank: 3"),
    "tucker": ("llama gpt2", f"{QV}\nstructure: tucker\nmodes: [layer, d_out, d_in]\nrank: {{r_layer: 2, r_d_out: 3, r_d_in: 4}}"),
    "tucker by heads": ("llama", f"{ATTENTION}\nstructure: tucker\nmodes: [matrix, layer, head, head_dim, width]\nrank: 2"),
    "tt": ("llama gpt2 plain", f"{ALL}\nstructure: tt\nmodes: [layer, matrix, d_out, d_in]\nrank: 3"),
    "tt, site modes last": ("llama", f"{QV}\nstructure: tt\nmodes: [d_out, d_in, layer, matrix]\nrank: 3"),
    "tt of split sides": ("llama gpt2", f"{QV}\nstructure: tt\nmodes: [matrix, d_out = o1(4) * o2, layer, d_in = i1 * i2]\nrank: 2"),
    "tt with ranks by expression": ("llama", f"{ALL}\nstructure: tt\nmodes: [layer, d_out, d_in]\nrank: {{r1: 2, r2: 'ceil(min(d_in, d_out) / 32)'}}"),
    # published methods that do not ship
    "fact-tt": ("gpt2", f"{ALL}\nmodes: ['d_out = out_chunk * o(width)', 'd_in = in_chunk * i(width)']\nrank: {{a: 3, b: 2}}\n"
        "update: V[o, b] * S[matrix, layer, out_chunk, in_chunk, a, b] * U[i, a]\nfactors: {V: {init: zeros}}\nscale: 10"),
    "fact-tk": ("gpt2", f"{ALL}\nmodes: ['d_out = out_chunk * o(width)', 'd_in = in_chunk * i(width)']\nrank: {{a: 3, b: 2, p: 4}}\n"
        "update: V[o, b] * C[a, b, p] * P[p, matrix, layer, out_chunk, in_chunk] * U[i, a]\n"
        "factors: {V: {init: zeros}, C: {init: xavier_uniform}, P: {init: xavier_uniform}}\nscale: 0.1"),
    "lotr": ("llama gpt2", f"{QV}\nrank: {{a: 3, b: 2}}\nupdate: L[d_out, a] * G[matrix, layer, a, b] * R[d_in, b]\n"
        "factors: {L: {init: normal(1)}, R: {init: normal(1)}, G: {init: zeros}}\nscale: 1 / a"),
    "loretta": ("llama plain", f"{ALL}\nmodes: ['d_out = o1 * o2', 'd_in = i1(4) * i2', 'r = r1 * r2']\nrank: {{r1: 2, r2: 4, a: 2, b: 3, c: 2, d: 2}}\n"
        "update: P1[matrix, layer, o1, a] * P2[matrix, layer, a, o2, b] * P3[matrix, layer, b, r] *"
        " Q1[matrix, layer, r1, c] * Q2[matrix, layer, c, r2, d] * Q3[matrix, layer, d, i1, i2]\n"
        "start: nonzero\nalpha: 16\nscale: alpha / (r1 * r2)"),
    "loha": ("llama gpt2", f"{ALL}\nrank: {{r: 3, s: 2}}\nupdate: B1[matrix, layer, d_out, r] * A1[matrix, layer, r, d_in] *"
        " B2[matrix, layer, d_out, s] * A2[matrix, layer, s, d_in]\nfactors: {B2: {init: zeros}}\nalpha: 5"),
    "lokr": ("llama gpt2", f"{ALL}\nmodes: ['d_out = o1 * o2', 'd_in = i1 * i2']\n"
        "update: W1[matrix, layer, o1, i1] * W2[matrix, layer, o2, i2]\nfactors: {W1: {init: zeros}}"),
    "lokr of low rank": ("llama gpt2", f"{ALL}\nmodes: ['d_out = o1(4) * o2', 'd_in = i1(8) * i2']\nrank: 2\n"
        "update: W1[matrix, layer, o1, i1] * W2a[matrix, layer, o2, r] * W2b[matrix, layer, r, i2]\nfactors: {W1: {init: zeros}}"),
    "adalora": ("llama gpt2", f"{QV}\nrank: 4\nupdate: P[matrix, layer, d_out, r] * E[matrix, layer, r] * Q[matrix, layer, r, d_in]\n"
        "factors: {E: {init: zeros}, P: {init: normal(0.02)}, Q: {init: normal(0.02)}}"),
    "randlora": ("llama plain", f"{ALL}\nrank: {{r: 7, n: 'ceil(min(d_in, d_out) / r)'}}\nupdate: B[d_out, r, n] * L[matrix, layer, r, n] *"
        " A[r, n, d_in] * G[matrix, layer, n, d_in]\nfactors: {A: {frozen: true}, B: {frozen: true}, L: {init: zeros}, G: {init: constant(0.02)}}"),
    "randlora, sliced": ("llama plain", f"{ALL}\nrank: {{r: 7, n: 'ceil(min(d_in, d_out) / r)'}}\nupdate: B[d_out, r, n] * L[matrix, layer, r, n] *"
        " A[r, n, d_in] * G[matrix, layer, n, d_in]\nfactors: {A: {frozen: true}, B: {frozen: true}, L: {init: zeros}, G: {init: constant(0.02)}}\nragged: slice"),
    "tinylora": ("llama", f"{QV}\nrank: {{a: 2, b: 2, u: 5}}\nupdate: P[d_out, a] * K[u, a, b] * v[layer, u] * Q[b, d_in]\n"
        "factors: {P: {frozen: true}, K: {frozen: true, init: normal(1)}, Q: {frozen: true}, v: {init: zeros}}"),
    "moslora": ("gpt2", f"{QV}\nrank: {{r: 3, s: 3}}\nupdate: B[matrix, layer, d_out, r] * M[matrix, layer, r, s] * A[matrix, layer, s, d_in]\nfactors: {{B: {{init: zeros}}}}"),
    "gralora": ("llama gpt2", f"{ALL}\nmodes: ['d_out = p(2) * o', 'd_in = q(4) * i']\nrank: 2\n"
        "update: B[matrix, layer, p, q, o, r] * A[matrix, layer, p, q, r, i]\nfactors: {B: {init: zeros}}"),
    "miss": ("llama gpt2", f"{QV}\nmodes: ['d_in = block * j(8)']\nupdate: D[matrix, layer, d_out, j] * E[block]\nfactors: {{D: {{init: zeros}}, E: {{init: ones, frozen: true}}}}"),
    "ia3 without the weight": ("llama", f"{QV}\nupdate: v[matrix, layer, d_out] * u[matrix, layer, d_in]\nfactors: {{v: {{init: zeros}}}}"),
    "vera with ragged sizes by size": ("llama plain", f"{ALL}\nrank: 5\nupdate: b[matrix, layer, d_out] * B[d_out, r] * d[matrix, layer, r] * A[r, d_in]\n"
        "factors: {A: {frozen: true}, B: {frozen: true}, d: {init: constant(0.1)}, b: {init: zeros}}"),
    "vera on everything": ("llama gpt2", f"{ALL}\nrank: 5\nupdate: b[matrix, layer, d_out] * B[d_out, r] * d[matrix, layer, r] * A[r, d_in]\n"
        "factors: {A: {frozen: true}, B: {frozen: true}, d: {init: constant(0.1)}, b: {init: zeros}}\nragged: slice"),
    # sums and differences
    "block terms": ("llama gpt2", f"{QV}\nrank: {{r: 3, s: 2}}\nupdate: M1[matrix, r] * L1[layer, r] * O1[d_out, r] * I1[d_in, r] +"
        " M2[matrix, s] * L2[layer, s] * O2[d_out, s] * I2[d_in, s]\nfactors: {O1: {init: zeros}, O2: {init: zeros}}"),
    "lorta and lora": ("llama gpt2", f"{ATTENTION}\nrank: {{r: 3, s: 2}}\nupdate: M[matrix, r] * L[layer, r] * H[head, r] * K[head_dim, r] * I[width, r] +"
        " B[matrix, layer, d_out, s] * A[matrix, layer, s, d_in]\nfactors: {K: {init: zeros}, B: {init: zeros}}"),
    "a difference with a factor in both": ("llama gpt2", f"{QV}\nrank: 3\nstart: nonzero\nupdate: B[layer, d_out, r] * A[r, d_in] - C[layer, d_out, r] * A[r, d_in]"),
    "minus alone": ("plain", f"{ALL}\nrank: 3\nupdate: '- B[layer, d_out, r] * A[r, d_in]'\nfactors: {{B: {{init: zeros}}}}"),
    "a task in one of two products": ("llama gpt2", f"{QV}\ntasks: 3\nrank: {{r: 2, s: 3}}\nupdate: B[task, layer, d_out, r] * A[r, d_in] + D[layer, d_out, s] * C[s, d_in]\n"
        "factors: {B: {init: zeros}, D: {init: zeros}}"),
    # graphs of other kinds
    "a ring": ("llama gpt2", f"{QV}\nrank: {{a: 2, b: 3, c: 2, d: 2}}\nupdate: M[a, matrix, b] * L[b, layer, c] * O[c, d_out, d] * I[d, d_in, a]\nfactors: {{O: {{init: zeros}}}}"),
    "a tree": ("llama gpt2", f"{QV}\nmodes: ['d_out = o1 * o2', 'd_in = i1 * i2']\nrank: {{a: 2, b: 2, c: 3, d: 2, e: 3, f: 2, g: 2, h: 2}}\n"
        "update: T[a, b] * X[a, c, d] * Y[b, e, f] * C1[o1, c] * C2[o2, d] * C3[i1, e] * C4[i2, f, g] * S[matrix, g, h] * Z[layer, h]\nfactors: {C2: {init: zeros}}"),
    "a gate for each layer": ("llama plain", f"{ALL}\nrank: 3\nupdate: g[layer] * B[matrix, layer, d_out, r] * A[matrix, layer, r, d_in]\nfactors: {{g: {{init: zeros}}}}"),
    "a gate alone on shared factors": ("gpt2", f"{QV}\nrank: 3\nupdate: g[layer, matrix] * B[d_out, r] * A[r, d_in]\nfactors: {{g: {{init: zeros}}}}"),
    "a gate for every head": ("llama gpt2", f"{ATTENTION}\nrank: 3\nupdate: g[matrix, head] * B[layer, d_out, r] * A[layer, r, d_in]\nfactors: {{g: {{init: zeros}}}}"),
    "everything shared": ("llama gpt2 plain", f"{ALL}\nrank: 3\nupdate: B[d_out, r] * A[r, d_in]\nfactors: {{B: {{init: zeros}}}}"),
    "by matrix only": ("llama", f"{ALL}\nrank: 3\nupdate: B[matrix, d_out, r] * A[matrix, r, d_in]\nfactors: {{B: {{init: zeros}}}}"),
    "by layer only": ("llama", f"{ALL}\nrank: 3\nupdate: B[layer, d_out, r] * A[layer, r, d_in]\nfactors: {{B: {{init: zeros}}}}"),
    "site modes in the middle": ("llama", f"{ALL}\nrank: 3\nupdate: B[d_out, layer, r, matrix] * A[r, matrix, d_in]\nfactors: {{B: {{init: zeros}}}}"),
    "a dense update": ("llama gpt2", f"{QV}\nupdate: D[matrix, layer, d_out, d_in]\nfactors: {{D: {{init: zeros}}}}"),
    "a dense update, transposed and shared": ("plain", f"{ALL}\nupdate: D[d_in, layer, d_out]\nfactors: {{D: {{init: zeros}}}}"),
    "a bond in three factors": ("llama", f"{QV}\nrank: 4\nupdate: B[d_out, r] * g[layer, r] * h[matrix, r] * A[r, d_in]\nfactors: {{g: {{init: zeros}}}}"),
    "layers of a target that fill no grid": ("llama", "target: {matrices: ['*.0.*.q_proj', '*.1.*.v_proj', down]}\nrank: 3\n"
        "update: B[matrix, layer, d_out, r] * C[layer, r] * A[matrix, r, d_in]\nfactors: {B: {init: zeros}}"),
    # heads
    "heads turned": ("llama", f"{ATTENTION}\nstructure: cp\nmodes: [matrix, layer, head, head_dim, width]\nrank: 3\nheads: {{side: {{query: d_in, out: d_out}}}}"),
    "heads on the input": ("gpt2", f"{ATTENTION}\nstructure: cp\nmodes: [layer, head, head_dim, width]\nrank: 3\nheads: {{side: d_in}}"),
    "heads where the model has none": ("plain", f"{ALL}\nstructure: cp\nmodes: [matrix, layer, head, head_dim, width]\nrank: 3\nheads: {{count: {{'*': 3, grow: 4}}, side: {{shrink: d_in}}}}"),
    "heads and a split of the other side": ("llama", "target: {matrices: [query, key]}\nmodes: ['d_in = i1 * i2']\nrank: 3\n"
        "update: H[matrix, layer, head, r] * K[head_dim, r] * I1[i1, r] * I2[i2, r]\nfactors: {K: {init: zeros}}"),
    # tasks
    "tasks on both": ("llama gpt2", f"{QV}\ntasks: 3\nrank: 2\nupdate: B[task, matrix, layer, d_out, r] * A[task, r, d_in]\nfactors: {{B: {{init: zeros}}}}"),
    "tasks on a vector": ("llama gpt2", f"{QV}\ntasks: 3\nrank: 4\nupdate: B[matrix, layer, d_out, r] * t[task, layer, r] * A[matrix, layer, r, d_in]\nfactors: {{t: {{init: zeros}}}}"),
    "tasks in tt": ("plain", f"{ALL}\ntasks: 3\nstructure: tt\nmodes: [task, layer, matrix, d_out, d_in]\nrank: 2"),
    "a gate for each task": ("llama", f"{QV}\ntasks: 3\nrank: 4\nupdate: g[task, layer] * B[layer, d_out, r] * A[layer, r, d_in]\nfactors: {{g: {{init: zeros}}}}"),
    "tasks and kronecker": ("gpt2", f"{QV}\ntasks: 3\nmodes: ['d_out = o1 * o2', 'd_in = i1 * i2']\nupdate: W1[task, layer, o1, i1] * W2[matrix, layer, o2, i2]\nfactors: {{W1: {{init: zeros}}}}"),
    # masks
    "rows and columns masked": ("llama gpt2", f"{ALL}\nstructure: matrix\nrank: 3\nmask: {{'B[d_out]': bernoulli(0.3), 'A[d_in]': keep(0.4)}}"),
    "ranks masked": ("llama gpt2", f"{QV}\nstructure: matrix\nrank: 6\nmask: {{'B[r]': keep(3)}}"),
    "ranks masked twice": ("llama", f"{QV}\nstructure: matrix\nrank: 12\nmask: {{'B[r]': keep(8), 'A[r]': keep(9)}}"),
    "rows masked twice": ("llama", f"{QV}\nrank: {{r: 2, s: 2}}\nupdate: B1[matrix, layer, d_out, r] * A1[matrix, layer, r, d_in] *"
        " B2[layer, d_out, s] * A2[matrix, layer, s, d_in]\nfactors: {B2: {init: zeros}}\nmask: {'B1[d_out]': keep(0.6), 'B2[d_out]': keep(0.7)}"),
    "heads masked": ("llama gpt2", f"{ATTENTION}\nstructure: cp\nmodes: [matrix, layer, head, head_dim, width]\nrank: 3\nmask: {{'A_head[head]': keep(3)}}"),
    "parts masked": ("llama gpt2", f"{QV}\nstructure: cp\nmodes: [matrix, layer, d_out = o1(4) * o2, d_in]\nrank: 3\nmask: {{'A_o2[o2]': bernoulli(0.5)}}"),
    "a mask for one matrix": ("llama", f"{QV}\nstructure: matrix\nrank: 3\nmask: {{'B[d_out]': 'bernoulli(0.2, value=0.7)'}}"),
    "a mask shared by all": ("llama", f"{ALL}\nrank: 3\nupdate: B[d_out, r] * g[matrix, layer, r] * A[r, d_in]\nfactors: {{g: {{init: zeros}}}}\nmask: {{'B[d_out]': keep(0.4)}}"),
    "a mask on one of two products": ("llama gpt2", f"{QV}\nrank: {{r: 2, s: 3}}\nupdate: B[matrix, layer, d_out, r] * A[r, d_in] + D[layer, d_out, s] * C[s, d_in]\n"
        "factors: {B: {init: zeros}, D: {init: zeros}}\nmask: {'B[d_out]': keep(0.4), 'C[d_in]': keep(0.5)}"),
    "masks on vera": ("llama plain", f"{ALL}\nrank: 6\nupdate: b[matrix, layer, d_out] * B[d_out, r] * d[matrix, layer, r] * A[r, d_in]\n"
        "factors: {A: {frozen: true}, B: {frozen: true}, d: {init: constant(0.1)}, b: {init: zeros}}\nragged: slice\nmask: {'d[r]': keep(4), 'b[d_out]': keep(0.5)}"),
    "masks and slices of one factor": ("llama", f"{ALL}\nrank: 6\nupdate: B[d_out, r] * d[matrix, layer, r] * A[r, d_in]\n"
        "factors: {d: {init: zeros}}\nragged: slice\nmask: {'A[r]': keep(4), 'B[d_out]': keep(0.5)}"),
    "a frozen factor masked": ("llama", f"{QV}\nstructure: matrix\nrank: 4\nfrozen: [A]\nmask: {{'A[d_in]': keep(0.4)}}"),
    "masks and tasks": ("llama gpt2", f"{QV}\ntasks: 3\nrank: 4\nupdate: B[task, matrix, layer, d_out, r] * A[matrix, layer, r, d_in]\n"
        "factors: {B: {init: zeros}}\nmask: {'B[d_out]': keep(0.4), 'A[d_in]': keep(0.5)}"),
    "masks and fused modes": ("llama", f"{QV}\nstructure: cp\nmodes: [slot = layer * matrix, d_out, d_in]\nrank: 5\nmask: {{'A_slot[r]': keep(3)}}"),
    # ragged sizes
    "sliced, keyed by matrix": ("llama", f"{ALL}\nrank: 3\nupdate: B[matrix, d_out, r] * A[layer, r, d_in]\nfactors: {{B: {{init: zeros}}}}\nragged: slice"),
    "sliced by heads": ("llama", f"{ATTENTION}\nstructure: cp\nmodes: [matrix, layer, head, head_dim, width]\nrank: 3\nragged: slice"),
    "sliced split": ("llama", f"{QV}\nstructure: cp\nmodes: [matrix, layer, d_out = o1 * o2, d_in]\nrank: 3\nragged: slice"),
    "error, and nothing ragged": ("gpt2", f"{QV}\nstructure: matrix\nrank: 3\nragged: error"),
}  # fmt: skip


CASES = [(name, architecture) for name, (architectures, _) in STRUCTURES.items() for architecture in architectures.split()]


def spec_of(name: str) -> tp.Spec:
    return tp.load_spec(f"tensorpeft: 1\n{STRUCTURES[name][1]}\n")


def attached(text: str, architecture: str) -> tuple[nn.Module, tp.Adapter]:
    model = model_of(architecture)
    return model, tp.attach(model, tp.load_spec(f"tensorpeft: 1\n{text}\n"), name="it")


def truth_of(model: nn.Module, adapter: tp.Adapter, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """dW of every module; output and gradients of the model that has W + dW."""
    leaves = {n: f.detach().clone().requires_grad_(f.requires_grad) for n, f in named_factors(adapter).items()}
    dense = updates(adapter, leaves)
    with adapter.disabled(), by_formula(model, dense):
        return {path: change.detach() for path, change in dense.items()}, measured(model, x, leaves)


@pytest.mark.parametrize(("name", "architecture"), CASES)
def test_equals_one_einsum(name: str, architecture: str) -> None:
    model, adapter = attached(STRUCTURES[name][1], architecture)
    check(model, adapter, inputs(architecture))


def check(model: nn.Module, adapter: tp.Adapter, x: Tensor) -> None:
    """Start, forward, gradients, dW and merge of an adapter against the reference."""
    changes = [adapter.delta(path, 0 if adapter.spec.tasks else None) for path in {s.module for s in adapter.sites}]
    assert any(change.any() for change in changes) == (adapter.spec.start == "nonzero")
    start = {name: value.clone() for name, value in adapter.state_dict().items()}
    randomise(adapter, 0.5)
    dense, truth = truth_of(model, adapter, x)
    found = errors(by_adapter(model, adapter, x), truth)
    assert max(found.values()) <= 1e-12, found
    with adapter.disabled():
        assert not torch.allclose(run(model, x), truth["output"], rtol=1e-6)
    tasks = range(adapter.spec.tasks) if adapter.spec.tasks else [None]
    for path, change in dense.items():
        for task in tasks:
            expected = change if change.dim() == 2 else change[task]
            torch.testing.assert_close(adapter.delta(path, task), expected, rtol=1e-12, atol=1e-12 * change.abs().max())
    check_merge(model, adapter, x, tasks[-1])
    adapter.reset_parameters()
    assert all(torch.equal(value, start[name]) for name, value in adapter.state_dict().items())


def check_merge(model: nn.Module, adapter: tp.Adapter, x: Tensor, task: int | None) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        if task is None:
            factored = run(model, x)
        else:
            with adapter.tasks(torch.full((len(x),), task)):
                factored = run(model, x)
        adapter.merge(task)
        assert (run(model, x) - factored).norm() <= 1e-12 * factored.norm()
        adapter.unmerge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
