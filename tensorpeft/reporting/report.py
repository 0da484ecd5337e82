"""The costs of an adapter: a value first, then its text, JSON, Markdown and HTML.

    Report
    ├── factors     every stored tensor: its modes, its shape, how many numbers it has
    ├── modes       every index: its sizes, what binds it, how many numbers carry it
    └── matrices    every adapted matrix: how often it occurs, how many trained numbers are its own

All counts are exact integers. A matrix that is named in several layers is one entry; so is a mode with several sizes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from tensorpeft.reporting.page import Page
from tensorpeft.reporting.table import Cell, Table, significant

FLOAT_BYTES = 4  # factors are kept in float32, also where the base has fewer bits
ADAMW_STATES = 2  # numbers that AdamW keeps for each trained one: the two moments


@dataclass(frozen=True)
class FactorEntry:
    """One stored tensor. ``shape`` is over ``modes``; under a mask ``count`` is less than their product."""

    name: str
    factor: str
    modes: tuple[str, ...]
    shape: tuple[int, ...]
    count: int
    trainable: bool
    stored: bool  # a checkpoint holds it; what it does not hold is made again
    masked: bool
    init: str
    lr: float = 1.0  # multiplies the learning rate

    @property
    def kind(self) -> str:
        return "trained" if self.trainable else "frozen, stored" if self.stored else "frozen, seeded"

    @property
    def told(self) -> str:
        """Its kind, and what else is special about it."""
        rate = f", learning rate x {significant(self.lr)}" if self.lr != 1 else ""
        return f"{self.kind}{', masked' if self.masked else ''}{rate}"

    @property
    def over(self) -> str:
        """Its modes with their sizes."""
        return " x ".join(f"{mode} {size:,}" for mode, size in zip(self.modes, self.shape, strict=True))


@dataclass(frozen=True)
class ModeEntry:
    """One mode. ``trainable`` and ``frozen`` count the numbers of all factors that carry it."""

    name: str
    sizes: tuple[int, ...]  # several where the mode is ragged
    bound: str  # by what: "attach" | "row" | "data"; or "sum", for a bond
    trainable: int
    frozen: int


@dataclass(frozen=True)
class MatrixEntry:
    """The sites of one matrix, shape and choice. ``trainable`` counts the trained numbers that no other entry uses."""

    matrix: str
    layers: int  # how many
    d_out: int
    d_in: int
    trainable: int
    lora_rank: int
    sites: int  # as many as layers, or more where a layer has several: its experts
    at: str  # which layers, "0-3, 7"
    chosen: dict[str, float] = field(default_factory=dict)  # what differs from site to site: a rank, the scale


@dataclass(frozen=True)
class Report(Page):
    """The costs of a spec on a model."""

    name: str
    model: str
    model_class: str | None  # what `base` counts
    update: str
    formulas: tuple[str, ...]  # dW, the scale included: one for each entry of the update
    scale: str
    alpha: float | None
    ranks: dict[str, str]  # the size of each bond, as written
    dropout: dict[str, float]  # by where: the input x, or a bond
    seed: int
    tokens: int  # per forward pass, which the order of contraction is planned for
    number_bytes: int  # of a number of the activations
    kept_per_token: int  # numbers of the activations that are kept for the backward pass
    trainable: int
    extra: int  # numbers of the base that are trained beside dW
    frozen_stored: int
    frozen_seeded: int
    shared: int  # trained numbers that several matrices use
    base: int
    flops_per_token: int  # forward, of the activation's steps at all sites
    flops_per_forward: int  # of the work on factors alone, once for all tokens
    lora_rank: int  # the rank at which LoRA holds every update of this adapter
    factors: tuple[FactorEntry, ...]
    modes: tuple[ModeEntry, ...]
    matrices: tuple[MatrixEntry, ...]

    @property
    def stored(self) -> int:
        """Numbers in a checkpoint."""
        return self.trainable + self.extra + self.frozen_stored

    @property
    def percent(self) -> float:
        """Trained numbers per hundred parameters of the base."""
        return 100 * self.trainable / self.base

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes in float32 of a checkpoint's tensors, of all factors, of their gradients and of AdamW's two states.

        Activations are apart: they are counted per token, and have numbers of ``number_bytes``.
        """
        return {
            "checkpoint": FLOAT_BYTES * self.stored,
            "factors": FLOAT_BYTES * (self.trainable + self.frozen_stored + self.frozen_seeded),
            "gradients": FLOAT_BYTES * (self.trainable + self.extra),
            "optimizer": FLOAT_BYTES * ADAMW_STATES * (self.trainable + self.extra),
            "kept_per_token": self.number_bytes * self.kept_per_token,
        }

    @property
    def title(self) -> str:
        counted = f" ({self.model_class})" if self.model_class else ""
        alpha = "" if self.alpha is None else f", alpha = {self.alpha:g}"
        dropout = "".join(f", dropout of {where} = {significant(p)}" for where, p in self.dropout.items())
        *others, last = self.formulas or ("no update",)
        return "\n".join([f"{self.name} on {self.model}{counted}", *others, f"{last}{alpha}{dropout}"])

    @property
    def tables(self) -> tuple[Table, ...]:
        """Totals, memory, factors, modes, matrices."""
        return self._totals(), self._memory(), self.factor_table, self._modes(), self._matrices()

    def to_data(self) -> dict[str, object]:
        """Fields and totals under their names, the tables last; integers exact."""
        fields, totals = asdict(self), {"stored": self.stored, "percent": self.percent, "bytes": self.bytes}
        tables = {key: fields.pop(key) for key in ("factors", "modes", "matrices")}
        return {**fields, **totals, **tables}

    def _totals(self) -> Table:
        seeded = f"not in the checkpoint: made again, random numbers from seed {self.seed}"
        ordered = f"forward, a multiply-add as two; ordered for {self.tokens:,} tokens at a time"
        rows: list[tuple[Cell, ...]] = [
            ("trained", self.trainable, f"{significant(self.percent)} % of the base's {self.base:,}"),
            *([("of the base", self.extra, "trained beside the update, and in the checkpoint")] if self.extra else []),
            ("frozen, stored", self.frozen_stored, "in the checkpoint"),
            ("frozen, seeded", self.frozen_seeded, seeded),
            ("stored", self.stored, "in the checkpoint, all of it"),
            ("FLOPs per token", self.flops_per_token, ordered),
            ("FLOPs per forward pass", self.flops_per_forward, "once for all tokens, on factors alone"),
            ("LoRA-equivalent rank", self.lora_rank, "LoRA of this rank holds every update"),
        ]
        return Table(("total", "number", "remark"), tuple(rows))

    def _memory(self) -> Table:
        apart = "dropout, and what is trained of the base, apart" if self.extra else "dropout apart"
        told = {
            "factors": "all of them, in float32",
            "gradients": "of what is trained, in float32",
            "optimizer": "AdamW's two numbers for each trained one, in float32",
            "kept_per_token": f"of activations for the backward pass, {self.number_bytes} bytes a number; {apart}",
            "checkpoint": "on disk, in float32",
        }
        found = self.bytes
        rows = ((name.replace("_", " "), found[name], binary(found[name]), remark) for name, remark in told.items())
        return Table(("memory", "bytes", "", "remark"), tuple(rows))

    @property
    def factor_table(self) -> Table:
        """Every stored tensor."""
        rows = ((entry.name, entry.over, entry.count, entry.told, entry.init) for entry in self.factors)
        return Table(("factor", "modes", "numbers", "kind", "init"), tuple(rows))

    def _modes(self) -> Table:
        how = {"attach": "when attached", "row": "per row of the batch", "data": "by the data", "sum": "summed over"}
        rows = tuple(
            (mode.name, ", ".join(f"{size:,}" for size in mode.sizes), how[mode.bound], mode.trainable, mode.frozen)
            for mode in self.modes
        )
        return Table(("mode", "size", "bound", "trained numbers", "frozen numbers"), rows)

    def _matrices(self) -> Table:
        chosen = tuple(dict.fromkeys(key for m in self.matrices for key in m.chosen))
        rows: list[tuple[Cell, ...]] = [
            (
                m.matrix,
                m.layers if m.sites == m.layers else f"{m.layers} x {m.sites // m.layers}",
                *((m.at, *(m.chosen.get(key, "") for key in chosen)) if chosen else ()),
                f"{m.d_out:,} x {m.d_in:,}",
                m.trainable,
                m.lora_rank,
            )
            for m in self.matrices
        ]
        headers = ("matrix", "layers", *(("which", *chosen) if chosen else ()))
        rows.append(("shared by several", *[""] * len(headers), self.shared, ""))
        return Table((*headers, "d_out x d_in", "trained, its own", "rank of LoRA"), tuple(rows))


def binary(n_bytes: int) -> str:
    """Bytes in the largest binary unit that leaves at least one of it.

    >>> binary(512), binary(16_777_216)
    ('512 B', '16.0 MiB')
    """
    units = ("KiB", "MiB", "GiB", "TiB")
    power = min(max(0, n_bytes.bit_length() - 1) // 10, len(units))
    return f"{n_bytes / 1024**power:,.1f} {units[power - 1]}" if power else f"{n_bytes} B"
