"""Parameter-efficient adapters as tensor networks: one YAML file per method, compiled to torch.

    spec = tensorpeft.load_spec("lora", rank=4)
    print(tensorpeft.report(spec, model="llama-2-7b"))      # needs no torch
    adapter = tensorpeft.attach(model, spec)
    adapter.save(folder)
    adapter = tensorpeft.load(fresh_model, folder)

Names are imported when they are first used, so that this import costs nothing and torch is loaded only by what needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from tensorpeft.version import __version__

if TYPE_CHECKING:
    from tensorpeft.language.errors import AdapterError, CheckpointError, ModelError, SpecError, TensorpeftError
    from tensorpeft.language.loader import load_spec
    from tensorpeft.language.spec import Spec
    from tensorpeft.pipeline import attach, load, report
    from tensorpeft.planning.regime import Regime
    from tensorpeft.reporting.report import Report
    from tensorpeft.runtime.adapter import Adapter


__all__ = [
    "Adapter",
    "AdapterError",
    "CheckpointError",
    "ModelError",
    "Regime",
    "Report",
    "Spec",
    "SpecError",
    "TensorpeftError",
    "__version__",
    "attach",
    "load",
    "load_spec",
    "report",
]

_HOMES = {
    "pipeline": ("attach", "load", "report"),
    "language.errors": ("AdapterError", "CheckpointError", "ModelError", "SpecError", "TensorpeftError"),
    "language.loader": ("load_spec",),
    "language.spec": ("Spec",),
    "planning.regime": ("Regime",),
    "reporting.report": ("Report",),
    "runtime.adapter": ("Adapter",),
}


def __getattr__(name: str) -> object:
    """A public name from the module that defines it (PEP 562)."""
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module `{__name__}` has no attribute `{name}`")


def __dir__() -> list[str]:
    return __all__
