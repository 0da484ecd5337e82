"""The syntax trees of the small languages inside a spec: updates, mode definitions, calls, arithmetic.

Every node is frozen and carries the span it was read from; spans do not take part in comparisons, so two texts
with the same meaning are equal. ``str(node)`` is text that parses back to an equal node.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from tensorpeft.language.errors import did_you_mean, fail, listing, unknown
from tensorpeft.language.source import Span


def _gcd(a: float, b: float) -> int:
    if a != int(a) or b != int(b):
        raise ValueError("only whole numbers have a common divisor")
    return math.gcd(int(a), int(b))


CONSTANTS: dict[str, float] = {"pi": math.pi}
FUNCTIONS: dict[str, Callable[..., float]] = {
    "sqrt": math.sqrt,
    "min": min,
    "max": max,
    "ceil": math.ceil,
    "floor": math.floor,
    "gcd": _gcd,
    "mod": lambda a, b: a % b,  # of the sign of b
    "exp": math.exp,
    "cos": math.cos,
    "sin": math.sin,
    "equal": lambda a, b: int(a == b),
    "less": lambda a, b: int(a < b),
}
ARITY = {  # fewest, most arguments of a function
    **dict.fromkeys(("sqrt", "ceil", "floor", "exp", "cos", "sin"), (1, 1)),
    **dict.fromkeys(("gcd", "mod", "equal", "less"), (2, 2)),
    **dict.fromkeys(("min", "max"), (2, 64)),
}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "**": 3}


def _span() -> Span | None:
    return field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Number:
    """A literal, as an int where it is written as one."""

    value: int | float
    span: Span | None = _span()

    def evaluate(self, names: Mapping[str, float]) -> float:
        return self.value

    @property
    def names(self) -> frozenset[str]:
        return frozenset()

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Name:
    """A name in arithmetic: a rank, ``alpha``, a size of the site or of the model."""

    name: str
    span: Span | None = _span()

    def evaluate(self, names: Mapping[str, float]) -> float:
        if self.name in CONSTANTS:
            return CONSTANTS[self.name]
        if self.name not in names:
            hint = did_you_mean(self.name, names) or f"; expected one of {listing(sorted(names))}"
            raise fail(f"unknown name `{self.name}` in arithmetic{hint}", self.span)
        return names[self.name]

    @property
    def names(self) -> frozenset[str]:
        return frozenset({self.name} - CONSTANTS.keys())

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Operation:
    """``left op right`` with one of ``+ - * / **``."""

    op: str
    left: Expression
    right: Expression
    span: Span | None = _span()

    def evaluate(self, names: Mapping[str, float]) -> float:
        a, b = self.left.evaluate(names), self.right.evaluate(names)
        try:
            value = self._compute(a, b)
            if math.isfinite(value):
                return value
        except (ArithmeticError, ValueError):  # no finite value, or no real one
            pass
        raise fail(f"`{self}` has no finite value", self.span)

    def _compute(self, a: float, b: float) -> float:
        match self.op:
            case "+":
                return a + b
            case "-":
                return a - b
            case "*":
                return a * b
            case "/":
                # exact quotients stay integers, so that sizes beyond 2 ** 53 are not rounded
                return a // b if isinstance(a, int) and isinstance(b, int) and a % b == 0 else a / b
            case _:
                return math.pow(a, b)  # `**` would give complex numbers, or integers without end

    @property
    def names(self) -> frozenset[str]:
        return self.left.names | self.right.names

    def __str__(self) -> str:
        mine = _PRECEDENCE[self.op]
        power = self.op == "**"  # binds to the right, and tighter than a minus sign
        left = _bracketed(self.left, mine + power, power)
        return f"{left} {self.op} {_bracketed(self.right, mine + (not power), False)}"


def _bracketed(operand: Expression, precedence: int, sign: bool) -> str:
    """An operand, in brackets where it binds less tightly than ``precedence``, or has a sign that must stay with it."""
    loose = isinstance(operand, Operation) and _PRECEDENCE[operand.op] < precedence
    signed = sign and isinstance(operand, Number) and math.copysign(1, operand.value) < 0  # that of -0.0 too
    return f"({operand})" if loose or signed else str(operand)


@dataclass(frozen=True)
class Call:
    """``name(arg, key=value)``: a function in arithmetic, an initialiser, a mask rule."""

    name: str
    args: tuple[Expression, ...] = ()
    options: tuple[tuple[str, Expression], ...] = ()
    span: Span | None = _span()

    def evaluate(self, names: Mapping[str, float]) -> float:
        function = FUNCTIONS.get(self.name)
        if function is None:
            raise fail(unknown("function", self.name, FUNCTIONS), self.span)
        values = [arg.evaluate(names) for arg in self.args]  # what is wrong with one of them is told at its own place
        try:
            return function(*values)
        except (TypeError, ArithmeticError, ValueError) as reason:
            raise fail(f"`{self}` cannot be computed: {reason}", self.span) from None

    @property
    def names(self) -> frozenset[str]:
        return frozenset().union(*(arg.names for arg in self.args), *(value.names for _, value in self.options))

    def __str__(self) -> str:
        inside = [*map(str, self.args), *(f"{key}={value}" for key, value in self.options)]
        return f"{self.name}({', '.join(inside)})" if inside else self.name


@dataclass(frozen=True)
class Selector:
    """Some sites: ``query, value layers 0-3``. Without matrices those of every matrix, without layers those of every layer."""

    matrices: tuple[str, ...] = ()  # names, dotted endings of names, or globs
    layers: tuple[int, ...] | None = None  # ascending
    span: Span | None = _span()

    def __str__(self) -> str:
        names = ", ".join(self.matrices)
        layers = "" if self.layers is None else f"layers {ranges(self.layers)}"
        return " ".join(filter(None, (names, layers))) or "*"


EVERYWHERE = Selector()


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as runs.

    >>> ranges([7, 0, 1, 2, 3])
    '0-3, 7'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


@dataclass(frozen=True)
class Choice:
    """An expression for each site: of the entries whose selector fits, the last counts. Stands alone, never inside another."""

    entries: tuple[tuple[Selector, Expression], ...]
    span: Span | None = _span()

    def evaluate(self, names: Mapping[str, float]) -> float:
        raise fail(f"`{self}` differs from site to site", self.span)

    @property
    def names(self) -> frozenset[str]:
        return frozenset().union(*(value.names for _, value in self.entries))

    def __str__(self) -> str:
        return "{" + ", ".join(f"{selector}: {value}" for selector, value in self.entries) + "}"


Expression = Number | Name | Operation | Call | Choice


@dataclass(frozen=True)
class Spectral:
    """Numbers taken from the base weight: ``svd(W).U[:r] * S ** 0.5``.

    ``part`` is ``U`` (d_out by bond), ``V`` (d_in by bond) or ``S`` (bond) of a singular value decomposition, ``Q`` or ``R``
    of a QR decomposition; the bond takes its first values, or its last. ``power`` of the singular values multiplies it.
    """

    decomposition: str  # "svd" | "qr"
    part: str
    bond: str
    last: bool = False
    power: Expression = Number(0)
    span: Span | None = _span()

    def __str__(self) -> str:
        kept = f"-{self.bond}:" if self.last else f":{self.bond}"
        power = "" if self.power == Number(0) else " * S" if self.power == Number(1) else f" * S ** {self.power}"
        return f"{self.decomposition}(W).{self.part}[{kept}]{power}"


Initialiser = Call | Spectral


@dataclass(frozen=True)
class Reference:
    """A factor in a product, with the modes it carries there: ``A[matrix, layer, r, d_in]``."""

    factor: str
    modes: tuple[str, ...]
    span: Span | None = _span()

    def __str__(self) -> str:
        return f"{self.factor}[{', '.join(self.modes)}]" if self.modes else self.factor


@dataclass(frozen=True)
class Product:
    """Factors multiplied and summed over the modes that are not open; ``sign`` is +1 or -1.

    ``at`` is the entry of ``update:`` that it stands under: a site has the products of the last entry that fits it.
    """

    factors: tuple[Reference, ...]
    sign: int = 1
    at: Selector = EVERYWHERE
    span: Span | None = _span()

    def __str__(self) -> str:
        return " * ".join(map(str, self.factors))


@dataclass(frozen=True)
class Update:
    """The sum of products that a spec's ``update:`` line writes."""

    products: tuple[Product, ...]
    span: Span | None = _span()

    @property
    def references(self) -> tuple[Reference, ...]:
        """Every mention of a factor, in order."""
        return tuple(reference for product in self.products for reference in product.factors)

    @property
    def entries(self) -> dict[Selector, Update]:
        """The update of each selector, in the order written; each is as if it stood there alone."""
        found: dict[Selector, list[Product]] = {}
        for product in self.products:
            found.setdefault(product.at, []).append(replace(product, at=EVERYWHERE))
        return {at: Update(tuple(products)) for at, products in found.items()}

    def __str__(self) -> str:
        if any(product.at != EVERYWHERE for product in self.products):
            return "{" + "; ".join(f"{at}: {update}" for at, update in self.entries.items()) + "}"
        text = ""
        for number, product in enumerate(self.products):
            sign = "-" if product.sign < 0 else "+"
            text += f" {sign} {product}" if number else ("- " if product.sign < 0 else "") + str(product)
        return text


@dataclass(frozen=True)
class Part:
    """One part of a mode definition, sized or to be found: ``i1(8)`` or ``i2``."""

    name: str
    size: Expression | None = None
    span: Span | None = _span()

    def __str__(self) -> str:
        return self.name if self.size is None else f"{self.name}({self.size})"


@dataclass(frozen=True)
class Definition:
    """A mode as a product of others, the first the slowest: ``d_out = head * head_dim``."""

    name: str
    parts: tuple[Part, ...]
    span: Span | None = _span()

    def __str__(self) -> str:
        return f"{self.name} = {' * '.join(map(str, self.parts))}" if self.parts else self.name
