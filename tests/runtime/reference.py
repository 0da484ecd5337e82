"""Any spec as one einsum: the truth for structures that have no formula of their own.

Written without the compiler. A factor is indexed by the site's matrix and layer, its written modes are cut to the site's sizes
and viewed as their parts, and one einsum contracts everything. Only the layout of the stored tensors is taken from the adapter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import tensorpeft as tp
from tensorpeft.language.syntax import Reference
from tensorpeft.network.layout import balanced
from tensorpeft.network.network import Block
from tensorpeft.network.shapes import Site

AT_SITE = ("matrix", "layer")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Modes:
    """The modes of a spec at one site: their sizes, and what each is a product of."""

    sizes: dict[str, int]
    parts: dict[str, list[str]]
    scale: float

    def atoms(self, mode: str) -> list[str]:
        return [atom for part in self.parts[mode] for atom in self.atoms(part)] if mode in self.parts else [mode]

    def size(self, mode: str) -> int:
        return math.prod(self.sizes[atom] for atom in self.atoms(mode) if atom not in AT_SITE)


def modes_at(adapter: tp.Adapter, site: Site) -> Modes:
    spec = adapter.spec
    parts = {d.name: [part.name for part in d.parts] for d in spec.modes}
    sizes = {"d_out": site.d_out, "d_in": site.d_in, "task": spec.tasks or 0}
    if {"head", "head_dim", "width"} & {m for p in spec.update.products for f in p.factors for m in f.modes}:
        side = {"*": site.head_side, **dict(spec.heads.side)}
        side = side.get(site.matrix, side["*"]) or "d_out"
        count = {"*": site.heads, **dict(spec.heads.count)}
        other = "d_in" if side == "d_out" else "d_out"
        heads = count.get(site.matrix, count["*"])
        sizes |= {"head": heads, "head_dim": sizes[side] // heads, "width": sizes[other]}
        parts = {side: ["head", "head_dim"], other: ["width"], **parts}
    names = {**dict(adapter.network.model.sizes), **sizes}
    for _ in spec.ranks:  # each may name the others
        for name, expression in spec.ranks:
            if expression.names <= names.keys():
                names[name] = sizes[name] = int(value(expression, names))
    for definition in spec.modes:
        if definition.name in ("d_out", "d_in"):
            left = sizes[definition.name]
            for part in definition.parts:
                if part.size is not None:
                    sizes[part.name] = int(value(part.size, names))
                left //= sizes.get(part.name, 1)
            free = [part.name for part in definition.parts if part.name not in sizes]
            sizes |= dict(zip(free, balanced(left, len(free)), strict=True))
    return Modes(sizes, parts, value(spec.scale, {**names, "alpha": spec.alpha}))


def value(expression: object, names: dict) -> float:
    functions = {"sqrt": math.sqrt, "min": min, "max": max, "ceil": math.ceil, "floor": math.floor}
    return eval(str(expression), {"__builtins__": {}}, {**names, **functions})


def unpacked(block: Block, flat: Tensor) -> Tensor:
    """A masked factor as a whole tensor, zero where nothing is stored."""
    whole = flat.new_zeros([axis.size for axis in block.axes])
    for key, values in zip(block.keys, flat.split(block.key_sizes), strict=True):
        kept = iter(block.kept[key])
        index = []
        for axis in block.axes:
            some = next(kept) if axis.labels is None else [axis.labels.index(label_of(axis.mode, key, block))]
            index.append(torch.arange(axis.size) if some is None else torch.as_tensor(some))
        grid = torch.meshgrid(*index, indexing="ij")
        whole = whole.index_put(grid, values.view(grid[0].shape))
    return whole


def label_of(mode: str, key: tuple, block: Block) -> object:
    if mode == "site":
        return key
    present = [m for m in AT_SITE if m in {axis.mode for axis in block.axes}]
    return key[present.index(mode)]


def stored_at(
    adapter: tp.Adapter, tensors: dict[str, Tensor], reference: Reference, site: Site, modes: Modes
) -> Tensor:
    """The tensor of a factor at a site, over the atoms of its modes."""
    key = {"matrix": site.matrix, "layer": site.layer}
    written = [
        m for mode in reference.modes for m in (modes.atoms(mode) if {*modes.atoms(mode)} & {*AT_SITE} else [mode])
    ]
    free = [mode for mode in written if mode not in AT_SITE]
    mine = tuple(key[mode] for mode in AT_SITE if mode in written)
    sizes = [modes.size(mode) for mode in free]
    blocks = [b for b in adapter.network.blocks if b.factor == reference.factor and mine in b.keys]
    exact = [b for b in blocks if [a.size for a in b.free_axes] == sizes]
    (block,) = exact or blocks  # with `ragged: slice` there is one, and it is larger
    tensor = tensors[block.name]
    for number in reversed(range(len(block.axes))):
        axis = block.axes[number]
        if axis.labels is not None:
            tensor = tensor.select(number, axis.labels.index(label_of(axis.mode, mine, block)))
    tensor = tensor[tuple(slice(size) for size in sizes)]
    return tensor.reshape([modes.sizes[atom] for mode in free for atom in modes.atoms(mode)])


def site_update(adapter: tp.Adapter, tensors: dict[str, Tensor], site: Site) -> Tensor:  # shape: (tasks?, d_out, d_in)
    modes = modes_at(adapter, site)
    task = ["task"] if adapter.spec.tasks else []
    total = 0
    for product in adapter.spec.update.products:
        names: dict[str, str] = {}
        inputs = [
            "".join(
                names.setdefault(a, LETTERS[len(names)]) for m in f.modes for a in modes.atoms(m) if a not in AT_SITE
            )
            for f in product.factors
        ]
        opened = [a for a in (*task, *modes.atoms("d_out"), *modes.atoms("d_in")) if a in names]
        equation = f"{','.join(inputs)}->{''.join(names[a] for a in opened)}"
        dense = torch.einsum(equation, *(stored_at(adapter, tensors, f, site, modes) for f in product.factors))
        dense = dense.reshape([*dense.shape[: len(task) if "task" in names else 0], site.d_out, site.d_in])
        total = total + product.sign * dense
    return total * modes.scale


def updates(adapter: tp.Adapter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """dW of every module, (d_out, d_in), or (tasks, d_out, d_in) where the spec has tasks."""
    blocks = {block.name: block for block in adapter.network.blocks}
    whole = {n: t if blocks[n].kept is None else unpacked(blocks[n], t) for n, t in tensors.items()}
    found: dict[str, Tensor] = {}
    for site in adapter.sites:
        change = site_update(adapter, whole, site)
        rows = change.new_zeros(*change.shape[:-2], site.module_d_out, site.d_in)
        rows = rows.index_add(-2, torch.from_numpy(site.row_indices()), change)
        found[site.module] = found.get(site.module, 0) + rows
    return found
