"""Sharing: which sites use a factor, under which names of its modes, and which of its tensors serves each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tensorpeft.language.errors import fail
from tensorpeft.language.modes import free_modes, written_modes
from tensorpeft.language.spec import SITE_MODES, Spec
from tensorpeft.language.syntax import Product, Reference
from tensorpeft.model.shape import Key, Site
from tensorpeft.network.mode_sizes import ModeLayout
from tensorpeft.network.site_classes import SiteClass

FreeSizes = tuple[int, ...]  # of the free written modes of a factor
Layouts = Mapping[SiteClass, ModeLayout]
Placed = Sequence[tuple[Site, SiteClass]]
Users = list[tuple[Site, SiteClass]]


@dataclass(frozen=True)
class Sharing:
    """The sites that use a factor, by class. The modes of its first reference name those of the stored tensor."""

    factor: str
    written: tuple[str, ...]
    names: dict[SiteClass, tuple[str, ...]]  # the free modes of the first reference at each kind of sites

    @property
    def site_modes(self) -> tuple[str, ...]:
        """The site modes that the factor carries, in the order of a key."""
        return tuple(mode for mode in SITE_MODES if mode in self.written)

    @property
    def free(self) -> tuple[str, ...]:
        """The other written modes, in their order."""
        return tuple(mode for mode in self.written if mode not in SITE_MODES)

    def key(self, site: Site) -> Key:
        """Under which label a site's numbers are stored."""
        return tuple(getattr(site, mode) for mode in self.site_modes)

    def sizes(self, site_class: SiteClass, layouts: Layouts) -> FreeSizes:
        """The sizes of the free modes at a class of sites."""
        sizes = layouts[site_class].sizes
        return tuple(sizes[mode] for mode in self.names[site_class])


def sharing_of(spec: Spec, factor: str, classes: Iterable[SiteClass]) -> Sharing:
    """Find the classes of sites that use a factor, and the names that its free modes have there."""
    firsts = {site_class: _first(factor, site_class.products) for site_class in classes}
    names = {each: free_modes(reference, spec.modes) for each, reference in firsts.items() if reference is not None}
    return Sharing(factor, written_modes(first_reference(spec, factor), spec.modes), names)


def first_reference(spec: Spec, factor: str) -> Reference:
    """The first mention of a factor in the update; its modes, in their order, are those of the stored tensors."""
    reference = _first(factor, spec.update.products)
    assert reference is not None
    return reference


def _first(factor: str, products: Iterable[Product]) -> Reference | None:
    references = (reference for product in products for reference in product.factors)
    return next((reference for reference in references if reference.factor == factor), None)


def users_of(spec: Spec, sharing: Sharing, placed: Placed, layouts: Layouts) -> dict[tuple[Key, FreeSizes], Users]:
    """The sites that each key of each tensor of a factor serves, by the sizes of the tensor, in the order of the sites.

    Raises:
        SpecError: sizes that differ do not fit the policy of their mode.
    """
    wanted = {site_class: sharing.sizes(site_class, layouts) for site_class in sharing.names}
    refuse_ragged(spec, sharing, wanted.values())
    several: dict[Key, set[FreeSizes]] = defaultdict(set)
    sites = [(site, site_class, sharing.key(site)) for site, site_class in placed if site_class in wanted]
    for _, site_class, key in sites:
        several[key].add(wanted[site_class])
    serving = {key: serving_sizes(spec, sharing, frozenset(sizes)) for key, sizes in several.items()}
    ordered = [(key, sizes) for key, by_wanted in serving.items() for sizes in sorted(set(by_wanted.values()))]
    found: dict[tuple[Key, FreeSizes], Users] = {each: [] for each in ordered}
    for site, site_class, key in sites:
        found[key, serving[key][wanted[site_class]]].append((site, site_class))
    return found


def serving_sizes(spec: Spec, sharing: Sharing, wanted: frozenset[FreeSizes]) -> dict[FreeSizes, FreeSizes]:
    """For each of the sizes that the sites of one key want of a factor, those of the tensor that serves them.

    Raises:
        SpecError: a size is no multiple of the one that is to serve it.
    """
    policies = tuple(spec.policy(mode) for mode in sharing.free)
    if len(wanted) == 1 or not {"slice", "group"}.intersection(policies):
        return {sizes: sizes for sizes in wanted}
    together: dict[FreeSizes, list[FreeSizes]] = defaultdict(list)
    for sizes in wanted:
        apart = tuple(size for size, policy in zip(sizes, policies, strict=True) if policy not in ("slice", "group"))
        together[apart].append(sizes)
    found = {}
    for several in together.values():
        columns = zip(policies, *several, strict=True)
        serving = tuple(min(sizes) if policy == "group" else max(sizes) for policy, *sizes in columns)
        for sizes in several:
            _refuse_uneven(spec, sharing, policies, sizes, serving)
            found[sizes] = serving
    return found


def _refuse_uneven(spec: Spec, sharing: Sharing, policies: Sequence[str], sizes: FreeSizes, serving: FreeSizes) -> None:
    for mode, policy, size, least in zip(sharing.free, policies, sizes, serving, strict=True):
        if policy == "group" and size % least:
            message = f"mode `{mode}` of factor `{sharing.factor}` is `group`, but its size {size} is no multiple of"
            raise fail(f"{message} {least}, its least", spec.factor(sharing.factor).span or spec.span)


def refuse_ragged(spec: Spec, sharing: Sharing, wanted: Iterable[FreeSizes]) -> None:
    """Hold what sites want of a factor to `ragged: error`.

    Raises:
        SpecError: the sizes of a mode differ, and its policy forbids that.
    """
    for mode, *sizes in zip(sharing.free, *wanted, strict=True):
        if spec.policy(mode) == "error" and len(set(sizes)) > 1:
            found = " and ".join(map(str, sorted(set(sizes))))
            message = f"mode `{mode}` of factor `{sharing.factor}` is ragged, its sizes are {found}"
            raise fail(f"{message}, and `ragged: error` forbids it", spec.factor(sharing.factor).span or spec.span)


def serving_indices(policy: str, size: int, serving: int) -> np.ndarray:  # shape: (size,)
    """For each index of a mode the index of the axis that serves it: of groups a neighbour's, else the same."""
    return np.arange(size) * serving // size if policy == "group" else np.arange(size)
