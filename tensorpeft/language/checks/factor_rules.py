"""Checks of what is said of the factors: where their numbers come from, how the update starts; of the target and training."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set

from tensorpeft.language import names
from tensorpeft.language.checks.calls import arithmetic, constant, signature
from tensorpeft.language.checks.start import dead_factors, nonzero_products, origin
from tensorpeft.language.errors import Problem, did_you_mean, listing, unknown
from tensorpeft.language.keywords import DECOMPOSITIONS, INITIALISERS, LAYER
from tensorpeft.language.nodes import MappingNode
from tensorpeft.language.spec import BASE_WEIGHT, INPUT, SIDES, SITE_MODES, STRUCTURAL_MODES, Spec
from tensorpeft.language.syntax import Call, Expression, Name, Product, Spectral

_SIDE_OF = {"U": "d_out", "Q": "d_out", "V": "d_in", "R": "d_in"}  # what parts of decompositions carry beside the bond


def initialisers(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """Every initialiser is known, and is given what it takes."""
    modes = names.first_modes(spec)
    for name, rule in spec.factors:
        if isinstance(rule.init, Spectral):
            yield from _spectral(spec, name, modes[name], rule.init)
        elif rule.init.name in INITIALISERS:
            problems = list(signature(rule.init, INITIALISERS[rule.init.name]))
            yield from problems or _call(spec, name, modes, rule.init)
        elif rule.init.name in DECOMPOSITIONS:
            message = f"`{rule.init}` is a decomposition; expected a part of it, such as"
            yield Problem(f"{message} `{rule.init}.{DECOMPOSITIONS[rule.init.name][0]}[:r]`", rule.init.span)
        else:
            yield Problem(unknown("initialiser", rule.init.name, INITIALISERS), rule.init.span)


def _call(spec: Spec, name: str, modes: dict[str, tuple[str, ...]], init: Call) -> Iterator[Problem]:
    free = [mode for mode in modes[name] if mode not in SITE_MODES]
    own = {LAYER} & names.atoms(spec, modes[name])
    if LAYER in init.names - own:
        message = f"`{init}` speaks of the layer, and `{name}` is shared by the layers"
        yield Problem(f"{message}; expected `{name}[{LAYER}, ...]`", init.span)
        return
    match init.name:
        case "kaiming_uniform":
            yield from _kaiming(name, modes[name], init)
        case "start":
            yield from _start(spec, name, modes, init)
        case "formula":
            yield from _formula(name, tuple(mode for mode in free if not names.is_bound(spec, mode)), own, init)
        case "orthogonal" | "identity" if len(free) < 2:
            found = f"`{name}` carries {listing(free) or 'none'} that is not bound to sites"
            yield Problem(f"`{init}` is over two modes, and {found}; expected two of them", init.span)
        case "constant" | "uniform" | "normal":
            problems = list(arithmetic(init.args[0], names.sizes(spec)))
            yield from problems or _drawn(init, init.args[0])


def _kaiming(name: str, modes: tuple[str, ...], init: Call) -> Iterator[Problem]:
    for key, value in init.options:
        if key == "fan" and not (isinstance(value, Name) and value.name in modes):
            message = f"`fan` is `{value}`; expected a mode of `{name}`, one of {listing(modes)}"
            yield Problem(message, value.span)
        elif key == "a":
            yield from filter(None, constant(value)[1:])


def _drawn(init: Call, value: Expression) -> Iterator[Problem]:
    if value.names:
        return
    number, error = constant(value)
    if error:
        yield error
    elif init.name in ("uniform", "normal"):
        if number <= 0:
            yield Problem(f"`{init}` draws nothing; expected a {INITIALISERS[init.name].values[0]} above 0", init.span)
    elif number == 0:
        yield Problem(f"`{init}` is `zeros`; expected that name", init.span)


def _formula(name: str, modes: tuple[str, ...], own: Set[str], init: Call) -> Iterator[Problem]:
    """A formula speaks of the indices of the factor's modes, and of its layer."""
    if not modes:
        message = f"`{name}` carries no mode whose indices a formula could be of"
        yield Problem(f"{message}; expected `constant(...)` for a single number", init.span)
        return
    problems = list(arithmetic(init.args[0], (*modes, *own), modes))
    yield from problems or _drawn(init, init.args[0])


