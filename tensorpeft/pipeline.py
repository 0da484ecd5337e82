"""The compiler on one page.

    YAML text -> Spec -> Network -> Plan -> Programs -> Adapter, attached to its model

``front`` is all of it that needs no torch. Each arrow is one function, each value can be printed, and ``verify`` stands between
the passes: what it finds is a bug of ours, and no mistake of a spec. To see every value of a spec on a model, and the code of
each of its sites: ``tensorpeft explain lora --model llama-2-7b``.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorpeft.language.document import parse_document
from tensorpeft.language.errors import CheckpointError, clip
from tensorpeft.language.loader import compile_table, load_spec
from tensorpeft.language.source import Source
from tensorpeft.language.spec import Spec
from tensorpeft.model.cards import model_shape
from tensorpeft.model.shape import ModelShape
from tensorpeft.model.target import choose
from tensorpeft.network.lower import lower
from tensorpeft.network.network import Network
from tensorpeft.network.verify import verify
from tensorpeft.planning.plan import Plan, plan
from tensorpeft.planning.regime import Regime
from tensorpeft.reporting.counting import report_of
from tensorpeft.reporting.report import Report

if TYPE_CHECKING:
    from torch import nn

    from tensorpeft.runtime.adapter import Adapter


def front(spec: Spec | str | Path, model: ModelShape, regime: Regime = Regime()) -> Plan:
    """Text or spec -> plan, on a model of which only the shape is known.

    Raises:
        SpecError: the spec is wrong, or does not fit the model.
    """
    read = spec if isinstance(spec, Spec) else load_spec(spec)  # YAML text -> Spec: parsed, expanded, checked
    network = lower(read, model)  # Spec -> Network: sites, sizes, stored blocks
    return _planned(network, regime)


def _planned(network: Network, regime: Regime) -> Plan:
    verify(network)
    planned = plan(network, regime)  # Network -> Plan: the steps of every contraction
    planned.verify()
    return planned


def attach(
    model: nn.Module, spec: Spec | str | Path, *, name: str | None = None, regime: Regime | None = None
) -> Adapter:
    """Compile a spec for a torch model and attach it.

    The base is frozen and otherwise left alone: no module is replaced or renamed. The adapter becomes a submodule of the model.
    An error leaves the model as it was.

    Args:
        model: any torch model with linear modules; of transformers' models the roles are known by family.
        spec: a spec, a catalogue name, a path, or YAML text.
        name: the adapter's name on this model; the spec's own by default.
        regime: what the order of contraction is planned for; by default, for what each input turns out to be.

    Raises:
        SpecError: the spec is wrong, or does not fit the model.
        ModelError: the model cannot be read.
        AdapterError: the model already has an adapter of that name.
    """
    from tensorpeft.runtime.attach import attach_programs
    from tensorpeft.runtime.program_cache import Programs
    from tensorpeft.scanning.scan import scan

    shape = scan(model)  # torch model -> ModelShape
    planned = front(spec, shape, regime or Regime())
    programs = Programs(
        planned, adapts=regime is None
    )  # Plan -> Programs: torch.fx code, for this plan and other lengths
    return attach_programs(model, programs, name)  # Programs -> Adapter


def load(model: nn.Module, folder: str | PathLike[str], *, name: str | None = None) -> Adapter:
    """Attach the adapter that ``Adapter.save`` wrote to a folder.

    Everything is checked before the model is touched: that the file is whole, that this model has the sites that the
    adapter was saved from, and that every factor is what it was. The factors keep their saved dtype.

    Args:
        model: a model with the same sites; its device is where the factors go.
        folder: where ``adapter.safetensors`` lies.
        name: the adapter's name on this model; the spec's own by default.

    Raises:
        CheckpointError: the file is missing, damaged, of another format version, or of another base.
        ModelError: the model cannot be read.
        AdapterError: the model already has an adapter of that name, or has no weights yet.
    """
    from tensorpeft.checkpoint.compatibility import check_factors, check_sites
    from tensorpeft.checkpoint.files import blamed_on, read
    from tensorpeft.runtime.attach import attach_programs
    from tensorpeft.runtime.program_cache import Programs
    from tensorpeft.runtime.saving import restored
    from tensorpeft.scanning.scan import scan

    if not isinstance(folder, (str, PathLike)):
        raise CheckpointError(
            f"expected the path of a folder, found {clip(repr(folder))} of type `{type(folder).__name__}`"
        )
    saved, shape = read(Path(folder)), scan(model)
    with blamed_on(saved.path):
        text = Source("its spec", saved.header.spec)  # never looked up as a name or a path
        spec = compile_table(parse_document(text), text)
        check_sites(saved.header, shape.name, choose(spec.target, shape))
        network = lower(spec, shape, saved.indices)
        check_factors(saved.header, network)
        programs = Programs(_planned(network, Regime()), adapts=True)
        return attach_programs(model, programs, name, restored(saved, network))


def report(
    spec: Spec | str | Path, model: ModelShape | nn.Module | str | Path | dict[str, Any], *, regime: Regime = Regime()
) -> Report:
    """Count a spec on a model: exact counts, bytes, FLOPs, the rank of LoRA that could stand for it.

    Args:
        spec: a spec, a catalogue name, a path, or YAML text.
        model: a model card's name, a ``config.json``, a config, a shape, or a torch model; the last alone needs torch.
        regime: what the order of contraction is planned for.

    Raises:
        SpecError: the spec is wrong, or does not fit the model.
        ModelError: the model cannot be read.
    """
    return report_of(front(spec, shape_of(model), regime))


def shape_of(model: Any) -> ModelShape:
    """The shape of a model card, a config.json, a config, as one of transformers or a dict, or a torch model.

    Torch is imported for the last alone.
    """
    if isinstance(model, ModelShape):
        return model
    if hasattr(model, "to_dict"):
        model = model.to_dict()
    if isinstance(model, (str, Path, dict)):
        return model_shape(model)
    from tensorpeft.scanning.scan import scan

    return scan(model)
