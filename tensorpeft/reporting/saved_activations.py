"""The activations that an adapter saves for its backward pass."""

from __future__ import annotations

from math import prod

from tensorpeft.planning.chain import SITE
from tensorpeft.planning.cost import prologue_key
from tensorpeft.planning.orders import TOKEN
from tensorpeft.planning.plan import Plan
from tensorpeft.planning.shared_inputs import input_of


def kept_per_token(plan: Plan) -> int:
    """Numbers per token: the activation before every trained link, whose gradient needs it.

    All sites that read an input keep it once, and once what they have in common behind their first links. Where masks leave
    some columns of an input alone, these are kept instead. The input counts even where the base keeps it too; the masks of
    dropout do not count.
    """
    kept: dict[object, int] = {}
    for number, each in enumerate(plan.sets):
        for bundle in each.bundles:
            planned = plan.groups[bundle.group]
            first = planned.group.sites[bundle.sites[0]]
            for product, (chain, term) in enumerate(zip(planned.chains, planned.group.terms, strict=True)):
                sizes = {**term.sizes, TOKEN: 1, "task": 1, SITE: len(bundle.sites)}
                whole = term.columns is None
                source = (planned.group.at == "output", *input_of(first))
                common = {0: source, 1: (number, prologue_key(term, chain.links[0]))} if whole else {}
                for at, link in enumerate(chain.links):
                    if link.trainable:
                        key = common.get(at, (number, bundle.group, product, at))
                        kept[key] = prod(sizes[mode] for mode in link.before)
    return sum(kept.values())
