"""The words of the language that have a meaning of their own, as data."""

from __future__ import annotations

from typing import NamedTuple

from tensorpeft.language.spec import SIDES, SITE_MODES, STRUCTURAL_MODES
from tensorpeft.language.syntax import Call, Number

TASK_MODE = "task"  # bound per row of a batch
MODEL_SIZES = ("width", "layers", "heads", "head_dim", "mlp", "vocab")  # what a model's shape names
LAYER = "layer"  # of a site, counted from 0
SIZE_NAMES = (*SIDES, LAYER, *MODEL_SIZES)  # what arithmetic may speak of besides bonds (and `alpha` in a scale)
BUILT_IN_MODES = (*SITE_MODES, TASK_MODE, *SIDES, *STRUCTURAL_MODES)


class Signature(NamedTuple):
    """The arguments that a call takes: values in order, and named options."""

    values: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


DECOMPOSITIONS = {"svd": ("U", "V", "S"), "qr": ("Q", "R")}  # of the base weight: their parts
INITIALISERS = {
    "zeros": Signature(),
    "ones": Signature(),
    "constant": Signature(("value",)),
    "uniform": Signature(("bound",)),  # from -bound to bound
    "normal": Signature(("standard deviation",)),
    "kaiming_uniform": Signature((), ("a", "fan")),  # a: slope of the leaky ReLU; fan: the mode counted as fan_in
    "xavier_uniform": Signature(),
    "orthogonal": Signature(),  # of the last two modes that are not bound to sites
    "identity": Signature(),
    "start": Signature(("factor",)),  # the numbers that another factor starts from
    "formula": Signature(("expression",)),  # over the indices of the factor's modes
}
MASK_RULES = {  # each takes options besides: a matrix and its own value
    "bernoulli": Signature(("probability",)),
    "keep": Signature(("fraction or number",)),
    "top": Signature(("fraction or number",)),  # those of the largest scores
    "sample": Signature(("fraction or number",)),  # drawn with probabilities proportional to the scores
    "where": Signature(("expression",)),  # over the masked indices
}
SCORED = ("top", "sample")  # the rules that read the file under `scores`
TRAINABLE = ("biases", "norms", "head")  # what `train` names of the base, besides patterns

ZEROS, ONES, IDENTITY = Call("zeros"), Call("ones"), Call("identity")
KAIMING = Call("kaiming_uniform")
LINEAR = Call("kaiming_uniform", (), (("a", Call("sqrt", (Number(5),))),))  # torch's nn.Linear: bound 1 / sqrt(fan_in)
