"""An explanation of a spec on a model: its network as a graph, its contraction step by step, its code."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from tensorpeft.network.graph import is_copy
from tensorpeft.planning.plan import Plan
from tensorpeft.reporting.counting import report_of
from tensorpeft.reporting.page import Listing, Page
from tensorpeft.reporting.panels import Panel, panels, sites_of, span_of
from tensorpeft.reporting.report import Report
from tensorpeft.reporting.steps import CountedStep, step_table, steps
from tensorpeft.reporting.table import Table

_NUMBERS = re.compile(r"\d+(?:, \d+)*")
_KINDS = {
    "input": "index of the input",
    "output": "index of the output",
    "bond": "bond, summed over",
    "site": "bound to a site",
    "task": "bound to a row of the batch",
}
_SAID = ("name", "model", "update", "scale", "alpha", "tokens")  # of the report
_COUNTED = ("flops_per_token", "flops_per_forward", "lora_rank", "factors")


@dataclass(frozen=True)
class Explanation(Page):
    """The costs of a spec, the graphs of its products, and what is done in a forward pass."""

    report: Report
    products: tuple[Panel, ...]
    steps: tuple[CountedStep, ...]
    code: tuple[Listing, ...]

    @property
    def title(self) -> str:
        return self.report.title

    @property
    def tables(self) -> tuple[Table, ...]:
        """Factors, the modes of each product, the steps."""
        return self.report.factor_table, *map(_modes, self.products), step_table(self.steps, self.report.tokens)

    @property
    def listings(self) -> tuple[Listing, ...]:
        """The code; functions that differ in numbers alone are told once."""
        alike: dict[str, list[Listing]] = {}
        for listing in self.code:
            alike.setdefault(_NUMBERS.sub("", f"{listing.caption} {listing.code}"), []).append(listing)
        more = "; and {} that differ in numbers alone"
        return tuple(
            Listing(first.caption + (more.format(len(others)) if others else ""), first.code)
            for first, *others in alike.values()
        )

    def to_data(self) -> dict[str, object]:
        report = self.report.to_data()
        return {
            **{key: report[key] for key in (*_SAID, *_COUNTED)},
            "products": [_product(panel) for panel in self.products],
            "steps": [asdict(step) for step in self.steps],
            "code": [asdict(listing) for listing in self.code],
        }


def explanation(plan: Plan, code: tuple[Listing, ...] = ()) -> Explanation:
    """All that there is to say of a plan; the code is what the runtime makes of it."""
    return Explanation(report_of(plan), panels(plan.network), steps(plan), code)


def _modes(panel: Panel) -> Table:
    rows = tuple(
        (
            mode,
            span_of(panel.sizes[mode]),
            ", ".join(panel.operands[at].factor for at in sorted(panel.graph.neighbors(mode))),
            _KINDS[kind] + ", copy tensor" * is_copy(panel.graph, mode) + ", in the minimum cut" * (mode in panel.cut),
        )
        for mode, kind in panel.graph.nodes(data="kind")
        if kind is not None
    )
    return Table((f"modes at {sites_of(panel.sites)}", "size", "of factors", "kind"), rows)


def _product(panel: Panel) -> dict[str, object]:
    """The graph of a product: its nodes of both kinds, and its edges."""
    return {
        "sites": [site.module for site in panel.sites],
        "sign": panel.sign,
        "factors": [operand.factor for operand in panel.operands],
        "modes": [
            {
                "name": mode,
                "kind": kind,
                "sizes": panel.sizes[mode],
                "copy": is_copy(panel.graph, mode),
                "minimum_cut": mode in panel.cut,
            }
            for mode, kind in panel.graph.nodes(data="kind")
            if kind is not None
        ],
        "edges": [(panel.operands[at].factor, mode) for at, mode in panel.edges],
    }
