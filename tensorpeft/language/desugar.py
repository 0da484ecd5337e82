"""The update of a spec, written out or given as a shorthand, read into one form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from tensorpeft.language.choices import entries
from tensorpeft.language.diagnostics import Findings
from tensorpeft.language.errors import did_you_mean, listing
from tensorpeft.language.grammar import parse_definition, parse_update
from tensorpeft.language.nodes import Scalar, Table
from tensorpeft.language.shorthand import expand, layout
from tensorpeft.language.spec import BASE_WEIGHT
from tensorpeft.language.syntax import Call, Definition, Reference, Update


@dataclass(frozen=True)
class Form:
    """The update, the bonds that a rank without a name sizes, and how the factors begin if nothing else is said."""

    update: Update
    definitions: tuple[Definition, ...] = ()
    bonds: tuple[str, ...] = ("r",)
    inits: dict[str, Call] = field(default_factory=dict)

    @property
    def factors(self) -> dict[str, Reference]:
        """The factors in order, each with its first reference; the base weight left out."""
        found: dict[str, Reference] = {}
        for product in self.update.products:
            for reference in product.factors:
                found.setdefault(reference.factor, reference)
        found.pop(BASE_WEIGHT, None)
        return found


def read_form(table: Table, findings: Findings) -> Form | None:
    """The form that a table gives, or None where it cannot be told; the findings say why."""
    update, structure = table.get("update"), table.scalar("structure")
    if update and structure:
        message = "`update` and `structure` both say what the update is; expected one of them"
        findings.add("update", message, table.where("update"))
    elif not update and not structure and not findings.spoiled & {"update", "structure"} and "train" not in table:
        findings.add("update", "`update` is missing; expected `update:` or `structure:`", table.where("update"))
    definitions = tuple(_definitions(table, findings))
    if findings.spoiled & {"update", "structure"}:
        return None
    if not structure:
        return _written(definitions, table, findings)
    with findings.under("structure"):
        if not findings.spoiled & {"modes", "tasks"}:
            return _shared(_shorthand(structure, definitions, table, findings), table, findings)
    return None


def known_factor(factor: Scalar, form: Form, key: str, findings: Findings) -> Reference | None:
    """The reference of a factor that the spec speaks of; a finding under ``key`` if the update lacks it."""
    if factor.text == BASE_WEIGHT:
        findings.add(key, f"`{BASE_WEIGHT}` is the base weight, of which nothing is said here", factor.span)
    elif factor.text not in form.factors:
        hint = did_you_mean(factor.text, form.factors) or f"; the update has {listing(form.factors) or 'none'}"
        findings.add(key, f"unknown factor `{factor.text}`{hint}", factor.span)
    return form.factors.get(factor.text)


def _definitions(table: Table, findings: Findings) -> Iterator[Definition]:
    for entry in table.scalars("modes"):
        with findings.under("modes"):
            yield parse_definition(entry)


def _written(definitions: tuple[Definition, ...], table: Table, findings: Findings) -> Form | None:
    for definition in definitions:
        if not definition.parts:
            message = f"found the mode `{definition}` alone; beside `update:`, `modes` lists definitions"
            findings.add("modes", f"{message} such as `slot = layer * matrix`", definition.span)
    if "share" in table:
        message = "`share` belongs to `structure:`; beside `update:`, leave the mode out of the factor instead"
        findings.add("share", message, table.where("share"))
    written, products = table.get("update"), []
    for selector, text in entries(written, "update", findings):
        with findings.under("update"):
            products += [replace(product, at=selector) for product in parse_update(text).products]
    if "update" in findings.spoiled:
        return None
    update = Update(tuple(products), written.span if written else table.where("train"))
    return Form(update, tuple(definition for definition in definitions if definition.parts))


def _shorthand(structure: Scalar, definitions: tuple[Definition, ...], table: Table, findings: Findings) -> Form:
    span = table.where("modes") if "modes" in table else structure.span
    modes = layout(definitions or None, "tasks" in table, span)
    expansion = expand(structure.text, modes, span)
    sizes = table.table("rank")
    given = expansion.bonds if table.scalar("rank") or "budget" in sizes else tuple(sizes)
    unsized = [bond for bond in expansion.bonds if bond not in given]
    if unsized and "rank" not in findings.spoiled:
        place = table.where("rank") if "rank" in table else structure.span
        findings.add("rank", f"`structure: {structure.text}` needs the rank of {listing(unsized)}", place)
    return Form(expansion.update, modes.definitions, expansion.bonds, expansion.inits)


def _shared(form: Form, table: Table, findings: Findings) -> Form:
    """The form with the modes left out that ``share:`` names."""
    left_out: dict[str, set[str]] = {}
    for factor, _ in table.table("share").items:
        reference = known_factor(factor, form, "share", findings)
        for mode in table.table("share").scalars(factor.text) if reference else ():
            left_out.setdefault(factor.text, set()).add(mode.text)
            if reference and mode.text not in reference.modes:
                message = f"`{reference}` carries no mode `{mode.text}` to be shared over"
                findings.add("share", message + did_you_mean(mode.text, reference.modes), mode.span)

    def shared(reference: Reference) -> Reference:
        out = left_out.get(reference.factor, ())
        return replace(reference, modes=tuple(mode for mode in reference.modes if mode not in out))

    products = (replace(p, factors=tuple(map(shared, p.factors))) for p in form.update.products)
    return replace(form, update=replace(form.update, products=tuple(products)))
