"""Cells: a partition of raw features by k-means, so that a query looks at the nearest cells only."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from litune.errors import MissingExtraError

BLOCK = 16384
TRAINED_ON = 48
"""Rows per cell that k-means looks at."""
ROUNDS = 10

Features = Callable[[np.ndarray], np.ndarray]
"""Rows [n] into their raw features [n, W]."""


@dataclass
class Cells:
    """Which of C cells each of N rows lies in.

    `centroids` [C, W] are means of raw features and `mean` [W] that of all; `cell` [N] is −1 for a row that was removed
    before the cells were made.
    """

    centroids: np.ndarray
    mean: np.ndarray
    cell: np.ndarray

    def __len__(self) -> int:
        return len(self.centroids)

    @cached_property
    def order(self) -> np.ndarray:
        """All rows that are in a cell, cell by cell, and in the store's order within one."""
        return np.argsort(self.cell, kind="stable")[int((self.cell < 0).sum()) :]

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where each cell begins in `order` [C + 1]."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.cell[self.cell >= 0], minlength=len(self)))])

    @cached_property
    def _directions(self) -> np.ndarray:
        return directions(self.centroids, self.mean)

    def places(self, cells: np.ndarray) -> np.ndarray:
        """Where in `order` the rows of these cells are, ascending."""
        starts = self._starts
        return np.concatenate([np.arange(starts[c], starts[c + 1]) for c in np.sort(cells).tolist()])

    def count(self) -> np.ndarray:
        """How many rows each cell has [C], removed ones included."""
        return np.diff(self._starts)

    def assign(self, raw: np.ndarray) -> np.ndarray:
        """The nearest cell of each of n raw features [n, W]."""
        found: np.ndarray = (directions(raw, self.mean) @ self._directions.T).argmax(1).astype(np.int32)
        return found

    def with_rows(self, cell: np.ndarray) -> Cells:
        """The same cells, with other rows in them."""
        return Cells(self.centroids, self.mean, cell)


def directions(raw: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Raw features as directions of length one, seen from their mean."""
    centered = raw - mean
    found: np.ndarray = centered / np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-8)
    return found


def usual_cells(rows: int) -> int:
    """How many cells N rows get: 2√N, so that finding the cells and reading some of them cost about the same."""
    return max(1, round(2 * math.sqrt(rows)))


def make_cells(features: Features, there: np.ndarray, cells: int, seed: int, advance: Callable[[int], None]) -> Cells:
    """Partition the rows of the mask `there` [N] into at most `cells` cells by spherical k-means (faiss).

    The directions of features as seen from their mean are what is grouped: cosines after centring are what most runs
    compare. Memory is that of the sample: some 48 rows per cell. `advance` is told of each row that got its cell.

    Raises `MissingExtraError` without faiss.
    """
    faiss = import_faiss()
    rows = np.flatnonzero(there)
    random = np.random.default_rng(seed)
    sample = np.sort(random.permutation(rows)[: TRAINED_ON * cells])
    raw = features(sample)
    mean = raw.mean(0, dtype=np.float64).astype(np.float32)
    count = min(cells, len(sample))
    kmeans = faiss.Kmeans(
        raw.shape[1], count, niter=ROUNDS, spherical=True, seed=seed, min_points_per_centroid=1,
        max_points_per_centroid=TRAINED_ON + 1,
    )  # fmt: skip
    kmeans.train(directions(raw, mean))
    cell = np.full(len(there), -1, dtype=np.int32)
    sums, counts = np.zeros((count, raw.shape[1])), np.zeros(count, dtype=np.int64)
    del raw
    for block in blocks(rows):
        raw = features(block)
        found = kmeans.index.search(directions(raw, mean), 1)[1][:, 0]
        cell[block] = found
        order = np.argsort(found, kind="stable")
        here, starts = np.unique(found[order], return_index=True)
        sums[here] += np.add.reduceat(raw[order], starts, axis=0)
        counts += np.bincount(found, minlength=count)
        advance(len(block))
    used = np.flatnonzero(counts)
    number = np.full(count + 1, -1, dtype=np.int32)  # the last entry is that of −1
    number[used] = np.arange(len(used))
    centroids = (sums[used] / counts[used, None]).astype(np.float32)
    return Cells(centroids, mean, number[cell])


def blocks(rows: np.ndarray, size: int = BLOCK) -> Iterator[np.ndarray]:
    """Rows in blocks."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def import_faiss() -> Any:
    """The faiss module. Raises `MissingExtraError` where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its SWIG types lack a __module__
            import faiss
    except ImportError:
        raise MissingExtraError("an approximate index", "faiss-cpu", "search") from None
    return faiss
