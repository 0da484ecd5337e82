"""The update of a spec in one form: written out, given as a shorthand, or less its own start.

``structure: matrix | cp | tucker | tt`` -> the update it stands for.

With the modes a spec lists (by default ``matrix, layer, d_out, d_in``, and ``task`` in front where there are tasks):

- ``matrix``: ``B[..., outputs, r] * A[..., r, inputs]``, one pair for every value of the remaining modes: LoRA's form;
- ``cp``: a factor ``A_<mode>[mode, r]`` for each mode, all summed over the one bond ``r``;
- ``tucker``: a core ``G[r_<mode>, ...]`` over one bond per mode, and ``A_<mode>[mode, r_<mode>]``;
- ``tt``: a chain of cores ``G_<mode>[r1, mode, r2]`` in the order of the modes; the bonds are ``r1``, ``r2``, ...

The factor that starts at zero carries the output: ``B``, or that of ``head_dim`` if listed, else of the last output
mode.

``start: subtract`` is the update less what it is at the start, so that it starts at zero: every product that is not zero there
is written once more with the opposite sign, and each factor that it trains is replaced by a frozen copy of its first numbers:
``B * A`` becomes ``B * A - B0 * A0``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tensorpeft.language.checks.start import nonzero_products, origin
from tensorpeft.language.choices import entries
from tensorpeft.language.diagnostics import Findings
from tensorpeft.language.errors import clip, did_you_mean, fail, listing
from tensorpeft.language.grammar import MAX_NAME, checked_update, parse_definition, parse_update
from tensorpeft.language.keywords import KAIMING, LINEAR, TASK_MODE, ZEROS
from tensorpeft.language.names import no_factor
from tensorpeft.language.nodes import MappingNode, Scalar
from tensorpeft.language.source import Span
from tensorpeft.language.spec import BASE_WEIGHT, SIDES, FactorRule, Spec
from tensorpeft.language.syntax import Call, Definition, Name, Product, Reference, Spectral, Update


@dataclass(frozen=True)
class WrittenUpdate:
    """The update, the bonds that a rank without a name sizes, and how the factors begin if nothing else is said."""

    update: Update
    definitions: tuple[Definition, ...] = ()
    bonds: tuple[str, ...] = ("r",)
    inits: dict[str, Call] = field(default_factory=dict)

    @property
    def factors(self) -> dict[str, Reference]:
        """The factors in order, each with its first reference; the base weight left out."""
        found: dict[str, Reference] = {}
        for reference in self.update.references:
            if reference.factor != BASE_WEIGHT:
                found.setdefault(reference.factor, reference)
        return found


def read_update(table: MappingNode, findings: Findings) -> WrittenUpdate | None:
    """The form that a table gives, or None where it cannot be told; the findings say why."""
    update, structure = table.get("update"), table.scalar("structure")
    if update and structure:
        message = "`update` and `structure` both say what the update is; expected one of them"
        findings.add("update", message, table.where("update"))
    elif not update and not structure and not findings.spoiled & {"update", "structure"} and "train" not in table:
        findings.add("update", "`update` is missing; expected `update:` or `structure:`", table.where("update"))
    definitions: tuple[Definition, ...] = ()
    for entry in table.scalars("modes"):
        with findings.under("modes"):
            definitions += (parse_definition(entry),)
    if findings.spoiled & {"update", "structure"}:
        return None
    if not structure:
        return _written(definitions, table, findings)
    with findings.under("structure"):
        if not findings.spoiled & {"modes", "tasks"}:
            return _shared(_shorthand(structure, definitions, table, findings), table, findings)
    return None


def known_factor(factor: Scalar, form: WrittenUpdate, key: str, findings: Findings) -> Reference | None:
    """The reference of a factor that the spec speaks of; a finding under ``key`` if the update lacks it."""
    if message := no_factor(factor.text, form.factors):
        findings.add(key, message, factor.span)
    return form.factors.get(factor.text)


def _written(definitions: tuple[Definition, ...], table: MappingNode, findings: Findings) -> WrittenUpdate | None:
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
    return WrittenUpdate(update, tuple(definition for definition in definitions if definition.parts))


def _shorthand(
    structure: Scalar, definitions: tuple[Definition, ...], table: MappingNode, findings: Findings
) -> WrittenUpdate:
    span = table.where("modes") if "modes" in table else structure.span
    names = (*[TASK_MODE] * ("tasks" in table), "matrix", "layer", "d_out", "d_in")
    listed = _listed(definitions or tuple(Definition(name, (), span) for name in names), span)
    form = _expanded(structure.text, listed, span)
    form = replace(form, definitions=tuple(definition for definition in definitions if definition.parts))
    sizes = table.table("rank")
    given = form.bonds if table.scalar("rank") or "budget" in sizes else tuple(sizes)
    unsized = [bond for bond in form.bonds if bond not in given]
    if unsized and "rank" not in findings.spoiled:
        place = table.where("rank") if "rank" in table else structure.span
        findings.add("rank", f"`structure: {structure.text}` needs the rank of {listing(unsized)}", place)
    return form


def _shared(form: WrittenUpdate, table: MappingNode, findings: Findings) -> WrittenUpdate:
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

    (product,) = form.update.products
    product = replace(product, factors=tuple(map(shared, product.factors)))
    return replace(form, update=replace(form.update, products=(product,)))


_OUTPUTS = ("d_out", "head", "head_dim")
_INPUTS = ("d_in", "width")


class _Listed(NamedTuple):
    """The modes of a shorthand in their order, each with its place, and which of them are output and input."""

    modes: dict[str, Span | None]
    outputs: set[str]
    inputs: set[str]


def _listed(entries: tuple[Definition, ...], span: Span | None) -> _Listed:
    """The modes that a shorthand lists.

    A side that is defined by parts stands for its parts; a fused mode stands for itself.
    """
    modes: dict[str, Span | None] = {}
    parts: dict[str, set[str]] = {"d_out": set(_OUTPUTS), "d_in": set(_INPUTS)}
    for entry in entries:
        split = entry.name in SIDES and entry.parts
        if split:
            parts[entry.name].update(part.name for part in entry.parts)
        for name in [part.name for part in entry.parts] if split else [entry.name]:
            if name in modes:
                raise fail(f"mode `{name}` is listed twice", entry.span)
            modes[name] = entry.span
    outputs, inputs = parts["d_out"] & modes.keys(), parts["d_in"] & modes.keys()
    if not outputs or not inputs:
        side, example = ("output", "`d_out`") if not outputs else ("input", "`d_in`")
        message = f"`modes` lists no {side} mode; expected {example}, its parts, or `head`, `head_dim` and `width`"
        raise fail(message, span)
    return _Listed(modes, outputs, inputs)


def _expanded(structure: str, listed: _Listed, span: Span | None) -> WrittenUpdate:
    """The update of a structure over these modes; ``span`` is where a fault of the whole is shown."""
    modes = listed.modes
    bonds: tuple[str, ...] = ("r",)
    match structure:
        case "matrix":
            outputs, inputs = ([mode for mode in modes if mode in side] for side in (listed.outputs, listed.inputs))
            common = [mode for mode in modes if mode not in (*outputs, *inputs)]
            references = [Reference("B", (*common, *outputs, "r"), span), Reference("A", (*common, "r", *inputs), span)]
        case "cp":
            references = [Reference(f"A_{mode}", (mode, "r"), place) for mode, place in modes.items()]
        case "tucker":
            bonds = tuple(f"r_{mode}" for mode in modes)
            sides = (Reference(f"A_{mode}", (mode, f"r_{mode}"), place) for mode, place in modes.items())
            references = [Reference("G", bonds, span), *sides]
        case _:  # tt
            bonds = tuple(f"r{number}" for number in range(1, len(modes)))
            # each core has the bond before it and the one after it, but for the ends
            cores = ((mode, bonds[max(0, at - 1) : at], bonds[at : at + 1]) for at, mode in enumerate(modes))
            references = [Reference(f"G_{mode}", (*left, mode, *right), modes[mode]) for mode, left, right in cores]
    last = "head_dim" if "head_dim" in modes else [mode for mode in modes if mode in listed.outputs][-1]
    other = LINEAR if structure == "matrix" else KAIMING
    inits = {reference.factor: ZEROS if last in reference.modes else other for reference in references}
    return WrittenUpdate(Update((Product(tuple(references), span=span),), span), bonds=bonds, inits=inits)


def subtract(spec: Spec) -> Spec:
    """The spec with its first update subtracted, if it says so."""
    if spec.start != "subtract":
        return spec
    rules = dict(spec.factors)
    copies: dict[str, str] = {}
    for name, rule in spec.factors:
        if not rule.frozen:
            copies[name] = _new_name(name, rules)
            rules[copies[name]] = _copy(name, spec)
    products: dict[object, list[Product]] = {}
    for product in spec.update.products:
        products.setdefault(product.at, []).append(product)
    for product in nonzero_products(spec):
        references = (replace(ref, factor=copies.get(ref.factor, ref.factor)) for ref in product.factors)
        products[product.at].append(replace(product, factors=tuple(references), sign=-product.sign))
    written = Update(tuple(product for group in products.values() for product in group), spec.update.span)
    update = checked_update(written, "update with what `start: subtract` adds")
    carried = dict.fromkeys(reference.factor for reference in update.references)
    factors = tuple((name, rules[name]) for name in carried if name in rules)
    return replace(spec, update=update, factors=factors, start="zero")


def _new_name(name: str, taken: dict[str, FactorRule]) -> str:
    copy = f"{name}0"
    while copy in taken:
        copy += "0"
    if len(copy) > MAX_NAME:
        message = f"`{clip(copy)}`, the frozen copy of `{clip(name)}`, has a name of more than {MAX_NAME} characters"
        raise fail(f"{message}; expected a shorter name for the factor", taken[name].span)
    return copy


def _copy(name: str, spec: Spec) -> FactorRule:
    inits = {factor: rule.init for factor, rule in spec.factors}
    first = origin(name, inits)
    stored = first is not None and isinstance(inits[first], Spectral)
    return FactorRule(Call("start", (Name(name),)), frozen=True, stored=stored, span=spec.factor(name).span)