def _start(spec: Spec, name: str, modes: dict[str, tuple[str, ...]], init: Call) -> Iterator[Problem]:
    """A copy is of another factor with the same modes."""
    others = {other: mine for other, mine in modes.items() if other not in (name, BASE_WEIGHT)}
    (value,) = init.args
    if not isinstance(value, Name) or value.name not in others:
        found = f"`{init}` is of `{value}`, which is no other factor"
        hint = did_you_mean(str(value), others) or f"; the update has {listing(others) or 'no other'}"
        yield Problem(f"{found}{hint}", value.span)
    elif origin(name, {other: rule.init for other, rule in spec.factors}) is None:
        yield Problem(f"`{name}` starts as `{value}`, which leads back to it or to no factor", init.span)
    elif others[value.name] != modes[name]:
        message = f"`{name}` carries {listing(modes[name])}, and `{value}` {listing(others[value.name])}"
        yield Problem(f"{message}; expected the same modes in the same order", init.span)


def _spectral(spec: Spec, name: str, modes: tuple[str, ...], init: Spectral) -> Iterator[Problem]:
    """A part of a decomposition has a bond that is cut, and the modes of its side; each site has its own."""
    bond, side = init.bond, _SIDE_OF.get(init.part)
    by_heads = {*STRUCTURAL_MODES} - names.side_parts(spec.modes)
    ours = {bond} | (names.made_of(spec, side) | by_heads if side else set())
    wrong = [mode for mode in modes if mode not in ours and not names.is_bound(spec, mode)]
    if bond not in modes:
        hint = did_you_mean(bond, {*modes} & {*names.bonds(spec)}) or f"; it carries {listing(modes)}"
        yield Problem(f"`{init}` is cut to `{bond}`, which `{name}` does not carry{hint}", init.span)
    elif bond not in names.bonds(spec):
        message = f"`{init}` is cut to `{bond}`, which is no bond"
        yield Problem(f"{message}; expected one with a size under `rank`", init.span)
    elif wrong:
        has = f"`{side}` and `{bond}`" if side else f"`{bond}` alone"
        message = f"`{init.decomposition}(W).{init.part}` has {has}, and `{name}` carries {listing(wrong)}"
        yield Problem(f"{message}; expected no other modes but those bound to sites", init.span)
    elif side and not {*modes} & (ours - {bond}):
        yield Problem(f"`{init}` is of `{side}`, and `{name}` carries nothing of it; expected `{side}`", init.span)
    elif not names.atoms(spec, modes) & {*SITE_MODES}:
        message = f"`{init}` differs from site to site, and `{name}` carries none of {listing(SITE_MODES)}"
        yield Problem(f"{message}; expected `{name}[matrix, layer, ...]`", init.span)


