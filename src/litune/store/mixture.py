"""Selections of several feature stores as one, for tuning on all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TypeVar

import numpy as np
import pyarrow as pa

from litune.errors import StoreError
from litune.image.registry import differences
from litune.store.store import FeatureStore, Selection, check_range

T = TypeVar("T")


class Mixture(Selection):
    """Images of several stores: those of the first, then those of the second, and so on. Nothing is copied."""

    def __init__(self, sources: Sequence[Selection]) -> None:
        self._sources = tuple(sources)
        self.store = known_store([one.store for one in sources])
        self.starts = np.cumsum([0, *map(len, sources)])
        self.caption_starts = np.cumsum([0, *(int(one.offsets[-1]) for one in sources)])
        ends = [one.offsets[1:] + start for one, start in zip(sources, self.caption_starts, strict=False)]
        self.offsets = np.concatenate([[0], *ends])

    @property
    def sources(self) -> Sequence[Selection]:
        """The selections that this one is put together from, each of one store."""
        return self._sources

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def keys(self) -> list[str]:
        """The images' names, as their sources have them."""
        return list(chain.from_iterable(one.keys for one in self._sources))

    @property
    def image_files(self) -> list[str]:
        """The images' files."""
        return list(chain.from_iterable(one.image_files for one in self._sources))

    def image_hashes(self) -> np.ndarray | None:
        """Numbers that are equal for equal image files; an image without a hash is equal to none."""
        found = [one.image_hashes() for one in self._sources]
        if all(hashes is None for hashes in found):
            return None
        return np.concatenate(
            [
                -1 - np.arange(first, last) if hashes is None else hashes  # hashes are 0 or more
                for hashes, first, last in zip(found, self.starts, self.starts[1:], strict=False)
            ]
        )

    @property
    def caption_array(self) -> pa.Array:
        """All captions, image by image."""
        return pa.concat_arrays([one.caption_array for one in self._sources])

    def take_captions(self, numbers: np.ndarray) -> pa.Array:
        """The captions with these numbers, in this order."""
        order, parts = self._parts(numbers, self.caption_starts, lambda one, own: one.take_captions(own))
        return pa.concat_arrays([*parts, pa.array([], pa.large_string())]).take(pa.array(np.argsort(order)))

    @property
    def fields(self) -> list[str]:
        """For each caption, the text field that it is of."""
        return list(chain.from_iterable(one.fields for one in self._sources))

    def of_field(self, name: str) -> np.ndarray:
        """The numbers of the captions that are of this text field."""
        parts = zip(self._sources, self.caption_starts, strict=False)
        return np.concatenate([one.of_field(name) + start for one, start in parts])

    def features(self, positions: np.ndarray | None = None) -> np.ndarray:
        """Raw float32 features of the images at these positions (all by default)."""
        if positions is None:
            return np.concatenate([one.features() for one in self._sources])
        found = np.empty((len(positions), self.store.width), np.float32)
        order, parts = self._parts(positions, self.starts, lambda one, own: one.features(own))
        if parts:
            found[order] = np.concatenate(parts)
        return found

    def touch(self, positions: np.ndarray) -> None:
        """Have the system read these images' features into memory."""
        self._parts(positions, self.starts, lambda one, own: one.touch(own))

    def read_ahead(self, blocks: Sequence[range]) -> None:
        """Have the system begin to read blocks of neighbouring images."""
        for one, first, last in zip(self._sources, self.starts, self.starts[1:], strict=False):
            own = [range(max(block.start - first, 0), min(block.stop, last) - first) for block in blocks]
            one.read_ahead([block for block in own if block])

    def blocks(self) -> Iterator[np.ndarray]:
        """`features` of all images, block by block: flat memory."""
        return chain.from_iterable(one.blocks() for one in self._sources)

    def subset(self, positions: np.ndarray) -> Mixture:
        """The images at these positions, which must be in ascending order. Raises `IndexError` for one it lacks."""
        check_range(positions, len(self), "images")
        cuts = np.searchsorted(positions, self.starts)
        return Mixture(
            [
                one.subset(positions[begin:end] - first)
                for one, first, begin, end in zip(self._sources, self.starts, cuts, cuts[1:], strict=False)
            ]
        )

    def _parts(
        self, numbers: np.ndarray, starts: np.ndarray, take: Callable[[Selection, np.ndarray], T]
    ) -> tuple[np.ndarray, list[T]]:
        """What each source gives for those of the numbers that are its own; and which of the numbers they are.

        Raises `IndexError` for a number that none has.
        """
        check_range(numbers, int(starts[-1]), "captions" if starts is self.caption_starts else "images")
        source = np.searchsorted(starts, numbers, "right") - 1
        order = np.argsort(source, kind="stable")
        cuts = np.searchsorted(source[order], np.arange(len(starts)))
        parts = []
        for one, start, begin, end in zip(self._sources, starts, cuts, cuts[1:], strict=False):
            if end > begin:
                parts.append(take(one, numbers[order[begin:end]] - start))
        return order, parts


def source_names(stores: Sequence[FeatureStore]) -> list[str]:
    """What stores are called in messages and metrics: their folders' names, or their paths where two are alike."""
    names = [store.path.resolve().name for store in stores]
    return names if len(set(names)) == len(names) else [str(store.path) for store in stores]


def known_store(stores: Sequence[FeatureStore]) -> FeatureStore:
    """The first store that knows its tower; the first of all where none does."""
    return next((store for store in stores if store.tower), stores[0])


def check_one_tower(stores: Sequence[FeatureStore]) -> None:
    """Raise `StoreError` where the stores' features are not all of one tower, or one store is there twice."""
    first = known_store(stores)
    for number, store in enumerate(stores):
        if store.path.resolve() in [other.path.resolve() for other in stores[:number]]:
            raise StoreError(f"{store.path} is given twice: give each store once, and weigh it with --mix")
        if store.width != first.width:
            raise StoreError(
                f"{store.path} has features of width {store.width}, {first.path} of {first.width}: stores that are "
                "tuned on together must be of one image tower"
            )
        if store.tower and first.tower and (found := differences(first.tower, store.tower)):
            raise StoreError(
                f"{store.path} was made with the image tower {store.tower['spec']}, {first.path} with "
                f"{first.tower['spec']} ({'; '.join(found)}): stores that are tuned on together must be of one tower"
            )
