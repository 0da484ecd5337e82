"""The file under ``scores``: a number for each element of the base weights, or for each index of a mode."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from math import prod
from pathlib import Path

import numpy as np

from tensorpeft.language.errors import SpecError, did_you_mean, fail, listing
from tensorpeft.language.spec import SIDES, MaskRule, Spec
from tensorpeft.model.shape import Site
from tensorpeft.network.mode_sizes import ModeLayout


class Scores:
    """The arrays of a numpy archive, each read when a site asks for it. Nothing in it is ever executed.

    Arrays stand under ``<matrix>.<layer>``, ``<matrix>.<layer>.<expert>`` or the path of the weight.
    """

    def __init__(self, spec: Spec) -> None:
        self._name = spec.scores or ""
        beside = Path(spec.source.name).parent / self._name if spec.source else Path(self._name)
        self._path = beside if beside.is_file() else Path(self._name)

    def at(
        self, site: Site, names: Sequence[str], layout: ModeLayout, rule: MaskRule
    ) -> np.ndarray:  # shape: sizes of names
        """The scores of a site over the grid of some modes: as they are, or summed over the rest of the weight's elements.

        Raises:
            SpecError: the file cannot be read, lacks the site, or has an array of another shape, or one that is not finite.
        """
        array = self._read(site, rule)
        shape = tuple(layout.sizes[name] for name in names)
        if array.shape == shape:
            return array
        atoms = layout.atoms(names)
        elements = (*atoms[SIDES[0]], *atoms[SIDES[1]])
        wanted = [atom for name in names for atom in atoms[name]]
        if array.shape != (site.d_out, site.d_in) or not {*wanted} <= {*elements}:
            found = " x ".join(map(str, array.shape)) or "a single number"
            expected = f"{' x '.join(map(str, shape))} ({', '.join(names)})"
            if {*wanted} <= {*elements}:
                expected += f", or {site.d_out} x {site.d_in} (d_out x d_in)"
            raise fail(f"the scores in `{self._name}` of {site} are {found}, expected {expected}", rule.span)
        apart = array.reshape([layout.sizes[atom] for atom in elements])
        summed = apart.sum(axis=tuple(axis for axis, atom in enumerate(elements) if atom not in wanted))
        left = [atom for atom in elements if atom in wanted]
        return summed.transpose([left.index(atom) for atom in wanted]).reshape(shape)

    def _read(self, site: Site, rule: MaskRule) -> np.ndarray:  # shape: as it was saved
        labels = f"{site.matrix}.{site.layer}", f"{site.matrix}.{site.layer}.{site.expert}", site.path
        try:
            archive = np.load(self._path, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                message = f"`{self._name}` is a single array; expected an archive, as `numpy.savez` writes it"
                raise fail(message, rule.span)
            with archive:
                label = next((label for label in labels if label in archive), None)
                if label is None:
                    hint = did_you_mean(labels[0], archive) or f"; it has {listing(archive, 4) or 'nothing'}"
                    raise fail(f"`{self._name}` has no scores `{labels[0]}` for {site}{hint}", rule.span)
                array = np.asarray(archive[label])
        except SpecError:
            raise
        except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as reason:
            text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
            raise fail(f"the scores `{self._name}` cannot be read: {text.lower()}", rule.span) from None
        if array.dtype.kind not in "fiub" or not np.isfinite(array).all():
            raise fail(f"the scores in `{self._name}` of {site} are not all finite numbers", rule.span)
        return array.astype(np.float64, copy=False)


def served(
    scores: Sequence[tuple[np.ndarray, Sequence[np.ndarray]]], shape: tuple[int, ...]
) -> np.ndarray:  # of this shape
    """The sum of the scores of several sites over the axes of the tensor that serves them.

    Each comes with, for each of its axes, the index of the tensor that serves an index of the site.
    """
    total = np.zeros(prod(shape)).reshape(shape)
    for values, places in scores:
        np.add.at(total, np.ix_(*places), values)
    return total
