"""A model as the compiler sees it: its sites, their sizes, its parameters. A value without torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

Key = tuple[str | int, ...]  # the values of site modes, in the order matrix, layer, expert


@dataclass(frozen=True, slots=True)
class Rows:
    """The outputs of a fused module that belong to one matrix: ``count`` rows from ``offset``, again every ``period``.

    A contiguous part (a third of ``c_attn``) has ``period`` equal to the module's whole d_out.
    """

    offset: int
    count: int
    period: int

    def whole(self, d_out: int) -> int:
        """The outputs of the module, of which ``d_out`` are the matrix's."""
        return d_out // self.count * self.period


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight that acts as a matrix, or a part of one, before it is known which matrix of which layer it is."""

    module: str  # whose forward uses it
    d_out: int
    d_in: int
    kind: str = "linear"  # see Site
    parameter: str | None = None
    part: str | None = None  # its name among several that one module holds: "query"
    heads: int | None = None
    head_side: str | None = None
    rows: Rows | None = None
    experts: int | None = None  # how many such matrices its parameter stacks
    transposed: bool = False
    reads: str | None = None

    @property
    def path(self) -> str:
        """Where the weight is: the module's path, of a parameter its own."""
        return weight_path(self.module, self.parameter)

    @property
    def module_d_out(self) -> int:
        """How many outputs the whole weight has."""
        return self.d_out if self.rows is None else self.rows.whole(self.d_out)

    @property
    def name(self) -> str:
        """The path that it is named by where no family does; that of a module's part is beside the module."""
        if self.part is None:
            return self.path
        owner = self.module if self.parameter is not None else self.module.rpartition(".")[0]
        return f"{owner}.{self.part}".removeprefix(".")

    @property
    def is_module(self) -> bool:
        """Whether it is the weight of a linear module, called or read."""
        return self.kind == "linear" or ("." in (self.parameter or "") and not self.transposed)

    def read(self) -> Linear:
        """The same weight of a module that is never called, but whose weight the module around it reads."""
        module, _, name = self.module.rpartition(".")
        transposed = self.kind == "embedding"
        return replace(self, module=module, kind="parameter", parameter=f"{name}.weight", transposed=transposed)


def weight_path(module: str, parameter: str | None) -> str:
    """``experts`` and ``gate_up_proj`` give ``experts.gate_up_proj``; ``attn`` and ``out_proj.weight`` give ``attn.out_proj``."""
    return module if parameter is None else f"{module}.{parameter}".removesuffix(".weight").removeprefix(".")


def distinct(paths: Iterable[str]) -> dict[str, str]:
    """For each path what it has for itself: ``encoder`` for ``encoder.block`` beside ``decoder.block``."""
    parts = {path: path.split(".") for path in paths}
    for end, others in ((0, slice(1, None)), (-1, slice(-1))):
        while len({path[end] for path in parts.values()}) == 1 and min(map(len, parts.values())) > 1:
            parts = {path: rest[others] for path, rest in parts.items()}
    return {path: ".".join(rest) for path, rest in parts.items()}


def is_named(matrix: str, name: str) -> bool:
    """Whether a name is that of a matrix or its dotted ending: ``query`` of ``decoder.cross.query``."""
    return f".{matrix}".endswith(f".{name}")


