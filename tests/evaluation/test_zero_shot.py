from __future__ import annotations

import pytest
import torch

from litune.errors import DataError
from litune.evaluation.zero_shot import accuracy


def test_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.1], [0.5, 0.5, 0.1], [0.1, 0.2, 0.3]])
    found = accuracy(scores, torch.tensor([0, 0, 0, 2]))
    # Right, wrong, a tie (against the model), right; class 0 has one of three, class 2 one of one, class 1 none.
    assert found["accuracy"] == 0.5
    assert found["mean_per_class"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["chance"] == pytest.approx(1 / 3)
    assert "top5" not in found


def test_top5() -> None:
    scores = torch.arange(7.0).flip(0)[None].repeat(2, 1)
    assert accuracy(scores, torch.tensor([4, 5]))["top5"] == 0.5


def test_not_finite() -> None:
    with pytest.raises(DataError, match="not finite"):
        accuracy(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]))
