"""Packing: the indices or entries of a factor's tensors that masks keep, from their rules or from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np

from tensorpeft.language.errors import fail
from tensorpeft.language.keywords import SCORED
from tensorpeft.language.modes import free_modes
from tensorpeft.language.spec import MaskRule, Spec
from tensorpeft.model.shape import Key
from tensorpeft.network.initialisers import origins
from tensorpeft.network.masks import Mask, kept_indices, masks_at
from tensorpeft.network.network import Block, Entries
from tensorpeft.network.scores import Scores, served
from tensorpeft.network.sharing import FreeSizes, Layouts, Sharing, Users, first_reference, serving_indices


@dataclass(frozen=True)
class KeptIndices:
    """The kept indices of one key on each free axis (None: all), and its kept entries where a rule speaks of several axes."""

    axes: tuple[np.ndarray | None, ...]
    entries: Entries | None = None


@dataclass(frozen=True)
class FactorMasks:
    """The mask rules of one factor, and what they read. ``saved`` are the indices of tensors that a checkpoint has."""

    spec: Spec
    sharing: Sharing
    layouts: Layouts
    scores: Scores
    saved: Mapping[str, np.ndarray]
    rules: tuple[tuple[MaskRule, tuple[int, ...]], ...]  # with the free axes that each speaks of

    @property
    def by_entries(self) -> bool:
        """Whether tensors are packed entry by entry."""
        return any(len(axes) > 1 for _, axes in self.rules)

    def masks(self, users: Users) -> tuple[Mask, ...]:
        """The masks of what a key holds.

        Raises:
            SpecError: they are not the same at all of its sites.
        """
        first, *others = [(site, masks_at(self.rules, site)) for site, _ in users]
        for site, masks in others:
            if {mask.axes: mask.said for mask in masks} != {mask.axes: mask.said for mask in first[1]}:
                told = f"`{self.sharing.factor}` is one tensor for {first[0]} and {site}, for which its masks differ"
                raise fail(f"{told}; expected the same mask", (*masks, *first[1])[0].rule.span)
        return first[1]

    def kept(self, key: Key, sizes: FreeSizes, users: Users) -> KeptIndices:
        """Apply the rules to one key of a tensor; ``sizes`` are those of its free axes."""
        axes: list[np.ndarray | None] = [None] * len(sizes)
        several = []
        masks = self.masks(users)
        if self.by_entries and len(masks) == 1 and masks[0].rule.rule.name == "keep":  # which they are can wait
            count = self.count(sizes, users)
            assert count is not None
            draw = partial(_kept_entries, masks[0], key, sizes, self.spec.seed)
            return KeptIndices(tuple(axes), Entries(count, draw))
        for mask in masks:
            shape = tuple(sizes[axis] for axis in mask.axes)
            scores = self._scores(mask, shape, users) if mask.rule.rule.name in SCORED else None
            names = self.layouts[users[0][1]].names
            positions = kept_indices(mask, key, shape, self.spec.seed, scores=scores, sizes=names)
            if len(mask.axes) == 1:
                axes[mask.axes[0]] = positions
            else:
                several.append((mask, positions))
        if not self.by_entries:
            return KeptIndices(tuple(axes))
        entries = _in_grid(sizes, axes, several)
        if not len(entries):
            raise fail(f"the masks leave nothing of factor `{self.sharing.factor}`", several[0][0].rule.span)
        return _of_entries(entries, sizes, {axis for axis, kept in enumerate(axes) if kept is not None})

    def restored(
        self, name: str, keys: Sequence[Key], sizes: FreeSizes, users: Mapping[Key, Users]
    ) -> list[KeptIndices]:
        """Read the kept indices of a tensor's keys from those that a checkpoint has.

        Raises:
            SpecError: it has indices of something else.
        """
        alone = [{mask.axes[0] for mask in self.masks(users[key]) if len(mask.axes) == 1} for key in keys]
        try:
            if self.by_entries:
                pieces = from_indices(self.saved[name], ([prod(sizes)] for _ in keys))
                entries = (piece for each in pieces for piece in each if piece is not None)
                return [_of_entries(each, sizes, axes) for each, axes in zip(entries, alone, strict=True)]
            wanted = ([size if axis in axes else None for axis, size in enumerate(sizes)] for axes in alone)
            return [KeptIndices(tuple(axes)) for axes in from_indices(self.saved[name], wanted)]
        except ValueError:
            message = f"the saved indices of factor `{name}` are damaged, or of another model"
            raise fail(message, self.rules[0][0].span) from None

    def count(self, sizes: FreeSizes, users: Users) -> int | None:
        """The number of kept numbers of a key; None where the masks have to be drawn to tell."""
        masks = self.masks(users)
        if not all(mask.counts for mask in masks) or (self.by_entries and len(masks) > 1):
            return None
        left = prod(mask.count(prod(sizes[axis] for axis in mask.axes)) for mask in masks)
        masked = {axis for mask in masks for axis in mask.axes}
        return left * prod(size for axis, size in enumerate(sizes) if axis not in masked)

    def _scores(self, mask: Mask, shape: tuple[int, ...], users: Users) -> np.ndarray:
        found = []
        for site, site_class in users:
            layout, names = self.layouts[site_class], [self.sharing.names[site_class][axis] for axis in mask.axes]
            policies = (self.spec.policy(self.sharing.free[axis]) for axis in mask.axes)
            sizes = (layout.sizes[name] for name in names)
            places = [serving_indices(*each) for each in zip(policies, sizes, shape, strict=True)]
            found.append((self.scores.at(site, names, layout, mask.rule), places))
        return served(found, shape)


def _kept_entries(mask: Mask, key: Key, sizes: FreeSizes, seed: int) -> np.ndarray:  # shape: (kept,)
    """Draw a random mask of several axes; positions in the grid of all axes."""
    positions = kept_indices(mask, key, tuple(sizes[axis] for axis in mask.axes), seed)
    return _in_grid(sizes, [None] * len(sizes), [(mask, positions)])


def _in_grid(
    sizes: FreeSizes, axes: Sequence[np.ndarray | None], several: Sequence[tuple[Mask, np.ndarray]]
) -> np.ndarray:  # shape: (kept,)
    """The positions in the grid of all axes that every mask keeps, ascending."""
    places: dict[int, np.ndarray] = {}
    if several:
        mask, positions = several[0]
        grid = [sizes[axis] for axis in mask.axes]
        places = dict(zip(mask.axes, np.unravel_index(positions, grid), strict=True))
    for axis, size in enumerate(sizes):
        kept = axes[axis]
        if axis not in places:
            own = np.arange(size) if kept is None else kept
            n = len(next(iter(places.values()))) if places else 1
            places = {other: np.repeat(place, len(own)) for other, place in places.items()}
            places[axis] = np.tile(own, n)
        elif kept is not None:
            places = _chosen(places, np.isin(places[axis], kept))
    for mask, positions in several[1:]:
        flat = np.ravel_multi_index([places[axis] for axis in mask.axes], [sizes[axis] for axis in mask.axes])
        places = _chosen(places, np.isin(flat, positions))
    return np.sort(np.ravel_multi_index([places[axis] for axis in range(len(sizes))], sizes))


def _chosen(places: dict[int, np.ndarray], which: np.ndarray) -> dict[int, np.ndarray]:
    return {axis: place[which] for axis, place in places.items()}


def _of_entries(entries: np.ndarray, sizes: FreeSizes, masked: Set[int]) -> KeptIndices:
    """Entries, with what they leave of the axes that are masked by themselves too."""
    places = np.unravel_index(entries, sizes)
    axes = (np.unique(place) if axis in masked else None for axis, place in enumerate(places))
    return KeptIndices(tuple(axes), Entries.of(entries))


def masking(
    spec: Spec, sharing: Sharing, layouts: Layouts, scores: Scores, saved: Mapping[str, np.ndarray] | None = None
) -> FactorMasks | None:
    """The masks of a factor, those of the factor that it starts from among them; None if there are none.

    Raises:
        SpecError: a masked mode is stored as site modes.
    """
    rules = []
    for factor in reversed(origins(spec, sharing.factor)):
        free = free_modes(first_reference(spec, factor), spec.modes)
        for rule in spec.masks:
            if rule.factor == factor:
                missing = next((mode for mode in rule.modes if mode not in free), None)
                if missing is not None:
                    message = f"`{missing}` of `{factor}` holds site modes, and would mask whole matrices or layers"
                    raise fail(f"{message}; choose these under `target`", rule.span)
                rules.append((rule, tuple(free.index(mode) for mode in rule.modes)))
    return FactorMasks(spec, sharing, layouts, scores, saved or {}, tuple(rules)) if rules else None


def from_file(spec: Spec, factor: str) -> bool:
    """Whether a file of scores decides what is kept of a factor, so that a checkpoint has to hold the indices."""
    names = origins(spec, factor)
    return any(rule.factor in names and rule.rule.name in SCORED for rule in spec.masks)


def indices(block: Block) -> np.ndarray:  # shape: (n,), integers
    """The kept indices of a masked block as one list, for a checkpoint: the length of each piece, then its indices."""
    if block.entries is not None:
        pieces = [block.entries[key].positions for key in block.keys]
    else:
        pieces = [kept for key in block.keys for kept in (block.kept or {})[key] if kept is not None]
    return np.concatenate([np.concatenate([[len(piece)], piece]) for piece in pieces]).astype(np.int64)


def from_indices(saved: np.ndarray, sizes: Iterable[Sequence[int | None]]) -> Iterator[list[np.ndarray | None]]:
    """The pieces of such a list, key by key; ``sizes`` says for each of a key's how many indices there are, None for no mask.

    Raises:
        ValueError: the list is of something else.
    """
    at = 0
    for wanted in sizes:
        pieces: list[np.ndarray | None] = []
        for size in wanted:
            if size is None:
                pieces.append(None)
                continue
            length = int(saved[at]) if at < len(saved) else 0
            piece = saved[at + 1 : at + 1 + length]
            fits = 0 < len(piece) == length and piece[0] >= 0 and piece[-1] < size
            if not fits or (np.diff(piece) <= 0).any():
                raise ValueError
            pieces.append(piece)
            at += 1 + length
        yield pieces
    if at != len(saved):
        raise ValueError
