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
"""Rows per cell in the sample that k-means is trained on."""
ROUNDS = 10

Features = Callable[[np.ndarray], np.ndarray]
"""Maps rows [n] to their raw features [n, W]."""


@dataclass
class Cells:
    """Which of C cells each of N rows lies in.

    `centroids` [C, W] are the cells' mean raw features and `mean` [W] is the mean of all; `cell` [N] is −1 for a row
    that was removed before the cells were made.
    """

    centroids: np.ndarray
    mean: np.ndarray
    cell: np.ndarray

    def __len__(self) -> int:
        return len(self.centroids)

    @cached_property
    def order(self) -> np.ndarray:
        """All rows that are in a cell, cell by cell; within a cell, in the store's order."""
        return np.argsort(self.cell, kind="stable")[int((self.cell < 0).sum()) :]

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where each cell begins in `order` [C + 1]."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.cell[self.cell >= 0], minlength=len(self)))])

    @cached_property
    def _directions(self) -> np.ndarray:
        return directions(self.centroids, self.mean)

    def positions(self, cells: np.ndarray) -> np.ndarray:
        """The positions in `order` of the rows in these cells, ascending."""
        starts = self._starts
        return np.concatenate([np.arange(starts[c], starts[c + 1]) for c in np.sort(cells).tolist()])

    def count(self) -> np.ndarray:
        """How many rows each cell has [C], removed ones included."""
        return np.diff(self._starts)

    def assign(self, raw: np.ndarray) -> np.ndarray:
        """The nearest cell of each of n raw features [n, W]."""
        cells: np.ndarray = (directions(raw, self.mean) @ self._directions.T).argmax(1).astype(np.int32)
        return cells

    def with_rows(self, cell: np.ndarray) -> Cells:
        """The same cells, with other rows in them."""
        return Cells(self.centroids, self.mean, cell)


def directions(raw: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Raw features minus their mean, at unit length."""
    centered = raw - mean
    unit: np.ndarray = centered / np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-8)
    return unit


def usual_cells(rows: int) -> int:
    """The default number of cells for N rows: 2√N, where finding the cells and reading some cost about the same."""
    return max(1, round(2 * math.sqrt(rows)))


def make_cells(features: Features, there: np.ndarray, cells: int, seed: int, advance: Callable[[int], None]) -> Cells:
    """Partition the rows of the mask `there` [N] into at most `cells` cells by spherical k-means (faiss).

    The directions of centred features are clustered, since most runs compare cosines after centring. Memory is that of
    the sample: about 48 rows per cell. `advance` is called with the number of rows that were assigned.

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
        assigned = kmeans.index.search(directions(raw, mean), 1)[1][:, 0]
        cell[block] = assigned
        order = np.argsort(assigned, kind="stable")
        present, starts = np.unique(assigned[order], return_index=True)
        sums[present] += np.add.reduceat(raw[order], starts, axis=0)
        counts += np.bincount(assigned, minlength=count)
        advance(len(block))
    used = np.flatnonzero(counts)
    number = np.full(count + 1, -1, dtype=np.int32)  # the last entry is for cell −1
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
