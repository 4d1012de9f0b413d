"""Contamination: evaluation images that are among those that were tuned on.

Images are compared by the bytes of their files and by their features: resized, re-encoded and slightly cropped copies
have other bytes and almost the same features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.nn import functional as F

from litune.errors import DataError
from litune.image.tower import MadeWith, check_same_tower
from litune.progress import track
from litune.store.store import FeatureStore

THRESHOLD = 0.8
"""Cosine from which two images count as copies (see docs/results-evaluation.md for how it was set)."""
BLOCK = 4096

DEFINITION = (
    "exact: the file's SHA-256 is that of an image that was tuned on; near: the highest cosine with the features of an "
    "image that was tuned on, both after subtracting the tuned images' mean, is at least the threshold."
)


def overlap(
    tuned: FeatureStore,
    hashes: Sequence[str],
    features: np.ndarray | None,
    *,
    keys: Sequence[str] | None = None,
    rows: np.ndarray | None = None,
    threshold: float = THRESHOLD,
) -> dict[str, Any]:
    """Which of B evaluation images are in the store that was tuned on, with the keys of both.

    `hashes` [B] are the SHA-256 of their files ("" where unknown), `features` [B, D] the raw features of the same
    tower (None: look at bytes only), `keys` [B] their names (their numbers by default). `rows` are the store's rows
    that were tuned on, all by default. Reads the store block by block. Raises `StoreError` for features of another
    width, `DataError` where the numbers of images differ.
    """
    names = [str(i) for i in range(len(hashes))] if keys is None else list(keys)
    if len(names) != len(hashes) or (features is not None and len(features) != len(hashes)):
        raise DataError("contamination needs one hash, one key and one row of features for each image")
    if features is not None:
        evaluated = MadeWith("the evaluation", None, features.shape[1])
        check_same_tower(tuned.made_with, evaluated, "near duplicates are found by features of one tower")
    rows = np.arange(len(tuned)) if rows is None else rows
    known = "sha256" in tuned.metadata.column_names
    exact = _same_bytes(tuned, rows, hashes) if known else {}
    near = {} if features is None else _near(tuned, rows, features, threshold)
    tuned_keys = tuned.metadata["key"]
    exact_pairs = [{"image": names[i], "tuned": str(tuned_keys[row].as_py())} for i, row in exact.items()]
    near_pairs = [
        {"image": names[i], "tuned": str(tuned_keys[row].as_py()), "cosine": round(cosine, 4)}
        for i, (row, cosine) in near.items()
        if i not in exact
    ]
    return {
        "images": len(hashes),
        "tuned_images": len(rows),
        "hashes_compared": sum(map(bool, hashes)) if known else 0,
        "features_compared": 0 if features is None else len(features),
        "threshold": threshold,
        "exact": exact_pairs,
        "near": near_pairs,
        "warning": _warning(len(exact_pairs), len(near_pairs), len(hashes), threshold),
        "definition": DEFINITION,
    }


def overlap_with(
    tuned: Sequence[tuple[FeatureStore, np.ndarray]],
    hashes: Sequence[str],
    features: np.ndarray | None,
    *,
    keys: Sequence[str],
    threshold: float = THRESHOLD,
) -> dict[str, Any]:
    """`overlap` with all stores that were tuned on together, each with its rows."""
    parts = [overlap(store, hashes, features, keys=keys, rows=rows, threshold=threshold) for store, rows in tuned]
    exact = [pair for part in parts for pair in part["exact"]]
    same = {pair["image"] for pair in exact}
    near = [pair for part in parts for pair in part["near"] if pair["image"] not in same]
    return parts[0] | {
        "tuned_images": sum(part["tuned_images"] for part in parts),
        "hashes_compared": max(part["hashes_compared"] for part in parts),
        "exact": exact,
        "near": near,
        "warning": _warning(len(same), len({pair["image"] for pair in near}), len(hashes), threshold),
    }


def _warning(exact: int, near: int, images: int, threshold: float) -> str:
    """One line where images overlap, else ""."""
    if not exact + near:
        return ""
    return (
        f"{exact + near:,} of {images:,} evaluation images may have been tuned on ({exact:,} have the same bytes, "
        f"{near:,} more a cosine of {threshold} or higher): look at the pairs; copies flatter the model"
    )


def _same_bytes(tuned: FeatureStore, rows: np.ndarray, hashes: Sequence[str]) -> dict[int, int]:
    """Image → the first row of the store whose file has the same hash."""
    tuned_hashes = tuned.metadata["sha256"].take(pa.array(rows))
    same = np.flatnonzero(
        pc.is_in(tuned_hashes, value_set=pa.array(sorted({h for h in hashes if h}), pa.string())).to_numpy()
    )
    first: dict[str, int] = {}
    for row, digest in zip(rows[same].tolist(), tuned_hashes.take(pa.array(same)).to_pylist(), strict=True):
        first.setdefault(digest, row)
    return {i: first[digest] for i, digest in enumerate(hashes) if digest in first}


def _near(
    tuned: FeatureStore, rows: np.ndarray, features: np.ndarray, threshold: float
) -> dict[int, tuple[int, float]]:
    """Image → the nearest row of the store and their cosine, where that is at least the threshold."""
    mean = np.zeros(tuned.width)
    for block in tuned.blocks(rows, BLOCK):
        mean += block.sum(axis=0, dtype=np.float64)
    center = torch.from_numpy(mean / max(1, len(rows))).float()
    best, nearest = torch.full((len(features),), -torch.inf), torch.zeros(len(features), dtype=torch.int64)
    with track("looking for copies", "tuned images", len(rows)) as task:
        for number, block in enumerate(tuned.blocks(rows, BLOCK)):
            directions = _directions(block, center)
            for start in range(0, len(features), BLOCK):
                part = slice(start, start + BLOCK)
                cosine, position = (_directions(features[part], center) @ directions.T).max(1)
                closer = cosine > best[part]
                best[part] = torch.where(closer, cosine, best[part])
                nearest[part] = torch.where(closer, position + number * BLOCK, nearest[part])
            task.advance(len(directions))
    copies = torch.nonzero(best >= threshold)[:, 0].tolist()
    return {i: (int(rows[nearest[i]]), float(best[i])) for i in copies}


def _directions(raw: np.ndarray, center: Tensor) -> Tensor:
    return F.normalize(torch.from_numpy(np.asarray(raw, dtype=np.float32)) - center)
