from __future__ import annotations

import pytest
import torch

from litune.tuning.losses import Ids, MoreImages, sigmoid_loss, softmax_loss
from litune.tuning.pair_losses import pair_losses
from litune.vectors import normalize


def features(seed: int, rows: int) -> torch.Tensor:
    return normalize(torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))


@pytest.mark.parametrize("chunk", [4, 100])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("more", [True, False])
def test_their_mean_is_the_softmax_loss(chunk: int, masked: bool, more: bool) -> None:
    images, texts, scale = features(0, 11), features(1, 11), torch.tensor(7.0, dtype=torch.float64)
    ids = Ids(torch.arange(11) // 2, torch.arange(11) % 4) if masked else None
    others = MoreImages(
        features(2, 5), torch.tensor([0, 20, 21, 22, 3]), torch.tensor([[1, -1], [3, 2]] + [[-1, -1]] * 3)
    )
    settings = {"image_to_text": 0.3, "ids": ids, "more_images": others if more else None}
    found = pair_losses(images, texts, scale, chunk=chunk, **settings)
    assert found.mean().item() == pytest.approx(softmax_loss(images, texts, scale, **settings).item(), rel=1e-12)
    assert found.std() > 0


@pytest.mark.parametrize("masked", [True, False])
def test_their_mean_is_the_sigmoid_loss(masked: bool) -> None:
    images, texts = features(0, 11), features(1, 11)
    scale, bias = torch.tensor(7.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    ids = Ids(torch.arange(11) // 2, torch.arange(11) % 4) if masked else None
    found = pair_losses(images, texts, scale, bias=bias, ids=ids, chunk=4)
    assert found.mean().item() == pytest.approx(sigmoid_loss(images, texts, scale, bias, ids=ids).item(), rel=1e-12)


def test_one_pair_by_hand() -> None:
    """Pair 0 of two: its two log-softmaxes, written out."""
    images, texts = features(0, 2), features(1, 2)
    scores = 3.0 * images @ texts.T
    there = -torch.log(scores[0, 0].exp() / scores[0].exp().sum())
    back = -torch.log(scores[0, 0].exp() / scores[:, 0].exp().sum())
    found = pair_losses(images, texts, torch.tensor(3.0, dtype=torch.float64), image_to_text=0.25)
    assert found[0].item() == pytest.approx((0.25 * there + 0.75 * back).item())
