"""``structure: matrix | cp | tucker | tt`` -> the update it stands for.

With the modes a spec lists (by default ``matrix, layer, d_out, d_in``, and ``task`` in front where there are tasks):

- ``matrix``: ``B[..., outputs, r] * A[..., r, inputs]``, one pair for every value of the remaining modes: LoRA's form;
- ``cp``: a factor ``A_<mode>[mode, r]`` for each mode, all summed over the one bond ``r``;
- ``tucker``: a core ``G[r_<mode>, ...]`` over one bond per mode, and ``A_<mode>[mode, r_<mode>]``;
- ``tt``: a chain of cores ``G_<mode>[r1, mode, r2]`` in the order of the modes; the bonds are ``r1``, ``r2``, ...

The factor that starts at zero carries the output: ``B``, or that of ``head_dim`` if listed, else of the last output
mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tensorpeft.language.errors import fail
from tensorpeft.language.keywords import KAIMING, LINEAR, TASK_MODE, ZEROS
from tensorpeft.language.source import Span
from tensorpeft.language.spec import SIDES
from tensorpeft.language.syntax import Call, Definition, Product, Reference, Update

_OUTPUTS = ("d_out", "head", "head_dim")
_INPUTS = ("d_in", "width")


@dataclass(frozen=True)
class Layout:
    """The modes of a shorthand in their order, each with its place, and which of them are output and input."""

    modes: tuple[str, ...]
    outputs: frozenset[str]
    inputs: frozenset[str]
    definitions: tuple[Definition, ...] = ()
    spans: tuple[Span | None, ...] = ()

    def span(self, mode: str) -> Span | None:
        return dict(zip(self.modes, self.spans, strict=True))[mode]


@dataclass(frozen=True)
class Expansion:
    """What a shorthand stands for: its update, its bonds in order, and how each factor begins."""

    update: Update
    bonds: tuple[str, ...]
    inits: dict[str, Call]


def layout(entries: tuple[Definition, ...] | None, tasks: bool, span: Span | None) -> Layout:
    """The modes that a shorthand lists.

    A side that is defined by parts stands for its parts; a fused mode stands for itself.
    """
    if entries is None:
        names = ("matrix", "layer", "d_out", "d_in")
        entries = tuple(Definition(name, (), span) for name in ((TASK_MODE, *names) if tasks else names))
    modes: dict[str, Span | None] = {}
    parts: dict[str, set[str]] = {"d_out": set(_OUTPUTS), "d_in": set(_INPUTS)}
    for entry in entries:
        split = entry.name in SIDES and entry.parts
        if split:
            parts[entry.name].update(part.name for part in entry.parts)
        for name in [part.name for part in entry.parts] if split else [entry.name]:
            if name in modes:
                raise fail(f"mode `{name}` is listed twice", entry.span)
            modes[name] = entry.span
    outputs, inputs = parts["d_out"] & modes.keys(), parts["d_in"] & modes.keys()
    if not outputs or not inputs:
        side, example = ("output", "`d_out`") if not outputs else ("input", "`d_in`")
        message = f"`modes` lists no {side} mode; expected {example}, its parts, or `head`, `head_dim` and `width`"
        raise fail(message, span)
    defined = tuple(entry for entry in entries if entry.parts)
    return Layout(tuple(modes), frozenset(outputs), frozenset(inputs), defined, tuple(modes.values()))


def expand(structure: str, modes: Layout, span: Span | None) -> Expansion:
    """The update of a structure over these modes; ``span`` is where a fault of the whole is shown."""
    return _STRUCTURES[structure](modes, span)


def _matrix(modes: Layout, span: Span | None) -> Expansion:
    common = [mode for mode in modes.modes if mode not in modes.outputs | modes.inputs]
    outputs = [mode for mode in modes.modes if mode in modes.outputs]
    inputs = [mode for mode in modes.modes if mode in modes.inputs]
    b = Reference("B", (*common, *outputs, "r"), span)
    a = Reference("A", (*common, "r", *inputs), span)
    return Expansion(_single([b, a], span), ("r",), {"B": ZEROS, "A": LINEAR})


def _cp(modes: Layout, span: Span | None) -> Expansion:
    references = [Reference(f"A_{mode}", (mode, "r"), modes.span(mode)) for mode in modes.modes]
    return Expansion(_single(references, span), ("r",), _inits(references, f"A_{_last_output(modes)}"))


def _tucker(modes: Layout, span: Span | None) -> Expansion:
    bonds = tuple(f"r_{mode}" for mode in modes.modes)
    core = Reference("G", bonds, span)
    pairs = zip(modes.modes, bonds, strict=True)
    references = [core, *(Reference(f"A_{mode}", (mode, bond), modes.span(mode)) for mode, bond in pairs)]
    return Expansion(_single(references, span), bonds, _inits(references, f"A_{_last_output(modes)}"))


def _tt(modes: Layout, span: Span | None) -> Expansion:
    bonds = tuple(f"r{number}" for number in range(1, len(modes.modes)))
    before, after = [(), *((bond,) for bond in bonds)], [*((bond,) for bond in bonds), ()]
    references = [
        Reference(f"G_{mode}", (*left, mode, *right), modes.span(mode))
        for left, mode, right in zip(before, modes.modes, after, strict=True)
    ]
    return Expansion(_single(references, span), bonds, _inits(references, f"G_{_last_output(modes)}"))


_STRUCTURES: dict[str, Callable[[Layout, Span | None], Expansion]] = {
    "matrix": _matrix,
    "cp": _cp,
    "tucker": _tucker,
    "tt": _tt,
}


def _single(references: list[Reference], span: Span | None) -> Update:
    return Update((Product(tuple(references), span=span),), span)


def _inits(references: list[Reference], zero: str) -> dict[str, Call]:
    return {ref.factor: ZEROS if ref.factor == zero else KAIMING for ref in references}


def _last_output(modes: Layout) -> str:
    return "head_dim" if "head_dim" in modes.modes else [mode for mode in modes.modes if mode in modes.outputs][-1]
