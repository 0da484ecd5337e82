"""Plan -> counted steps: every contraction of an adapter's forward pass, with what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from tensorpeft.network.network import Group, Term
from tensorpeft.planning.chain import ANY_SITE, SITE, Chain, Link, site_sizes
from tensorpeft.planning.cost import Built, prologue_key
from tensorpeft.planning.orders import TOKEN
from tensorpeft.planning.plan import GroupPlan, Plan
from tensorpeft.planning.regime import Regime
from tensorpeft.planning.weight_sites import some_sites
from tensorpeft.reporting.panels import sites_of, span_of
from tensorpeft.reporting.table import Cell, Table

ENDS = {"site": ("x", "y"), "output": ("Wx", "y"), "input": ("x", "x'")}  # of a group: what it reads, and adds to
Tensor = tuple[str, tuple[str, ...]]  # a name and its modes


@dataclass(frozen=True)
class CountedStep:
    """One contraction of two tensors. Costs are those of one run; a multiply-add is two FLOPs."""

    sites: str  # for which sites it is
    runs: int  # in a forward pass
    left: Tensor
    right: Tensor
    result: Tensor
    sizes: tuple[tuple[str, int], ...]  # of every mode that is met
    flops: int  # forward
    backward: int  # FLOPs of the backward pass; 0 where the plan is for a forward pass alone
    bytes: int  # forward: read and written, with as many bytes a number as the plan says

    def __str__(self) -> str:
        (left, right, result) = (f"{name}[{', '.join(modes)}]" for name, modes in (self.left, self.right, self.result))
        return f"{result} = {left} * {right}"


@dataclass(frozen=True)
class _Meter:
    """What a step costs at a group of sites."""

    group: Group
    sizes: Mapping[str, int]
    regime: Regime

    def step(self, runs: int, left: Tensor, right: Tensor, result: Tensor, *, passes: int) -> CountedStep:
        """A contraction; its backward pass, where there is one, does its work so many times again."""
        every = dict.fromkeys((*left[1], *right[1]))
        flops = self._size(every) * (1 if every.keys() <= {*result[1]} else 2)
        moved = sum(self._size(modes) for _, modes in (left, right, result))
        if result[0] == ENDS[self.group.at][1]:  # it is added to the base's, which is read first
            moved += self._size(result[1])
        return CountedStep(
            sites=sites_of(self.group.sites),
            runs=runs,
            left=self._shown(left),
            right=self._shown(right),
            result=self._shown(result),
            sizes=tuple((mode.strip("<>"), self.sizes[mode]) for mode in self._met(every)),
            flops=flops,
            backward=flops * passes * self.regime.gradients,
            bytes=moved * self.regime.number_bytes,
        )

    def _size(self, modes: Iterable[str]) -> int:
        return prod(self.sizes[mode] for mode in modes)

    def _met(self, modes: Iterable[str]) -> Iterator[str]:
        """Modes that are worth telling: not those of a single site."""
        return (mode for mode in modes if mode not in (SITE, ANY_SITE) or self.sizes[mode] > 1)

    def _shown(self, tensor: Tensor) -> Tensor:
        return tensor[0], tuple(mode.strip("<>") for mode in self._met(tensor[1]))


def steps(plan: Plan) -> tuple[CountedStep, ...]:
    """What is done once, on factors alone, and then what is done at the sites; group by group."""
    built: Built = set()
    groups = [_whole(group) for group in plan.groups]
    before = [step for group in groups for step in _prologue(group, plan.regime, built)]
    after = [step for group in groups for step in _sites(group, plan.regime)]
    return (*before, *after)


def _whole(plan: GroupPlan) -> GroupPlan:
    """A group of other sites than linear modules as it is planned: the base weight is a factor like any other."""
    group = plan.group
    return plan if group.kind == "linear" else replace(plan, group=some_sites(group, range(len(group.sites))))


def _prologue(plan: GroupPlan, regime: Regime, built: Built) -> Iterator[CountedStep]:
    """The steps that build the tensors of links for all sites at once; what another group has built is there already."""
    shared = built if plan.group.kind == "linear" else set()
    for chain, term in zip(plan.chains, plan.group.terms, strict=True):
        meter = _Meter(plan.group, {**term.sizes, **site_sizes(plan.group)}, regime)
        for link in chain.links:
            if not link.at_site and prologue_key(term, link) not in shared:
                shared.add(prologue_key(term, link))
                yield from _building(meter, term, link, runs=1, passes=2 * link.trainable)


def _sites(plan: GroupPlan, regime: Regime) -> Iterator[CountedStep]:
    """The steps at the sites. Those that read one tensor go together as far as the plan lets them."""
    for chain, term in zip(plan.chains, plan.group.terms, strict=True):
        meter = _Meter(plan.group, term.sizes, regime)
        for link in chain.links:
            if link.at_site:  # and again in the backward pass, which then has two products for each
                runs, passes = len(plan.group.sites), 1 + 2 * link.trainable
                yield from _building(meter, term, link, runs=runs, passes=passes)
        for together, number in sorted(Counter(map(len, plan.bundles)).items()):
            yield from _activation(plan, chain, term, together, number, regime)


def _activation(
    plan: GroupPlan, chain: Chain, term: Term, together: int, number: int, regime: Regime
) -> Iterator[CountedStep]:
    """The activation meets link after link, at each of ``number`` inputs that so many sites read together."""
    meter = _Meter(plan.group, {**term.sizes, TOKEN: regime.tokens, "task": 1, SITE: together}, regime)
    name, end = ENDS[plan.group.at]
    for at, link in enumerate(chain.links):
        last = at == len(chain.links) - 1
        own = (SITE,) if link.own and not last else ()
        source = name, tuple(mode for mode in link.before if not (last and mode == SITE))
        tensor = _name(term, link.operands), (*own, *link.modes)
        result = end if last else f"x{at + 1}", link.after
        runs = number * (together if last else 1)
        if link.flops:  # a row is looked up, and a weight replaced, without any
            yield meter.step(runs, source, tensor, result, passes=1 + link.trainable)
        name = result[0]


def _building(meter: _Meter, term: Term, link: Link, *, runs: int, passes: int) -> Iterator[CountedStep]:
    """The steps that build a link's tensor."""
    made: list[tuple[int, ...]] = [(operand,) for operand in link.operands]
    for step in link.steps:
        left, right = (made[number] for number in step.inputs)
        made.append(tuple(sorted((*left, *right))))
        tensors = ((left, step.left), (right, step.right), (made[-1], step.result))
        yield meter.step(runs, *((_name(term, operands), modes) for operands, modes in tensors), passes=passes)