def stored_factors(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """Only a frozen factor is stored by choice, and only a trained one has a learning rate."""
    for name, rule in spec.factors:
        if rule.stored and not rule.frozen:
            message = f"`{name}` is trained, so it is stored in any case; expected `stored` for frozen factors only"
            yield Problem(message, rule.span)
        if rule.frozen and "lr" in table.table("factors").table(name):
            message = f"`{name}` is frozen, so `lr` has no effect; expected it for trained factors only"
            yield Problem(message, table.table("factors").place(name, "lr"))


def magnitudes(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """A factor over a norm is trained and whole, has a norm for each site, along one side, and starts from it."""
    carried = names.first_modes(spec)
    for name, rule in spec.factors:
        if not rule.norm:
            continue
        sides = [mode for mode in carried[name] if mode not in SITE_MODES]
        if len(sides) != 1 or sides[0] not in SIDES or not {"matrix", "layer"} <= {*carried[name]}:
            message = f"`{name}` is over the norms of W + dW, and carries {listing(carried[name])}"
            yield Problem(f"{message}; expected `matrix`, `layer` and one of {listing(SIDES)}", rule.span)
        elif spec.policy(sides[0]) == "group":
            yield Problem(f"`{name}` is over the norms of W + dW, which the policy `group` cannot share", rule.span)
        said = table.table("factors").table(name)
        unfit = ["init"] * ("init" in said) + ["frozen"] * rule.frozen
        unfit += ["mask"] * any(mask.factor == name for mask in spec.masks) + ["tasks"] * (spec.tasks is not None)
        if unfit:
            message = f"`{name}` has `norm`: it is trained from the norms of W + dW, one for each row or column"
            yield Problem(f"{message}; expected no `{unfit[0]}`", rule.span)


def trained(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """Something is trained."""
    if spec.factors and all(rule.frozen for _, rule in spec.factors) and not spec.train:
        yield Problem("every factor is frozen, so nothing is trained; expected a factor that is not", spec.update.span)


def start(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """Zero at the start with every factor able to move, or a declared start that is not zero."""
    dead, moving = dead_factors(spec), {*nonzero_products(spec)}
    for product in spec.update.products:
        stuck = [reference.factor for reference in product.factors if reference.factor in dead]
        if len(stuck) == 1:
            message = f"`{stuck[0]}` is zero and frozen, so its product stays zero"
            yield Problem(f"{message}; expected it to be trained, or another `init`", product.span)
        elif stuck:
            message = f"the product has {len(stuck)} zero factors, {listing(stuck)}, so none would ever get a gradient"
            yield Problem(f"{message}; expected one", product.span)
        elif product in moving and spec.start == "zero":
            yield Problem(_not_zero(spec, product), product.span)
    if spec.start != "zero" and spec.update.products and not moving:
        yield Problem(f"`start` is `{spec.start}`, but every product starts at zero", table.where("start"))


def _not_zero(spec: Spec, product: Product) -> str:
    factors = dict.fromkeys(reference.factor for reference in product.factors)
    own = [name for name in factors if name != BASE_WEIGHT and not spec.factor(name).frozen]
    candidates = f"one of {listing(own)}" if len(own) > 1 else listing(own) or "a factor of its own"
    ways = f"expected `init: zeros` for {candidates}, `start: subtract` or `start: nonzero`"
    return f"this product does not start at zero; {ways}"


def patterns(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """The braces of a pattern name the layer or the matrix."""
    for entry in (*spec.target.matrices, *spec.target.exclude):
        bare = re.sub(r"\{(layer|matrix)\}", "", entry)
        if "{" in bare or "}" in bare:
            span = spec.target.span(entry)
            yield Problem(f"`{entry}` has braces around something else; expected `{{layer}}` or `{{matrix}}`", span)


def dropout(spec: Spec, table: MappingNode) -> Iterator[Problem]:
    """`dropout` names the input of the sites, or bonds."""
    carried = names.carried(spec)
    bonds = [bond for bond in names.bonds(spec) if bond in carried]
    for name, _ in spec.dropout:
        span = table.place("dropout", name)
        if name == INPUT and INPUT in bonds:
            message = f"`{INPUT}` under `dropout` is the input of a site, and it is a bond here"
            yield Problem(f"{message}; expected another name for the bond", span)
        elif name == INPUT and not spec.update.products:
            yield Problem("there is no update whose input could be dropped; expected no `dropout`", span)
        elif name not in (INPUT, *bonds):
            hint = did_you_mean(name, bonds) or f"; expected one of {listing((INPUT, *bonds))}"
            yield Problem(f"`dropout` speaks of `{name}`, which is no bond{hint}", span)
