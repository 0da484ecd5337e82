"""Any spec as one einsum: the truth for structures that have no formula of their own.

Written without the compiler. A factor is indexed by the site's matrix and layer, its written modes are cut to the site's sizes
and viewed as their parts, and one einsum contracts everything. Only the layout of the stored tensors is taken from the adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

import tensorpeft as tp
from tensorpeft.language.syntax import Choice, Product, Reference, Selector
from tensorpeft.model.shape import Site
from tensorpeft.network.network import Block

AT_SITE = ("matrix", "layer", "expert")
STRUCTURAL = {"head", "head_dim", "width"}
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
FUNCTIONS = {
    "sqrt": math.sqrt,
    "min": min,
    "max": max,
    "ceil": math.ceil,
    "floor": math.floor,
    "gcd": math.gcd,
    "mod": lambda a, b: a % b,
}


def balanced(number: int, parts: int) -> list[int]:
    """Of all ways to write a number as a product of so many, ascending: in each step what is nearest to the even share.

    ``d`` is nearer than ``e`` if the larger of d and the share is a smaller multiple of the other one: compared exactly, by
    powers, where production takes roots.
    """
    if parts < 2:
        return [number] * parts

    def ratio(d: int) -> Fraction:  # of d ** parts to the number, above one
        return max(Fraction(d**parts, number), Fraction(number, d**parts))

    nearest = min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (ratio(d), d))
    return sorted([nearest, *balanced(number // nearest, parts - 1)])


@dataclass(frozen=True)
class Modes:
    """The modes of a spec at one site: their sizes, and what each is a product of; of a side perhaps in several ways."""

    sizes: dict[str, int]
    parts: dict[str, list[str]]
    splits: list[tuple[str, list[str]]]
    scale: float

    def of(self, product: Product) -> Modes:
        """These modes where each side is split as it is in a product."""
        carried = {atom for f in product.factors for mode in f.modes for atom in self.atoms(mode)}
        chosen = {
            side: parts
            for side, parts in self.splits
            if carried & {atom for part in parts for atom in self.atoms(part)}
        }
        return replace(self, parts=self.parts | chosen)

    def atoms(self, mode: str) -> list[str]:
        return [atom for part in self.parts[mode] for atom in self.atoms(part)] if mode in self.parts else [mode]

    def size(self, mode: str) -> int:
        return math.prod(self.sizes[atom] for atom in self.atoms(mode) if atom not in AT_SITE)


def fits(selector: Selector, site: Site) -> bool:
    names = not selector.matrices or any(
        fnmatchcase(site.matrix, name) or f".{site.matrix}".endswith(f".{name}") for name in selector.matrices
    )
    return names and (selector.layers is None or site.layer in selector.layers)


def products_at(adapter: tp.Adapter, site: Site) -> list[Product]:
    """The products of the last entry of ``update:`` that fits a site."""
    products = adapter.spec.update.products
    at = [product.at for product in products if fits(product.at, site)][-1]
    return [product for product in products if product.at == at]


def modes_at(adapter: tp.Adapter, site: Site) -> Modes:
    spec = adapter.spec
    used = {m for product in products_at(adapter, site) for f in product.factors for m in f.modes}
    splits = [(d.name, [part.name for part in d.parts]) for d in spec.modes if d.name in ("d_out", "d_in")]
    parts = {d.name: [part.name for part in d.parts] for d in spec.modes if d.name not in ("d_out", "d_in")}
    used |= {part for mode in used for part in parts.get(mode, ())}
    sizes = {"d_out": site.d_out, "d_in": site.d_in, "task": spec.tasks or 0}
    if STRUCTURAL & used:
        side = {"*": site.head_side, **dict(spec.heads.side)}
        side = side.get(site.matrix, side["*"]) or "d_out"
        side = next((name for name, inside in splits if "head" in inside), side)
        count = {"*": site.heads, **dict(spec.heads.count)}
        other = "d_in" if side == "d_out" else "d_out"
        heads = count.get(site.matrix, count["*"])
        sizes |= {"head": heads, "head_dim": sizes[side] // heads, "width": sizes[other]}
        splits += [(side, ["head", "head_dim"]), (other, ["width"])]
    names = {**dict(adapter.network.model.sizes), "layer": site.layer, **sizes}
    split, fixed = {"d_out", "d_in"}, {*sizes}
    for _ in (*spec.ranks, *spec.modes):  # each may name the others
        for name, expression in spec.ranks:
            if expression.names <= names.keys():
                names[name] = sizes[name] = int(value(expression, names, site))
        for definition in spec.modes:
            given = {part.name: part.size for part in definition.parts if part.size is not None}
            known = definition.name in split & sizes.keys()
            if known and all(size.names <= names.keys() for size in given.values()):
                split |= {part.name for part in definition.parts}
                sizes |= {part: int(value(size, names, site)) for part, size in given.items()}
                free = [part.name for part in definition.parts if part.name not in given.keys() | fixed]
                left = sizes[definition.name]
                left //= math.prod(sizes[part.name] for part in definition.parts if part.name not in free)
                sizes |= dict(zip(free, balanced(left, len(free)), strict=True))
                names |= sizes
    return Modes(sizes, parts, splits, value(spec.scale, {**names, "alpha": spec.alpha}, site))


def value(expression: object, names: dict, site: Site) -> float:
    if isinstance(expression, Choice):
        expression = [chosen for selector, chosen in expression.entries if fits(selector, site)][-1]
    return eval(str(expression), {"__builtins__": {}}, {**names, **FUNCTIONS})


def unpacked(block: Block, flat: Tensor) -> Tensor:
    """A masked factor as a whole tensor, zero where nothing is stored."""
    whole = flat.new_zeros([axis.size for axis in block.axes])
    for key, values in zip(block.keys, flat.split(block.key_sizes), strict=True):
        if block.entries is not None:
            sizes = [axis.size for axis in block.free_axes]
            of_key = {
                axis.mode: n
                for axis, n in zip(block.free_axes, np.unravel_index(block.entries[key].positions, sizes), strict=True)
            }
            at = [
                torch.as_tensor(of_key[a.mode] if a.labels is None else a.labels.index(label_of(a.mode, key, block)))
                for a in block.axes
            ]
            whole = whole.index_put(at, values)
            continue
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
    if reference.factor == "W":
        atoms = [modes.sizes[atom] for mode in reference.modes for atom in modes.atoms(mode)]
        return base_weight(adapter, site).reshape(atoms)
    written = written_modes(reference, modes)
    free = [mode for mode in written if mode not in AT_SITE]
    sizes = [modes.size(mode) for mode in free]
    mine = tuple(getattr(site, mode) for mode in AT_SITE if mode in written)
    block = block_of(adapter, reference.factor, mine, sizes)
    tensor = tensors[block.name]
    for number in reversed(range(len(block.axes))):
        axis = block.axes[number]
        if axis.labels is not None:
            tensor = tensor.select(number, axis.labels.index(label_of(axis.mode, mine, block)))
    for number, size in enumerate(sizes):
        if tensor.shape[number] < size:  # `group`: neighbours share an index
            tensor = tensor.repeat_interleave(size // tensor.shape[number], number)
        tensor = tensor.narrow(number, 0, size)  # `slice`
    return tensor.reshape([modes.sizes[atom] for mode in free for atom in modes.atoms(mode)])


def written_modes(reference: Reference, modes: Modes) -> list[str]:
    """The modes of a factor, a fused one that holds site modes replaced by its parts."""
    return [m for mode in reference.modes for m in (modes.atoms(mode) if {*modes.atoms(mode)} & {*AT_SITE} else [mode])]


def block_of(adapter: tp.Adapter, factor: str, key: tuple, sizes: list[int]) -> Block:
    """The block that a site uses: of several sizes of a mode, its own where the policy is one tensor for each."""
    (block,) = (
        block
        for block in adapter.network.blocks
        if block.factor == factor
        and key in block.keys
        and all(
            axis.size == size or adapter.spec.policy(axis.mode) in ("slice", "group")
            for axis, size in zip(block.free_axes, sizes, strict=True)
        )
    )
    return block


def base_weight(adapter: tp.Adapter, site: Site) -> Tensor:  # shape: (d_out, d_in)
    """The part of its module's weight that a site stands for, from the model itself."""
    module = adapter.model.get_submodule(site.module)
    weight = module.weight.T if hasattr(module, "nf") else module.weight
    return weight.detach().to(torch.float64)[torch.from_numpy(site.row_indices())]


