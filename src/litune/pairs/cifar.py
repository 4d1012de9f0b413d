"""CIFAR's Python batches: arrays of pixels in pickles, of which a row is a picture that a reference can point to."""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from litune.errors import DataError
from litune.pairs.address import open_file

SIDE = 32
VALUES = 3 * SIDE * SIDE
_reading = threading.Lock()


@dataclass(frozen=True)
class Pixels:
    """A picture in one of CIFAR's batches: a row of its array."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}::{self.row}::pixels"


def read_pixels(place: Pixels) -> bytes:
    """The values of a picture, 3 × 32 × 32 bytes, channel by channel. Raises `DataError` where they are not there."""
    with _reading:  # two threads would both read all of the file
        data = _pixels_of(place.file)
    if place.row >= len(data):
        raise DataError(f"{place.file} has changed: it has no row {place.row} any more")
    values: bytes = data[place.row].tobytes()
    return values


def read_png(place: Pixels) -> bytes:
    """The picture as PNG, which keeps every value. Raises as `read_pixels`."""
    values = np.frombuffer(read_pixels(place), np.uint8).reshape(3, SIDE, SIDE)
    out = io.BytesIO()
    Image.fromarray(values.transpose(1, 2, 0)).save(out, "PNG", compress_level=1)
    return out.getvalue()


@lru_cache(maxsize=2)  # the last pictures of one file are read beside the first ones of the next
def _pixels_of(file: str) -> np.ndarray:
    return pixels_in(file, read_batch(file))


def pixels_in(file: Path | str, batch: Mapping[str, Any]) -> np.ndarray:
    """The array of a batch, uint8 [N, 3 · 32 · 32]. Raises `DataError` where it has none."""
    data = batch.get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != VALUES:
        raise DataError(f"{file} has no data of 3 × 32 × 32 pixels")
    return data


class _ArraysOnly(pickle.Unpickler):
    """Reads pickles of plain values and NumPy arrays; whatever else a pickle asks for is refused, not called."""

    ALLOWED: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): lambda text, encoding: text.encode(encoding),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.ALLOWED[module, name]


def read_batch(file: Path | str) -> dict[str, Any]:
    """One of CIFAR's Python batches. Raises `DataError` for a pickle of anything but plain values and arrays."""
    try:
        with open_file(str(file)) as data:
            batch = _ArraysOnly(data, encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    except OSError as why:
        raise DataError(f"{file} can't be read: {why.strerror}") from None
    except Exception as why:  # a damaged pickle raises whatever it meets
        raise DataError(
            f"{file} is not one of CIFAR's batches ({why}): litune reads plain arrays out of pickles and nothing else; "
            "fetch it again, or save the images as class folders"
        ) from None
