"""The cost of a chain: arithmetic and memory traffic of the forward pass, of the backward pass, and of the prologue.

One number compares candidates: FLOPs + (bytes + kernels * launch) * balance, where a regime's balance says how many FLOPs a
machine does while it moves a byte, and its launch how many bytes while it starts a kernel. Counted are

- forward, for each link: the activation and the tensor read, the new activation written (the last is the base's output, read
  and written);
- backward, for each link: the same contraction for the activation's gradient, once more for the tensor's if it is trained,
  and then the activation that had to be kept for it;
- the prologue: the arithmetic of building a tensor, three times if it is trained, and the tensor written and read.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

from tensorpeft.network.network import Group, Term
from tensorpeft.planning.chain import SITE, Bundles, Chain, Link
from tensorpeft.planning.orders import TOKEN
from tensorpeft.planning.regime import Regime

Built = set[tuple[object, ...]]  # keys of the tensors that a prologue has made already


@dataclass(frozen=True)
class Cost:
    """FLOPs of a whole network's forward pass, and the number that candidates are compared by."""

    flops: int  # forward, prologue included
    weight: float  # forward and backward, where the regime has one


def chain_cost(group: Group, term: Term, chain: Chain, bundles: Bundles, regime: Regime, built: Built) -> Cost:
    """The cost of a chain at all sites of a group; tensors that are ``built`` are free."""
    flops, weight = 0, 0.0
    for size, count in Counter(map(len, bundles)).items():
        for link in chain.links:
            runs = count * (1 if link.shared else size)
            flops += runs * link.site_flops
            weight += runs * (link.flops * _passes(link, regime) + _building(link, regime))
            weight += count * _moved(term, link, size, regime) * regime.number_bytes * regime.balance
            weight += count * _kernels(link, size, regime) * regime.launch * regime.balance
    for link in chain.links:
        if len(link.operands) == 1 or link.at_site or prologue_key(term, link) in built:
            continue
        flops += link.prologue_flops
        weight += link.prologue_flops * (3 if regime.gradients and link.trainable else 1)
        weight += (len(link.steps) + 1) * _passes(link, regime) * regime.launch * regime.balance
        made = copies(term, link) * term.size(link.modes) * (4 if regime.gradients and link.trainable else 2)
        weight += made * regime.number_bytes * regime.balance
    return Cost(flops, weight)


def prologue_key(term: Term, link: Link) -> tuple[object, ...]:
    """A key of the tensor that a link is: links of equal keys share one stack of the prologue."""
    operands = (term.operands[i] for i in link.operands)
    keys = ((o.block.name, o.modes, o.sizes, o.keys if o.site_modes else (), o.take) for o in operands)
    return link.pairs, link.modes, *keys


def copies(term: Term, link: Link) -> int:
    """For how many sites, or keys, the prologue builds a link."""
    return len({*zip(*(term.operands[i].keys for i in link.operands), strict=True)})


def _passes(link: Link, regime: Regime) -> int:
    """How often a link's work is done: forward, for the activation's gradient, and for the factors' own."""
    return 2 + link.trainable if regime.gradients else 1


def _building(link: Link, regime: Regime) -> int:
    """FLOPs at a site where a link is built: forward, again in the backward pass, and there twice more for its factors."""
    if not link.at_site:
        return 0
    return link.building * (2 + 2 * link.trainable if regime.gradients else 1)


def _kernels(link: Link, size: int, regime: Regime) -> int:
    """Kernels at one bundle of sites: one for each pass of a link, at the last link for each site."""
    last = not link.shared and SITE not in link.after
    built = len(link.steps) if link.at_site else 0
    return (size if last else 1) * (_passes(link, regime) + built * (4 if regime.gradients and link.trainable else 1))


def _moved(term: Term, link: Link, size: int, regime: Regime) -> int:
    """Numbers read and written by a link's steps at one bundle of sites; what is kept for the backward pass counts once more."""
    sizes = {**term.sizes, TOKEN: regime.tokens, "task": 1, SITE: size}
    last = not link.shared and SITE not in link.after
    times = size if last else 1
    source = prod(sizes[mode] for mode in link.before) * (times if last and SITE not in link.before else 1)
    result = prod(sizes[mode] for mode in link.after) * times
    tensor = term.size(link.modes) * (size if link.own else 1)
    forward, backward = source + tensor + result * (2 if last else 1), source + tensor + result
    if not regime.gradients:
        return forward
    kept = prod(sizes[mode] for mode in link.before)
    return forward + backward + link.trainable * (backward + kept)
