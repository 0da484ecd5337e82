"""Plan -> Report: everything is counted from the stored blocks and from who uses which key of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from math import prod

from tensorpeft.language.keywords import TASK_MODE
from tensorpeft.language.modes import inside
from tensorpeft.language.spec import SIDES, SITE_MODES, Spec
from tensorpeft.language.syntax import EVERYWHERE, Choice, Number, Selector, ranges
from tensorpeft.model.shape import Key, Site
from tensorpeft.model.sites import in_order
from tensorpeft.network.network import Block, Network
from tensorpeft.network.rank import rank_bound
from tensorpeft.planning.plan import Plan
from tensorpeft.reporting.report import FactorEntry, MatrixEntry, ModeEntry, Report
from tensorpeft.reporting.saved_activations import kept_per_token

Chosen = tuple[tuple[str, float], ...]  # what differs from site to site, and its value there
EntryKey = tuple[str, int, int, Chosen]  # matrix, d_out, d_in and choices: what an entry of `matrices` stands for
_BINDINGS = ("attach", "row", "data", "sum")


def report_of(plan: Plan) -> Report:
    """The report on the adapter of a plan."""
    network, spec, model = plan.network, plan.network.spec, plan.network.model
    kinds = _kinds(network)
    owned = _owned(network, kinds)
    matrices = _matrices(network, kinds, owned)
    return Report(
        name=spec.name,
        model=model.name,
        model_class=model.model_class,
        update=str(spec.update),
        formulas=formulas(spec),
        scale=str(spec.scale),
        alpha=spec.alpha,
        ranks={bond: str(size) for bond, size in spec.ranks},
        dropout=dict(spec.dropout),
        seed=spec.seed,
        tokens=plan.regime.tokens,
        number_bytes=plan.regime.number_bytes,
        kept_per_token=kept_per_token(plan),
        trainable=_count(block for block in network.blocks if block.trainable),
        extra=sum(parameter.count for parameter in network.extras),
        frozen_stored=_count(block for block in network.blocks if not block.trainable and not block.seeded),
        frozen_seeded=_count(block for block in network.blocks if block.seeded),
        shared=owned[None],
        base=model.n_parameters,
        flops_per_token=plan.flops_per_token,
        flops_per_forward=plan.prologue_flops,
        lora_rank=max((entry.lora_rank for entry in matrices), default=0),
        factors=tuple(map(_factor, network.blocks)),
        modes=_modes(network),
        matrices=matrices,
    )


def _count(blocks: Iterable[Block]) -> int:
    return sum(block.count for block in blocks)


def _factor(block: Block) -> FactorEntry:
    shape = tuple(axis.size for axis in block.axes)
    return FactorEntry(
        name=block.name,
        factor=block.factor,
        modes=tuple(axis.mode for axis in block.axes),
        shape=shape,
        count=block.count,
        trainable=block.trainable,
        stored=not block.seeded,
        masked=block.count != prod(shape),
        init="norm of W + dW" if block.rule.norm else str(block.rule.init),
        lr=block.rule.lr,
    )


def _kinds(network: Network) -> dict[Key, EntryKey]:
    """The entry of `matrices` that each site belongs to."""
    spec = network.spec
    bonds = [bond for bond, size in spec.ranks if isinstance(size, Choice)]
    kinds: dict[Key, EntryKey] = {}
    for group in network.groups:
        sizes = {bond: term.sizes[bond] for term in group.terms for bond in bonds if bond in term.sizes}
        scale = (("scale", group.scale),) if isinstance(spec.scale, Choice) else ()
        for site in group.sites:
            kinds[site.key] = site.matrix, site.d_out, site.d_in, (*sizes.items(), *scale)
    return kinds


def _owned(network: Network, kinds: dict[Key, EntryKey]) -> Counter[EntryKey | None]:
    """How many trained numbers each kind alone uses, and, under None, how many several use."""
    users: dict[tuple[str, Key], set[EntryKey]] = defaultdict(set)
    for group in network.groups:
        for operand in (operand for term in group.terms for operand in term.operands):
            for key, site in zip(operand.keys, group.sites, strict=True):
                users[operand.block.name, key].add(kinds[site.key])
    owned: Counter[EntryKey | None] = Counter()
    for block in network.blocks:
        for key, size in zip(block.keys, block.key_sizes, strict=True):
            found = users[block.name, key]
            owned[next(iter(found)) if len(found) == 1 else None] += size * block.trainable
    return owned


def _matrices(network: Network, kinds: dict[Key, EntryKey], owned: Counter[EntryKey | None]) -> tuple[MatrixEntry, ...]:
    ranks: dict[EntryKey, int] = defaultdict(int)
    for group in network.groups:
        bound = rank_bound(group)
        for kind in {kinds[site.key] for site in group.sites}:
            ranks[kind] = max(ranks[kind], bound)
    members: dict[EntryKey, list[Site]] = defaultdict(list)
    for site in in_order(network.sites, (site.matrix for site in network.model.sites)):
        members[kinds[site.key]].append(site)
    return tuple(
        MatrixEntry(
            matrix=matrix,
            layers=len({site.layer for site in sites}),
            d_out=d_out,
            d_in=d_in,
            trainable=owned[kind],
            lora_rank=ranks[kind],
            sites=len(sites),
            at=ranges({site.layer for site in sites}),
            chosen=dict(chosen),
        )
        for kind, sites in members.items()
        for matrix, d_out, d_in, chosen in [kind]
    )


def formulas(spec: Spec) -> tuple[str, ...]:
    """``dW = alpha / r * (B * A)``: one for each entry of the update."""
    entries = spec.update.entries
    several = len(entries) > 1 or EVERYWHERE not in entries
    return tuple(
        f"dW{_at(at) if several else ''} = {update if spec.scale == Number(1) else f'{spec.scale} * ({update})'}"
        for at, update in entries.items()
    )


def _at(selector: Selector) -> str:
    return " elsewhere" if selector == EVERYWHERE else f" of {selector}"


def _modes(network: Network) -> tuple[ModeEntry, ...]:
    """The written modes of all factors: first those bound to sites, then tasks, sides, bonds."""
    terms = (term for group in network.groups for term in group.terms)
    site_modes = {operand.factor: operand.site_modes for term in terms for operand in term.operands}
    carriers: dict[str, list[Block]] = defaultdict(list)
    for block in network.blocks:
        for mode in (*site_modes[block.factor], *(axis.mode for axis in block.free_axes)):
            carriers[mode].append(block)
    opened = _opened(network)
    entries = [
        ModeEntry(
            name=mode,
            sizes=_sizes(network, mode, blocks),
            bound=_binding(mode, opened),
            trainable=_count(block for block in blocks if block.trainable),
            frozen=_count(block for block in blocks if not block.trainable),
        )
        for mode, blocks in carriers.items()
    ]
    return tuple(sorted(entries, key=lambda entry: _BINDINGS.index(entry.bound)))


def _sizes(network: Network, mode: str, blocks: list[Block]) -> tuple[int, ...]:
    if mode in SITE_MODES:
        return (len({getattr(site, mode) for site in network.sites}),)
    return tuple(sorted({axis.size for block in blocks for axis in block.free_axes if axis.mode == mode}))


def _binding(mode: str, opened: set[str]) -> str:
    if mode in SITE_MODES:
        return "attach"
    return "row" if mode == TASK_MODE else "data" if mode in opened else "sum"


def _opened(network: Network) -> set[str]:
    """The modes in which the input or the output of a site is indexed: sides, their atoms, and what is between."""
    opened = {*SIDES, *(atom for group in network.groups for term in group.terms for atom in (*term.d_out, *term.d_in))}
    definitions = network.spec.modes
    return opened | {each.name for each in definitions if not opened.isdisjoint(inside(definitions, (each.name,)))}
