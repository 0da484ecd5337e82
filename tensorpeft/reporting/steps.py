"""Plan -> steps: every contraction of an adapter's forward pass, with what it costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from tensorpeft.network.network import Term
from tensorpeft.planning.cost import Built, prologue_key
from tensorpeft.planning.plan import SITE, TOKEN, GroupPlan, Link, Plan, operand_modes, site_sizes
from tensorpeft.reporting.panels import sites_of, span_of
from tensorpeft.reporting.report import FLOAT_BYTES
from tensorpeft.reporting.table import Cell, Table

Tensor = tuple[str, tuple[str, ...]]  # a name and its modes


@dataclass(frozen=True)
class Step:
    """One contraction of two tensors. All numbers are those of one run."""

    sites: str  # for which sites it is
    runs: int  # in a forward pass
    left: Tensor
    right: Tensor
    result: Tensor
    sizes: tuple[tuple[str, int], ...]  # of every mode that is met
    flops: int  # a multiply-add is two
    bytes: int  # of the two tensors read and of the one written, in float32

    def __str__(self) -> str:
        (left, right, result) = (f"{name}[{_told(modes)}]" for name, modes in (self.left, self.right, self.result))
        return f"{result} = {left} * {right}"


def _told(modes: Iterable[str]) -> str:
    return ", ".join(mode.strip("<>") for mode in modes)  # no mode of a spec has brackets


def steps(plan: Plan) -> tuple[Step, ...]:
    """What is done once, on factors alone, and then what is done at each site; group by group."""
    made: Built = set()
    return tuple(step for group in plan.groups for step in _group(group, plan.regime.tokens, made))


def _group(plan: GroupPlan, tokens: int, made: Built) -> Iterator[Step]:
    group = plan.group
    where = sites_of(group.sites)
    for chain, term in zip(plan.chains, group.terms, strict=True):
        sizes = {**term.sizes, **site_sizes(group), TOKEN: tokens, "task": 1}
        for link in chain.links:
            runs = (len(plan.bundles) if link.shared else len(group.sites)) if link.at_site else 1
            if prologue_key(term, link) not in made or link.at_site:
                yield from _building(plan, term, link, where, runs)
            made.add(prologue_key(term, link))
        name = "x"
        for at, link in enumerate(chain.links):
            result = "y" if at == len(chain.links) - 1 else f"x{at + 1}"
            tensor = (_name(term, link), link.modes)
            before, after = (tuple(mode for mode in modes if mode != SITE) for modes in (link.before, link.after))
            runs = len(plan.bundles) if link.shared else len(group.sites)  # sites that read one tensor share a step
            if link.flops:  # a row is looked up, and a weight replaced, without any
                yield _step(where, runs, (name, before), tensor, (result, after), sizes)
            name = result


def _building(plan: GroupPlan, term: Term, link: Link, where: str, runs: int) -> Iterator[Step]:
    """The steps that build a link's tensor: for all sites at once, or at each."""
    sizes = {**term.sizes, **site_sizes(plan.group)}
    operands = [term.operands[i] for i in link.operands]
    live = [(o.factor, o.modes if link.at_site else operand_modes(plan.group, o)) for o in operands]
    final = (*link.site_modes, *link.modes)
    for path in link.path:
        left, right = (live[i] for i in path)
        live = [tensor for i, tensor in enumerate(live) if i not in path]
        needed = {*final, *(mode for _, modes in live for mode in modes)}
        kept = tuple(mode for mode in dict.fromkeys((*left[1], *right[1])) if mode in needed) if live else final
        result = (f"{left[0]}.{right[0]}", kept)
        yield _step(where, runs, left, right, result, sizes)
        live.append(result)


def _name(term: Term, link: Link) -> str:
    return ".".join(term.operands[i].factor for i in link.operands)


def _step(where: str, runs: int, left: Tensor, right: Tensor, result: Tensor, sizes: Mapping[str, int]) -> Step:
    every = dict.fromkeys((*left[1], *right[1]))
    flops = prod(sizes[mode] for mode in every) * (1 if every.keys() <= {*result[1]} else 2)
    moved = sum(prod(sizes[mode] for mode in modes) for _, modes in (left, right, result))
    met = tuple((mode, sizes[mode]) for mode in every)
    return Step(where, runs, left, right, result, met, flops, FLOAT_BYTES * moved)


def step_table(done: tuple[Step, ...], tokens: int) -> Table:
    """The steps of a forward pass; those that differ in sizes alone are one row."""
    alike: dict[str, list[Step]] = {}
    for step in done:
        alike.setdefault(str(step), []).append(step)
    rows: list[tuple[Cell, ...]] = [
        (told, sum(s.runs for s in each), _sizes(each), *_costs(each)) for told, each in alike.items()
    ]
    rows.append((f"a forward pass of {tokens:,} tokens", "", "", *_costs(done)))
    return Table(("step", "runs", "sizes", "FLOPs", "bytes"), tuple(rows))


def _costs(each: Iterable[Step]) -> tuple[int, int]:
    """FLOPs and bytes of all runs."""
    return sum(step.flops * step.runs for step in each), sum(step.bytes * step.runs for step in each)


def _sizes(each: list[Step]) -> str:
    return ", ".join(
        f"{_told([mode])} {span_of({dict(step.sizes)[mode] for step in each})}" for mode, _ in each[0].sizes
    )
