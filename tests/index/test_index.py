from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import random_store

from litune.index import nearest_images


class _Plain:
    """A model whose image features are the raw ones, normalised."""

    def encode_features(self, raw: np.ndarray) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.from_numpy(raw))


# Without the check of types: what is searched needs no whole model.
unchecked = getattr(nearest_images, "__wrapped__", nearest_images)


@pytest.mark.parametrize("block", [3, 7, 100])
def test_against_the_full_matrix(tmp_path: Path, block: int) -> None:
    store = random_store(tmp_path, 40, 6)
    queries = torch.nn.functional.normalize(torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
    found = unchecked(_Plain(), store, queries, 5, block)
    scores = queries @ _Plain().encode_features(store.features(slice(None))).T
    best = scores.topk(5, dim=1)
    for row, values, order in zip(found, best.values, best.indices, strict=True):
        assert [f.row for f in row] == order.tolist()
        assert [f.score for f in row] == pytest.approx(values.tolist(), abs=1e-6)
        assert row[0].key == f"{row[0].row}.png"


def test_more_than_there_are(tmp_path: Path) -> None:
    store = random_store(tmp_path, 4, 6)
    assert len(unchecked(_Plain(), store, torch.ones(1, 6), 10)[0]) == 4