@dataclass(frozen=True, slots=True)
class Site:
    """A place where an update can land: a linear module, or a part of a fused one.

    Other weights act as matrices too, and a site's ``kind`` says how: a convolution (without groups) on the unfolded input, an
    embedding on one-hot vectors, and a parameter that a forward reads by itself as the matrix that it is, or as one for each
    expert.
    """

    module: str  # path in the model, "model.layers.0.self_attn.q_proj"
    matrix: str  # the role where the family is known, behind its stack if there are several; else the module's own name
    layer: int
    d_out: int
    d_in: int
    heads: int | None = None  # how many heads split `head_side`
    head_side: str | None = None  # "d_out" or "d_in"
    rows: Rows | None = None  # None: the whole module
    expert: int | None = None  # of several matrices in one 3-D parameter, or of a layer's expert modules: which one
    kind: str = "linear"  # linear | conv (d_in = channels * kernel) | embedding (d_in = vocabulary) | parameter
    parameter: str | None = None  # of kind `parameter`: its path from the module, whose forward reads it
    reads: str | None = None  # sites of one layer with the same name here read the very same tensor
    transposed: bool = False  # of kind `parameter`: it is stored (d_in, d_out), behind the experts if there are several
    stack: str | None = None  # the path up to the layer's number (``model.layers``); None in no layer, as of a head

    @property
    def path(self) -> str:
        """Where the weight is: the module's path, of a parameter its own."""
        return weight_path(self.module, self.parameter)

    @property
    def is_linear(self) -> bool:
        """Whether it is (a part of) the weight of a linear module or of an attention, be it called or read.

        Then it is no convolution, no embedding, no expert in a parameter, and no weight that some other module has for itself.
        """
        return self.kind == "linear" or (self.parameter not in (None, "weight") and self.expert is None)

    @property
    def key(self) -> Key:
        """The values of the site modes here: matrix, layer, and expert where there are several."""
        return (self.matrix, self.layer) if self.expert is None else (self.matrix, self.layer, self.expert)

    def is_named(self, name: str) -> bool:
        """Whether a name is that of this site's matrix or its dotted ending."""
        return is_named(self.matrix, name)

    @property
    def module_d_out(self) -> int:
        """How many outputs the whole module has."""
        return self.d_out if self.rows is None else self.rows.whole(self.d_out)

    def row_indices(self) -> np.ndarray:  # shape: (d_out,)
        """Which of the module's outputs belong to this site."""
        if self.rows is None:
            return np.arange(self.d_out)
        starts = np.arange(0, self.module_d_out, self.rows.period) + self.rows.offset
        return (starts[:, None] + np.arange(self.rows.count)).ravel()

    def __str__(self) -> str:
        expert = "" if self.expert is None else f", expert {self.expert}"
        return f"{self.matrix} of layer {self.layer}{expert} ({self.path})"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the base. Where only a config is known, ``norms`` and the like stand for all of their kind."""

    path: str
    count: int
    kinds: frozenset[str] = frozenset()  # the words of `train:` that mean it: biases, norms, head
    others: tuple[str, ...] = ()  # the further paths of one that several modules share

    @property
    def weights(self) -> tuple[str, ...]:
        """The paths that sites have of it, if it is the weight of any (see ``Site.path``)."""
        return tuple(path.removesuffix(".weight") for path in (self.path, *self.others))


@dataclass(frozen=True)
class ModelShape:
    """A model's adaptable sites, its named sizes, and its parameters."""

    name: str
    sites: tuple[Site, ...]
    sizes: tuple[tuple[str, int], ...]  # width, layers, heads, head_dim, mlp, vocab: those of which the model has one
    n_parameters: int
    family: str | None = None  # the model type whose table gave the roles
    model_class: str | None = None  # the class that `n_parameters` counts, "LlamaForCausalLM"
    parameters: tuple[Parameter, ...] = ()  # each once, however many modules share it

    def __str__(self) -> str:
        of_class = f" of {self.model_class}" if self.model_class else ""
        family = f", family {self.family}" if self.family else ""
        lines = [f"model {self.name}: {self.n_parameters:,} parameters{of_class}{family}"]
        lines.append(f"  sizes {', '.join(f'{name}={size}' for name, size in self.sizes)}")
        alike: dict[str, list[Site]] = {}
        for site in self.sites:
            kind = "" if site.kind == "linear" else f", {site.kind}"
            alike.setdefault(f"{site.matrix} {site.d_out} x {site.d_in}{kind}", []).append(site)
        for told, sites in alike.items():
            lines.append(f"  {told}: {len(sites)} site{'s' * (len(sites) > 1)} like {sites[0].path}")
        counts: Counter[str] = Counter()
        for parameter in self.parameters:
            counts.update(dict.fromkeys(parameter.kinds, parameter.count))
        lines += [f"  {kind}: {count:,} parameters" for kind, count in sorted(counts.items())]
        return "\n".join(lines)


def by_stack(sites: Iterable[Site]) -> dict[str, tuple[Site, ...]]:
    """Sites by the name of their stack, which is what its path has for itself: ``encoder``, ``decoder``.

    Where there is one stack alone, all sites are its, also those outside the layers, and it needs no name.
    """
    sites = tuple(sites)
    stacks = dict.fromkeys(site.stack for site in sites)
    paths = [stack for stack in stacks if stack is not None]
    if len(paths) < 2:
        return {"": sites}
    names: dict[str | None, str] = {path: re.sub(r"\W", "_", name) for path, name in distinct(paths).items()}
    return {names.get(stack, ""): tuple(site for site in sites if site.stack == stack) for stack in stacks}
