"""Candidate orders of contraction: which factors the activation meets one after the other, and which are multiplied before.

This is the only module that asks opt_einsum for a path.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache

from tensorpeft.language.spec import SITE_MODES
from tensorpeft.network.network import Term
from tensorpeft.network.rank import distances, minimum_cut

TOKEN = "<token>"  # no spec can name a mode like this
# the two tensors of each step: inputs from 0 on, then what the steps before have made
Path = tuple[tuple[int, int], ...]
Order = tuple[tuple[int, ...], ...]  # which operands form each link, in the order of the links
_SHORT = 5  # links up to which every way to join neighbours is a candidate
_FEW, _MANY = 5, 16  # operands up to which the best path is searched exhaustively, or by dynamic programming


def orders(term: Term, tokens: int, dropped: frozenset[str]) -> tuple[Order, ...]:
    """Candidate orders of one product, such that the activation carries every bond of ``dropped``."""
    found = dict.fromkeys(_candidates(term, tokens))
    if dropped:
        found.update(dict.fromkeys((_one_by_one(term), *(o for b in sorted(dropped) for o in _halves(term, {b})))))
    return tuple(order for order in found if dropped <= carried(term, order))


def carried(term: Term, order: Order) -> set[str]:
    """The modes that the activation carries between two links."""
    modes = [{mode for i in link for mode in term.operands[i].modes} for link in order]
    return {mode for n in range(1, len(order)) for mode in set().union(*modes[:n]) & set().union(*modes[n:])}


def _candidates(term: Term, tokens: int) -> Iterator[Order]:
    everything = tuple(range(len(term.operands)))
    yield (everything,)
    if len(everything) <= 2:  # these are all orders that there are
        yield from itertools.permutations([(i,) for i in everything])
        return
    yield from _halves(term, _minimum_cut(term))
    for number in dict.fromkeys((tokens, 1, 1 << 30)):
        yield from _coarser(_lineage(_path(term, number), len(everything)))


def _minimum_cut(term: Term) -> tuple[str, ...]:
    """The minimum cut, which does not depend on the tokens: one serves the plans for all lengths."""
    shape = (*(operand.modes for operand in term.operands), term.d_in, term.d_out, *term.sizes.items())
    if shape not in _cuts:
        _cuts[shape] = minimum_cut(term)
    return _cuts[shape]


_cuts: dict[tuple[object, ...], tuple[str, ...]] = {}


def _coarser(order: Order) -> Iterator[Order]:
    """An order, and those in which links that follow each other are one; of a long one, those in which one run of links is."""
    n = len(order)
    if n <= _SHORT:
        cuts = [[i + 1 for i in range(n - 1) if chosen >> i & 1] for chosen in range(1 << (n - 1))]
    else:
        runs_of_links = itertools.combinations(range(n + 1), 2)
        cuts = [[i for i in range(1, n) if not first < i < last] for first, last in runs_of_links]
    for cut in sorted(cuts, key=len, reverse=True):
        runs = zip([0, *cut], [*cut, n], strict=True)
        yield tuple(tuple(sorted(i for link in order[start:stop] for i in link)) for start, stop in runs)


def _halves(term: Term, cut: Iterable[str]) -> Iterator[Order]:
    """The factors on the input's side of a cut, and the others. At the minimum cut this is the pair (L, R) of the normal form."""
    reached = distances(term, {*cut, *SITE_MODES, "task"})
    left = tuple(i for i in range(len(term.operands)) if i in reached)
    right = tuple(i for i in range(len(term.operands)) if i not in reached)
    if left and right:
        yield left, right


def _one_by_one(term: Term) -> Order:
    """Every factor by itself, the nearest to the input first."""
    reached = distances(term, {*SITE_MODES, "task"})
    return tuple((i,) for i in sorted(range(len(term.operands)), key=lambda i: (reached.get(i, 1 << 30), i)))


def activation(term: Term) -> tuple[str, ...]:
    """The modes of the input: the task of its row where one counts, the token, and the features."""
    tasks = ("task",) if any("task" in operand.modes for operand in term.operands) else ()
    return (*tasks, TOKEN, *term.d_in)


def _path(term: Term, tokens: int) -> Path:
    """The path for the activation (operand 0) and the factors at one site."""
    x = activation(term)
    output = (*(mode for mode in x if mode not in term.d_in), *term.d_out)
    sizes = {**term.sizes, TOKEN: tokens, "task": 1}
    return contract_path([x, *(operand.modes for operand in term.operands)], output, sizes, few=7)[0]


def contract_path(
    inputs: Sequence[tuple[str, ...]], output: tuple[str, ...], sizes: Mapping[str, int], *, few: int = _FEW
) -> tuple[Path, int]:
    """The cheapest path that opt_einsum finds through tensors of these modes, and its FLOPs."""
    from opt_einsum import get_symbol  # late, as in `_search`

    known = dict.fromkeys(mode for each in inputs for mode in each)
    letter = {mode: get_symbol(number) for number, mode in enumerate(known)}
    left, right = (["".join(letter[mode] for mode in each) for each in group] for group in (inputs, [output]))
    shapes = tuple(tuple(sizes[mode] for mode in each) for each in inputs)
    return _search(f"{','.join(left)}->{right[0]}", shapes, len(shapes) <= few)


@cache
def _search(equation: str, shapes: tuple[tuple[int, ...], ...], exhaustive: bool) -> tuple[Path, int]:
    """The better of two searches: by itself neither finds the best path always."""
    import opt_einsum  # late: it brings every backend that it knows, and a count needs no path
    from opt_einsum.paths import linear_to_ssa

    searches = ("optimal" if exhaustive else "auto", "dp" if len(shapes) <= _MANY else "auto-hq")
    found = [opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=search) for search in searches]
    path, info = min(found, key=lambda each: int(each[1].opt_cost))
    return tuple((one, other) for one, other in linear_to_ssa(path)), int(info.opt_cost)


def _lineage(path: Path, n_factors: int) -> Order:
    """The operands that the activation meets, in order, along a path whose operand 0 is the activation."""
    made: list[tuple[int, ...]] = [(-1,), *((i,) for i in range(n_factors))]
    met: list[tuple[int, ...]] = []
    for step in path:
        merged = [made[i] for i in step]
        if (-1,) in merged:
            met += [operands for operands in merged if operands != (-1,)]
            made.append((-1,))
        else:
            made.append(tuple(sorted(i for operands in merged for i in operands)))
    return tuple(met)
