"""What the compiler needs to know of a model: its sites and their sizes. A value without torch."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear module of a model, whatever its class and however its weight is laid out."""

    module: str
    d_out: int
    d_in: int


def is_named(matrix: str, name: str) -> bool:
    """Whether a name is that of a matrix or its dotted ending: ``query`` of ``decoder.cross.query``."""
    return f".{matrix}".endswith(f".{name}")


@dataclass(frozen=True, slots=True)
class Site:
    """A place where an update can land: a linear module, or a part of a fused one."""

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
    parameter: str | None = None  # of kind `parameter`: its name in the module
    reads: str | None = None  # sites of one layer with the same name here read the very same tensor

    @property
    def key(self) -> Key:
        """What a factor's site modes are bound to."""
        return (self.matrix, self.layer) if self.expert is None else (self.matrix, self.layer, self.expert)

    def is_named(self, name: str) -> bool:
        """Whether a name is that of this site's matrix or its dotted ending."""
        return is_named(self.matrix, name)

    @property
    def module_d_out(self) -> int:
        """How many outputs the whole module has."""
        return self.d_out if self.rows is None else self.rows.period * (self.d_out // self.rows.count)

    def row_indices(self) -> np.ndarray:  # shape: (d_out,)
        """Which of the module's outputs belong to this site."""
        if self.rows is None:
            return np.arange(self.d_out)
        starts = np.arange(0, self.module_d_out, self.rows.period) + self.rows.offset
        return (starts[:, None] + np.arange(self.rows.count)).ravel()

    @property
    def stack(self) -> str | None:
        """The path up to the layer's number (``model.layers``); None for a module in no layer, an output head."""
        before, found, _ = f".{self.module}.".partition(f".{self.layer}.")
        return before[1:] if found else None

    def __str__(self) -> str:
        return f"{self.matrix} of layer {self.layer} ({self.module})"


@dataclass(frozen=True)
class ModelShape:
    """A model's adaptable sites, its named sizes, and the number of its parameters."""

    name: str
    sites: tuple[Site, ...]
    sizes: tuple[tuple[str, int], ...]  # width, layers, heads, head_dim, mlp, vocab: those of which the model has one
    n_parameters: int
    family: str | None = None  # the model type whose table gave the roles
    model_class: str | None = None  # the class that `n_parameters` counts, "LlamaForCausalLM"
