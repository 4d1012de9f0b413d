"""Codes: raw features in 8 bits a number, cell by cell, so that what a search looks at lies side by side on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from litune.files import atomic
from litune.index.cells import Cells, Features, blocks

SAMPLED = 16384
"""Rows whose least and largest numbers say what 8 bits have to cover."""


@dataclass
class Codes:
    """`values` [n, W], uint8, of the rows in the order of the cells; a feature is about low + step × value."""

    file: Path
    values: np.ndarray
    low: np.ndarray
    step: np.ndarray

    def features(self, places: np.ndarray) -> np.ndarray:
        """Approximate raw float32 features [n, W] of the rows at these places of `Cells.order`."""
        found: np.ndarray = self.values[places].astype(np.float32)
        found *= self.step
        found += self.low
        return found


def open_codes(file: Path, low: np.ndarray, step: np.ndarray, rows: int) -> Codes | None:
    """The codes that `write_codes` wrote, memory-mapped; None where they are gone, or not those of so many rows."""
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    fits = values.dtype == np.uint8 and values.shape == (rows, len(low))
    return Codes(file, values, low, step) if fits else None


def write_codes(file: Path, features: Features, cells: Cells, advance: Callable[[int], None]) -> Codes:
    """Write the codes of all rows that are in cells. Reads the rows in order, and keeps none of them in memory.

    `advance` is told of each row that was written.
    """
    order = cells.order
    sample = features(np.sort(order[:: max(1, len(order) // SAMPLED)]))
    low = sample.min(0)
    step = np.maximum((sample.max(0) - low) / 255, np.finfo(np.float32).tiny)
    place = np.empty(len(cells.cell), dtype=np.int64)
    place[order] = np.arange(len(order))
    with atomic(file) as temporary:
        values = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(order), len(low)))
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, where in mapped memory it ends the process
            with open(temporary, "rb+") as whole:
                os.posix_fallocate(whole.fileno(), 0, temporary.stat().st_size)
        for rows in blocks(np.sort(order)):
            values[place[rows]] = np.clip(np.rint((features(rows) - low) / step), 0, 255).astype(np.uint8)
            advance(len(rows))
        values.flush()
        del values
    return Codes(file, np.load(file, mmap_mode="r", allow_pickle=False), low, step)
