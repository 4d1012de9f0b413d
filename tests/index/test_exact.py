from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from litune.index.exact import QUERIES, best_of


@pytest.mark.parametrize("top", [1, 5, 60, 100])
@pytest.mark.parametrize("block", [1, 7, 60])
def test_the_best_by_sorting(top: int, block: int) -> None:
    """Scores of both signs, of which many are equal and some zero, in rows with gaps; more queries than go at once."""
    random = np.random.default_rng(0)
    rows = np.sort(random.permutation(1000)[:60])
    features = random.integers(-2, 3, (60, 3)).astype(np.float32)
    queries = random.integers(-2, 3, (2 * QUERIES + 1, 3)).astype(np.float32)

    def parts() -> Iterator[tuple[np.ndarray, torch.Tensor]]:
        for start in range(0, 60, block):
            yield rows[start : start + block], torch.from_numpy(features[start : start + block])

    found = best_of(parts(), torch.from_numpy(queries), top)
    for query, scores, places in zip(queries, *found, strict=True):
        pairs = sorted((-float(query @ one), row) for one, row in zip(features, rows.tolist(), strict=True))[:top]
        assert list(zip((-scores).tolist(), places.tolist(), strict=True)) == pairs


def test_scores_come_back_to_the_bit() -> None:
    values = torch.tensor([3.0e38, torch.inf, -torch.inf, 1e-45, -1e-45, 0.1, -0.1, 1 / 3])
    scores, rows = best_of(iter([(np.arange(8) + 2**31, values[:, None])]), torch.ones(1, 1), 8)
    order = values.argsort(descending=True)
    assert torch.equal(scores[0], values[order])
    assert torch.equal(rows[0], order + 2**31)


def test_no_images() -> None:
    scores, rows = best_of(iter([]), torch.ones(2, 3), 4)
    assert [len(one) for one in (*scores, *rows)] == [0, 0, 0, 0]