def _name(term: Term, operands: Iterable[int]) -> str:
    return ".".join(term.operands[i].factor for i in operands)


def step_table(done: tuple[CountedStep, ...], tokens: int) -> Table:
    """The steps of a forward pass; those that differ in sizes alone are one row."""
    alike: dict[str, list[CountedStep]] = {}
    for step in done:
        alike.setdefault(str(step), []).append(step)
    rows: list[tuple[Cell, ...]] = [
        (told, sum(step.runs for step in each), _sizes(each), *_costs(each)) for told, each in alike.items()
    ]
    rows.append((f"all, for {tokens:,} tokens", "", "", *_costs(done)))
    return Table(("step", "runs", "sizes", "FLOPs", "bytes", "backward FLOPs"), tuple(rows))


def _costs(each: Iterable[CountedStep]) -> tuple[int, int, int]:
    """FLOPs, bytes and FLOPs of the backward pass, of all runs."""
    each = tuple(each)
    return (
        sum(step.flops * step.runs for step in each),
        sum(step.bytes * step.runs for step in each),
        sum(step.backward * step.runs for step in each),
    )


def _sizes(each: list[CountedStep]) -> str:
    return ", ".join(f"{mode} {span_of({dict(step.sizes)[mode] for step in each})}" for mode, _ in each[0].sizes)