def site_update(adapter: tp.Adapter, tensors: dict[str, Tensor], site: Site) -> Tensor:  # shape: (tasks?, d_out, d_in)
    magnitudes = [name for name, rule in adapter.spec.factors if rule.norm]
    if not magnitudes:
        return _summed(adapter, tensors, site, {})
    alone = _summed(adapter, tensors, site, dict.fromkeys(magnitudes))
    whole = (base_weight(adapter, site) + alone).detach()
    return _summed(adapter, tensors, site, dict.fromkeys(magnitudes, whole))


def _summed(adapter: tp.Adapter, tensors: dict[str, Tensor], site: Site, over: dict[str, Tensor | None]) -> Tensor:
    """The products, of which some factors are divided by the norms of a matrix, or are one where none is given."""
    modes, dtype = modes_at(adapter, site), next(iter(tensors.values())).dtype
    total = 0
    for product in products_at(adapter, site):
        here = modes.of(product)
        factors = [stored_at(adapter, tensors, f, site, here) for f in product.factors]
        for number, reference in enumerate(product.factors):
            if reference.factor in over:
                whole, factor = over[reference.factor], factors[number]
                norms = factor if whole is None else whole.norm(dim=1 if "d_out" in reference.modes else 0)
                factors[number] = factor / norms.reshape(factor.shape).to(factor)
        total = total + product.sign * contracted(product, factors, site, here, dtype)
    return total * modes.scale


