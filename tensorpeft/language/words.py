"""The words of the language that have a meaning of their own, as data."""

from __future__ import annotations

from dataclasses import dataclass

from tensorpeft.language.spec import SIDES, SITE_MODES, STRUCTURAL_MODES
from tensorpeft.language.syntax import Call, Number

TASK_MODE = "task"  # bound per row of a batch
MODEL_SIZES = ("width", "layers", "heads", "head_dim", "mlp", "vocab")  # what a model's shape names
SIZE_NAMES = (*SIDES, *MODEL_SIZES)  # what arithmetic in a spec may speak of, besides bonds (and `alpha` in a scale)
BUILT_IN_MODES = (*SITE_MODES, TASK_MODE, *SIDES, *STRUCTURAL_MODES)


@dataclass(frozen=True)
class Signature:
    """What stands in the brackets of a call: values in order, and named options."""

    values: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


INITIALISERS = {
    "zeros": Signature(),
    "ones": Signature(),
    "constant": Signature(("value",)),
    "uniform": Signature(("bound",)),  # from -bound to bound
    "normal": Signature(("standard deviation",)),
    "kaiming_uniform": Signature((), ("a", "fan")),  # a: slope of the leaky ReLU; fan: the mode counted as fan_in
    "xavier_uniform": Signature(),
}
MASK_RULES = {  # each takes options besides: a matrix and its own value
    "bernoulli": Signature(("probability",)),
    "keep": Signature(("fraction or number",)),
}
ARITY = {"sqrt": (1, 1), "ceil": (1, 1), "floor": (1, 1), "min": (2, 64), "max": (2, 64)}  # fewest, most arguments

ZEROS = Call("zeros")
KAIMING = Call("kaiming_uniform")
LINEAR = Call("kaiming_uniform", (), (("a", Call("sqrt", (Number(5),))),))  # torch's nn.Linear: bound 1 / sqrt(fan_in)
