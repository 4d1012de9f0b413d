"""Near-duplicates: candidates by features, then pixels; and which image of a group stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from litune.curation.alignment import agreement
from litune.errors import MissingExtraError
from litune.image.pictures import map_ahead

WIDTH = 256
"""Directions of the features that are compared."""
EXACT = 50_000
"""With more images than this, the index is approximate."""
PROBES = 16
BLOCK = 8192

Blocks = Callable[[np.ndarray], Iterator[np.ndarray]]
"""Raw features of the images with these numbers, block by block."""


@dataclass(frozen=True)
class Space:
    """Where features are compared: less their mean, in the directions along which they differ most, normalised."""

    mean: np.ndarray  # [D]
    axes: np.ndarray  # [D, d]

    @staticmethod
    def fit(features: np.ndarray, width: int = WIDTH) -> Space:
        """From a sample of features [n, D]: at most `width` principal directions."""
        mean = features.mean(axis=0)
        centered = features - mean
        values, vectors = np.linalg.eigh(centered.T @ centered)
        keep = values[::-1] > 1e-7 * values[-1]
        keep[0] = True  # of equal images there is no direction: every cosine is 0
        axes = vectors[:, ::-1][:, keep][:, : min(width, max(1, len(features) - 1))]
        return Space(mean, np.ascontiguousarray(axes, dtype=np.float32))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Features [n, D] as unit vectors [n, d], float32."""
        projected = (features - self.mean) @ self.axes
        unit: np.ndarray = projected / (np.linalg.norm(projected, axis=1, keepdims=True) + 1e-8)
        return unit


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingExtraError("finding near-duplicates", "faiss-cpu", "data") from None
    return faiss


class Index:
    """Unit vectors, found by cosine: exact for few; for many in cells of like ones, a byte per value."""

    def __init__(self, space: Space, blocks: Blocks, count: int, seed: int = 0) -> None:
        """Of the images 0 to `count` - 1."""
        faiss = _faiss()
        width = space.axes.shape[1]
        if count <= EXACT:
            self._index = faiss.IndexFlatIP(width)
        else:
            cells = int(4 * np.sqrt(count))
            self._index = faiss.index_factory(width, f"IVF{cells},SQ8", faiss.METRIC_INNER_PRODUCT)
            some = np.sort(np.random.default_rng(seed).choice(count, min(count, 40 * cells), replace=False))
            self._index.train(np.concatenate([space(block) for block in blocks(some)]))
            self._index.nprobe = PROBES
        for block in blocks(np.arange(count)):
            self._index.add(space(block))

    def search(self, vectors: np.ndarray, neighbours: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest images of each vector and their cosines, [n, k] both; number -1 where there are fewer."""
        cosines, numbers = self._index.search(vectors, neighbours)
        return numbers, cosines


@dataclass(frozen=True)
class Found:
    """P pairs of images: numbers in one set and in the other, cosine of features, agreement of pixels (each [P])."""

    one: np.ndarray
    other: np.ndarray
    cosine: np.ndarray
    match: np.ndarray

    def where(self, keep: np.ndarray) -> Found:
        """Only these pairs."""
        return Found(self.one[keep], self.other[keep], self.cosine[keep], self.match[keep])


def candidates(
    space: Space,
    queries: Iterable[tuple[np.ndarray, np.ndarray]],
    index: Index,
    *,
    neighbours: int,
    min_cosine: float,
    within: bool,
) -> Iterator[Found]:
    """Pairs to look at, block by block: each query's nearest images above the least cosine.

    `queries` are numbers [n] with raw features [n, D]. `within`: the index holds the queries themselves; each pair is
    given once, its smaller number first, and none with itself. (A pair that only the larger number's neighbours have
    is given from that side.)
    """
    for numbers, features in queries:
        found, cosines = index.search(space(features), neighbours + within)
        one = np.repeat(numbers, found.shape[1])
        other, cosine = found.ravel().astype(np.int64), cosines.ravel()
        keep = (other >= 0) & (cosine >= min_cosine)
        if within:
            keep &= one != other
        one, other, cosine = one[keep], other[keep], cosine[keep]
        if within:
            one, other = np.minimum(one, other), np.maximum(one, other)
        yield Found(one, other, cosine, np.zeros(len(one), np.float32))


def once(found: Found) -> Found:
    """Each pair once."""
    _, first = np.unique(np.stack([found.one, found.other]), axis=1, return_index=True)
    return found.where(np.sort(first))


def verify(
    found: Found,
    one: np.ndarray,
    other: np.ndarray,
    areas: tuple[np.ndarray, np.ndarray],
    *,
    workers: int = 1,
    block: int = 256,
) -> Iterator[np.ndarray]:
    """The agreement of the pairs' pixels, block by block; `one` and `other` are the sets' thumbnails [n, S, S].

    The picture with more pixels (`areas`, one array for each set) is the one that the other is aligned to: a crop has
    fewer. Each of `workers` threads takes a block of its own and computes alone: threads that share such small arrays
    wait for each other.
    """

    def work(start: int) -> np.ndarray:
        torch.set_num_threads(1)
        left, right = found.one[start : start + block], found.other[start : start + block]
        swap = (areas[0][left] < areas[1][right])[:, None, None]
        return agreement(np.where(swap, other[right], one[left]), np.where(swap, one[left], other[right]))

    yield from map_ahead(work, range(0, len(found.one), block), workers, ahead=2 * workers)


def same_content(one: Sequence[str], other: Sequence[str]) -> np.ndarray:
    """For each of n hashes the number of the first of the others that equals it, else -1: [n]; "" equals nothing."""
    place = {value: number for number, value in reversed(list(enumerate(other))) if value}
    return np.array([place.get(value, -1) for value in one], np.int64)


def groups(count: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """For each of `count` images the smallest number among those that pairs connect it with: [count]."""
    smallest: np.ndarray = np.arange(count)
    while True:
        before = smallest.copy()
        both = np.minimum(smallest[one], smallest[other])
        np.minimum.at(smallest, one, both)
        np.minimum.at(smallest, other, both)
        smallest = np.take(smallest, smallest)
        if np.array_equal(before, smallest):
            return smallest


def stays(group: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """For each of n images the one of its group that stays, the largest, of equally large ones the first: [n]."""
    order = np.lexsort((np.arange(len(group)), -areas, group))
    first = np.r_[True, group[order][1:] != group[order][:-1]] if len(group) else np.zeros(0, bool)
    best = np.zeros(len(group), np.int64)
    best[group[order][first]] = order[first]
    found: np.ndarray = best[group]
    return found
