"""Search: the images of a feature store whose features are nearest to a query's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from litune.features import FeatureStore
from litune.model import LiT


@dataclass(frozen=True)
class Found:
    """One image found: its row in the store, its path, its cosine similarity with the query."""

    row: int
    key: str
    path: str
    score: float


def nearest_images(
    model: LiT, store: FeatureStore, queries: Float[Tensor, "Q D"], top: int, block: int = 16384
) -> list[list[Found]]:
    """For each of Q query features, the `top` images of the store with the highest cosine similarity, best first.

    Exact; reads the store block by block, so that memory is flat. Equal scores keep the store's order.
    """
    best = torch.empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64)
    for start in range(0, len(store), block):
        raw = store.features(slice(start, min(start + block, len(store))))
        scores = queries @ model.encode_features(raw).T
        best = torch.cat([best, scores], dim=1)
        rows = torch.cat([rows, torch.arange(start, start + len(raw)).expand(len(queries), -1)], dim=1)
        order = best.argsort(dim=1, descending=True, stable=True)[:, :top]
        best, rows = best.gather(1, order), rows.gather(1, order)
    keys, paths = store.metadata["key"], store.metadata["image_path"]
    return [
        [Found(r, keys[r].as_py(), paths[r].as_py(), s) for r, s in zip(row, score, strict=True)]
        for row, score in zip(np.asarray(rows).tolist(), best.tolist(), strict=True)
    ]
