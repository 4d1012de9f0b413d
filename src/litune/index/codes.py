"""Codes: raw features quantised to 8 bits, cell by cell, so that a search reads contiguous bytes."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from litune.files import atomic
from litune.index.cells import Cells, Features, blocks

SAMPLED = 16384
"""Rows in the sample whose minimum and maximum set the range of the 8 bits."""


@dataclass
class Codes:
    """`values` [n, W] uint8, one row per row of `Cells.order`; a feature is about low + step × value."""

    file: Path
    values: np.ndarray
    low: np.ndarray
    step: np.ndarray

    def features(self, positions: np.ndarray) -> np.ndarray:
        """Approximate raw float32 features [n, W] of the rows at these positions of `Cells.order`."""
        features: np.ndarray = self.values[positions].astype(np.float32)
        features *= self.step
        features += self.low
        return features


def open_codes(file: Path, low: np.ndarray, step: np.ndarray, rows: int) -> Codes | None:
    """The codes that `write_codes` wrote, memory-mapped; None where the file is gone or does not have `rows` rows."""
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = values.dtype == np.uint8 and values.shape == (rows, len(low))
    return Codes(file, values, low, step) if fits else None


def write_codes(file: Path, features: Features, cells: Cells, advance: Callable[[int], None]) -> Codes:
    """Write the codes of all rows that are in cells, reading the store in order, a block in memory at a time.

    `advance` is called with the number of rows that were written.
    """
    order = cells.order
    sample = features(np.sort(order[:: max(1, len(order) // SAMPLED)]))
    low = sample.min(0)
    step = np.maximum((sample.max(0) - low) / 255, np.finfo(np.float32).tiny)
    position = np.empty(len(cells.cell), dtype=np.int64)
    position[order] = np.arange(len(order))
    with atomic(file) as temporary:
        values = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(order), len(low)))
        if hasattr(os, "posix_fallocate"):  # a full disk raises here; in mapped memory it would kill the process
            with open(temporary, "rb+") as output:
                os.posix_fallocate(output.fileno(), 0, temporary.stat().st_size)
        for rows in blocks(np.sort(order)):
            values[position[rows]] = np.clip(np.rint((features(rows) - low) / step), 0, 255).astype(np.uint8)
            advance(len(rows))
        values.flush()
        del values
    return Codes(file, np.load(file, mmap_mode="r", allow_pickle=False), low, step)
