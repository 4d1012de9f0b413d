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
"""Principal directions along which features are compared."""
EXACT = 50_000
"""Up to this many images the index is exact, beyond that approximate."""
PROBES = 16
BLOCK = 8192

Blocks = Callable[[np.ndarray], Iterator[np.ndarray]]
"""Maps image numbers to their raw features, block by block."""


@dataclass(frozen=True)
class Space:
    """The space in which features are compared: centred, projected on their principal directions, normalised."""

    mean: np.ndarray  # [D]
    axes: np.ndarray  # [D, d]

    @staticmethod
    def fit(features: np.ndarray, width: int = WIDTH) -> Space:
        """From a sample of features [n, D]: at most `width` principal directions."""
        mean = features.mean(axis=0)
        centered = features - mean
        values, vectors = np.linalg.eigh(centered.T @ centered)
        keep = values[::-1] > 1e-7 * values[-1]
        keep[0] = True  # equal images have no direction left: every cosine is then 0
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


class NeighbourIndex:
    """Nearest neighbours of unit vectors by cosine: exact for few; for many in cells, with a byte per value."""

    def __init__(self, space: Space, blocks: Blocks, count: int, seed: int = 0) -> None:
        """Index the images 0 to `count` - 1."""
        faiss = _faiss()
        width = space.axes.shape[1]
        if count <= EXACT:
            self._index = faiss.IndexFlatIP(width)
        else:
            cells = int(4 * np.sqrt(count))
            self._index = faiss.index_factory(width, f"IVF{cells},SQ8", faiss.METRIC_INNER_PRODUCT)
            sample = np.sort(np.random.default_rng(seed).choice(count, min(count, 40 * cells), replace=False))
            self._index.train(np.concatenate([space(block) for block in blocks(sample)]))
            self._index.nprobe = PROBES
        for block in blocks(np.arange(count)):
            self._index.add(space(block))

    def search(self, vectors: np.ndarray, neighbours: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest images of each vector and their cosines, [n, k] both; number -1 where there are fewer."""
        cosines, numbers = self._index.search(vectors, neighbours)
        return numbers, cosines


@dataclass(frozen=True)
class DuplicatePairs:
    """P pairs of images: numbers in one set and in the other, cosine of features, agreement of pixels (each [P])."""

    left: np.ndarray
    right: np.ndarray
    cosine: np.ndarray
    match: np.ndarray

    def where(self, keep: np.ndarray) -> DuplicatePairs:
        """Only these pairs."""
        return DuplicatePairs(self.left[keep], self.right[keep], self.cosine[keep], self.match[keep])


def candidates(
    space: Space,
    queries: Iterable[tuple[np.ndarray, np.ndarray]],
    index: NeighbourIndex,
    *,
    neighbours: int,
    min_cosine: float,
    within: bool,
) -> Iterator[DuplicatePairs]:
    """Candidate pairs, block by block: each query's nearest images of at least the cosine `min_cosine`.

    `queries` are numbers [n] with raw features [n, D]. `within`: the index holds the queries themselves; a pair has
    its smaller number first, and no image is paired with itself.
    """
    for numbers, features in queries:
        neighbour_numbers, cosines = index.search(space(features), neighbours + within)
        left = np.repeat(numbers, neighbour_numbers.shape[1])
        right, cosine = neighbour_numbers.ravel().astype(np.int64), cosines.ravel()
        keep = (right >= 0) & (cosine >= min_cosine)
        if within:
            keep &= left != right
        left, right, cosine = left[keep], right[keep], cosine[keep]
        if within:
            left, right = np.minimum(left, right), np.maximum(left, right)
        yield DuplicatePairs(left, right, cosine, np.zeros(len(left), np.float32))


def once(pairs: DuplicatePairs) -> DuplicatePairs:
    """The pairs without repetitions."""
    _, first = np.unique(np.stack([pairs.left, pairs.right]), axis=1, return_index=True)
    return pairs.where(np.sort(first))


def verify(
    pairs: DuplicatePairs,
    left: np.ndarray,
    right: np.ndarray,
    areas: tuple[np.ndarray, np.ndarray],
    *,
    workers: int = 1,
    block: int = 256,
) -> Iterator[np.ndarray]:
    """The agreement of the pairs' pixels, block by block; `left` and `right` are the sets' thumbnails [n, S, S].

    The picture with fewer pixels (`areas`, one array for each set) is aligned to the other: a crop has fewer. Each of
    `workers` threads computes a block of its own on one core: threads that share such small arrays only wait for each
    other.
    """

    def work(start: int) -> np.ndarray:
        torch.set_num_threads(1)
        i, j = pairs.left[start : start + block], pairs.right[start : start + block]
        swap = (areas[0][i] < areas[1][j])[:, None, None]
        return agreement(np.where(swap, right[j], left[i]), np.where(swap, left[i], right[j]))

    yield from map_ahead(work, range(0, len(pairs.left), block), workers, ahead=2 * workers)


def same_content(hashes: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """For each of n hashes the position of the first of `others` that equals it, else -1: [n]; "" equals nothing."""
    first = {value: number for number, value in reversed(list(enumerate(others))) if value}
    return np.array([first.get(value, -1) for value in hashes], np.int64)


def groups(count: int, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """For each of `count` images, the smallest number in its connected component of the pairs: [count]."""
    smallest: np.ndarray = np.arange(count)
    while True:
        before = smallest.copy()
        lower = np.minimum(smallest[left], smallest[right])
        np.minimum.at(smallest, left, lower)
        np.minimum.at(smallest, right, lower)
        smallest = np.take(smallest, smallest)
        if np.array_equal(before, smallest):
            return smallest


def stays(group: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """For each of n images, the image of its group that stays: the largest, or the first of several as large: [n]."""
    order = np.lexsort((np.arange(len(group)), -areas, group))
    first = np.r_[True, group[order][1:] != group[order][:-1]] if len(group) else np.zeros(0, bool)
    best = np.zeros(len(group), np.int64)
    best[group[order][first]] = order[first]
    staying: np.ndarray = best[group]
    return staying
