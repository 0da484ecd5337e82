"""The number of trained parameters of a spec on a model, without its network; and the largest rank within a budget."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

from tensorpeft.language.errors import SpecError, fail
from tensorpeft.language.spec import Spec
from tensorpeft.language.syntax import Number
from tensorpeft.model.shape import Key, ModelShape
from tensorpeft.model.target import choose
from tensorpeft.network.checks import checked_stacks
from tensorpeft.network.mask_packing import FactorMasks, masking
from tensorpeft.network.mode_sizes import layout
from tensorpeft.network.scores import Scores
from tensorpeft.network.sharing import (
    FreeSizes,
    Layouts,
    Placed,
    Sharing,
    Users,
    refuse_ragged,
    serving_sizes,
    sharing_of,
    users_of,
)
from tensorpeft.network.site_classes import SiteClass
from tensorpeft.network.spectral import refuse_excess

MAX_RANK = 1 << 20


def n_trained(spec: Spec, model: ModelShape) -> int:
    """Count the numbers that an optimizer would see, those of the trained blocks, without building the network.

    Raises:
        SpecError: the spec does not fit the model.
    """
    sites = choose(spec.target, model)
    if not spec.update.products:
        return 0
    stacks = tuple(checked_stacks(spec, sites).values())
    scores = Scores(spec)
    return _counter(spec, model, stacks, scores)(fitted(spec, model, stacks, scores))


def fitted(spec: Spec, model: ModelShape, stacks: Sequence[Placed], scores: Scores) -> Spec:
    """The spec with the largest ranks whose trained numbers are within its budget; itself where it has none.

    Raises:
        SpecError: no rank is within it, or the rank changes no count.
    """
    if spec.budget is None:
        return spec
    count = _counter(spec, model, stacks, scores)
    top = min(spec.budget, MAX_RANK)  # each step of the rank adds at least one number
    counts = _gallop(lambda rank: _count_if_sized(count, spec, rank), spec.budget, top)
    least = counts[1]
    if len(counts) > 1 and set(counts.values()) == {least}:
        message = f"{least:,} numbers are trained at every rank, so a budget does not determine it"
        raise fail(f"{message}; expected a bond in a factor that is trained", spec.budget_span)
    fitting = [rank for rank, found in counts.items() if found is not None and found <= spec.budget]
    if not fitting:
        message = f"the budget is {spec.budget:,}, but rank 1 trains {least:,} numbers already"
        raise fail(f"{message}; expected a larger budget", spec.budget_span)
    low, high = fitting[-1], min(2 * fitting[-1], top + 1)  # the largest power of two that fits, and the next
    while high - low > 1:
        middle = (low + high) // 2
        found = _count_if_sized(count, spec, middle)
        low, high = (middle, high) if found is not None and found <= spec.budget else (low, middle)
    return _sized(spec, low)


def _gallop(count: Callable[[int], int | None], budget: int, top: int) -> dict[int, int | None]:
    """The counts of rank 1, 2, 4, ... up to where they have passed the budget: counts may fall before they rise."""
    found: dict[int, int | None] = {}
    for rank in (1 << power for power in range(max(1, top).bit_length())):
        found[rank] = now = count(rank)
        before = found.get(rank // 2)
        if now is None or (now > budget and before is not None and now > before):
            break
    return found


def _sized(spec: Spec, rank: int) -> Spec:
    """The spec whose free bonds have a rank."""
    given = tuple((bond, size) for bond, size in spec.ranks if bond not in spec.free)
    return replace(spec, ranks=(*given, *((bond, Number(rank)) for bond in spec.free)), budget=None, free=())


def _count_if_sized(count: Callable[[Spec], int], spec: Spec, rank: int) -> int | None:
    """The trained numbers at a rank; None where the rank is too large for the model's sizes."""
    try:
        return count(_sized(spec, rank))
    except SpecError:
        if rank == 1:
            raise
        return None


def _counter(spec: Spec, model: ModelShape, stacks: Sequence[Placed], scores: Scores) -> Callable[[Spec], int]:
    """A function that counts the trained numbers of the spec at other ranks; what ranks do not change is done once, here."""
    counters = [_of_stack(spec, model, placed, scores) for placed in stacks]
    return lambda sized: sum(count(sized) for count in counters)


def _of_stack(spec: Spec, model: ModelShape, placed: Placed, scores: Scores) -> Callable[[Spec], int]:
    present = tuple(dict.fromkeys(site_class for _, site_class in placed))
    uses = [sharing_of(spec, name, present) for name, _ in spec.factors]
    trained = [each for each in uses if not spec.factor(each.factor).frozen]
    shared = {each.factor: _shared(each, placed) for each in trained}

    def count(sized: Spec) -> int:
        layouts = {site_class: layout(sized, model, site_class) for site_class in present}
        total = 0
        for each in uses:
            refuse_ragged(sized, each, [each.sizes(site_class, layouts) for site_class in each.names])
            refuse_excess(sized, each, layouts)
        for each in trained:
            masks = masking(sized, each, layouts, scores)
            if masks is None:
                total += _whole(sized, each, shared[each.factor], layouts)
            else:
                total += _masked(masks, users_of(sized, each, placed, layouts))
        return total

    return count


def _shared(each: Sharing, placed: Placed) -> Counter[frozenset[SiteClass]]:
    """For each set of site classes, the number of keys of a factor that exactly these use."""
    users: dict[Key, set[SiteClass]] = defaultdict(set)
    for site, site_class in placed:
        if site_class in each.names:
            users[each.key(site)].add(site_class)
    return Counter(map(frozenset, users.values()))


def _whole(spec: Spec, each: Sharing, shared: Counter[frozenset[SiteClass]], layouts: Layouts) -> int:
    """The numbers in the blocks of a factor without masks."""
    total = 0
    for users, keys in shared.items():
        wanted = frozenset(each.sizes(site_class, layouts) for site_class in users)
        total += keys * sum(prod(sizes) for sizes in set(serving_sizes(spec, each, wanted).values()))
    return total


def _masked(masks: FactorMasks, users: dict[tuple[Key, FreeSizes], Users]) -> int:
    """The numbers that masks leave of a factor. Masks are drawn only where their rules do not tell the count."""
    total = 0
    for (key, sizes), sites in users.items():
        count = masks.count(sizes, sites)
        if count is None:
            kept = masks.kept(key, sizes, sites)
            axes = (size if axis is None else len(axis) for size, axis in zip(sizes, kept.axes, strict=True))
            count = prod(axes) if kept.entries is None else kept.entries.count
        total += count
    return total