def contracted(product: Product, factors: list[Tensor], site: Site, modes: Modes, dtype: torch.dtype) -> Tensor:
    """One product as one einsum."""
    names: dict[str, str] = {}

    def letters(atoms: Iterable[str]) -> str:
        return "".join(names.setdefault(atom, LETTERS[len(names)]) for atom in atoms if atom not in AT_SITE)

    inputs = [letters(atom for mode in f.modes for atom in modes.atoms(mode)) for f in product.factors]
    task = [atom for atom in ("task",) if atom in names]
    output = letters([*task, *modes.atoms("d_out"), *modes.atoms("d_in")])
    dense = torch.einsum(f"{','.join(inputs)}->{output}", *(factor.to(dtype) for factor in factors))
    return dense.reshape([*dense.shape[: len(task)], site.d_out, site.d_in])


def whole_tensors(adapter: tp.Adapter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the blocks, the masked ones unpacked."""
    blocks = {block.name: block for block in adapter.network.blocks}
    return {n: t if not blocks[n].packed else unpacked(blocks[n], t) for n, t in tensors.items()}


def updates(adapter: tp.Adapter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """dW of every module, (d_out, d_in), or (tasks, d_out, d_in); of a parameter with experts (experts, d_out, d_in)."""
    whole = whole_tensors(adapter, tensors)
    found: dict[str, Tensor] = {}
    for site in adapter.sites:
        change = site_update(adapter, whole, site)
        rows = change.new_zeros(*change.shape[:-2], site.module_d_out, site.d_in)
        rows = rows.index_add(-2, torch.from_numpy(site.row_indices()), change)
        if site.kind == "parameter" and site.expert is not None:
            numbers = len({other.expert for other in adapter.sites if other.path == site.path})
            rows = torch.stack([rows if number == site.expert else torch.zeros_like(rows) for number in range(numbers)])
        found[site.path] = found.get(site.path, 0) + rows
    return found


def counted(adapter: tp.Adapter) -> int:
    """How many numbers a spec trains: of every factor, for each value of its site modes, the product of its sizes there."""
    sizes_of: dict[tuple, set[tuple[int, ...]]] = {}
    for site in adapter.sites:
        modes = modes_at(adapter, site)
        for reference in (f for product in products_at(adapter, site) for f in product.factors):
            if reference.factor != "W" and not adapter.spec.factor(reference.factor).frozen:
                written = written_modes(reference, modes)
                key = tuple(getattr(site, mode) for mode in AT_SITE if mode in written)
                free = [mode for mode in written if mode not in AT_SITE]
                block = block_of(adapter, reference.factor, key, [modes.size(mode) for mode in free])
                left = stored_sizes(block, key, [modes.size(mode) for mode in free])
                policies = tuple(adapter.spec.policy(mode) for mode in free)
                sizes_of.setdefault((reference.factor, policies, key), set()).add(left)
    return sum(_stored(policies, several) for (_, policies, _), several in sizes_of.items())


def stored_sizes(block: Block, key: tuple, sizes: list[int]) -> tuple[int, ...]:
    """The sizes at a key that masks leave; of masked entries their number, and ones."""
    if block.entries is not None:
        return (block.entries[key].count, *(1 for _ in sizes[1:]))
    kept = (None,) * len(sizes) if block.kept is None else block.kept[key]
    return tuple(size if some is None else len(some) for size, some in zip(sizes, kept, strict=True))


def _stored(policies: tuple[str, ...], several: set[tuple[int, ...]]) -> int:
    """The sizes that one key is stored at: of a mode the largest with `slice`, the smallest with `group`."""
    pick = {"slice": max, "group": min}
    columns = [
        {pick[policy](column)} if policy in pick else None
        for policy, column in zip(policies, zip(*several, strict=True), strict=True)
    ]
    stored = {tuple(next(iter(c)) if c else size for c, size in zip(columns, sizes, strict=True)) for sizes in several}
    return sum(map(math.prod, stored))
