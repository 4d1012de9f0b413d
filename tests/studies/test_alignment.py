from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch.nn import functional as F

from litune.studies import alignment


def some(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))


def test_neighbours_by_sorting() -> None:
    one, other = some(40, 6), some(40, 9, seed=1)
    expected = []
    for i in range(40):
        rows = [j for j in range(40) if j != i]
        near = [set(sorted(rows, key=lambda j, f=f, i=i: -float(f[i] @ f[j]))[:5]) for f in (one, other)]
        expected.append(len(near[0] & near[1]) / 5)
    np.testing.assert_allclose(alignment.mutual_neighbours(one, other, 5), expected)
    assert alignment.mutual_neighbours(one, one, 5).min() == 1
    turned = one @ torch.linalg.qr(some(6, 6, seed=2))[0]
    assert alignment.mutual_neighbours(one, turned, 5).mean() == 1


def test_relative_features_match_across_turned_spaces() -> None:
    """A space and the same one turned describe everything alike relative to common anchors."""
    images = some(300, 8)
    texts = images @ torch.linalg.qr(some(8, 8, seed=3))[0]
    one, other = (alignment.relative(f[100:], f[:100]) for f in (images, texts))
    torch.testing.assert_close(one, other, atol=1e-3, rtol=0)
    assert int((one[0] > 0).sum()) == 5
    best = sorted((images[100] @ images[:100].T).tolist())[-5:]
    expected = np.array(best) ** 8
    np.testing.assert_allclose(
        sorted(one[0][one[0] > 0].tolist()), expected / np.linalg.norm(expected), rtol=1e-3, atol=1e-5
    )


def test_ridge_map_against_sklearn() -> None:
    texts, images = some(60, 7), some(60, 5, seed=1)
    penalty = 0.3 * float((texts.T @ texts).diagonal().mean())
    reference = Ridge(alpha=penalty, fit_intercept=False).fit(texts.numpy(), images.numpy())
    np.testing.assert_allclose(alignment.ridge_map(texts, images, 0.3).numpy(), reference.coef_.T, atol=1e-5)


def test_strength_is_chosen_on_images_that_were_not_learned_from() -> None:
    """Pure noise asks for the strongest holding back that is no worse; a clean map for little."""
    owner = torch.arange(150).repeat_interleave(2)
    images = some(150, 40)
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(4))
    clean = F.normalize(images[owner] @ matrix)
    assert alignment.best_strength(clean, images, owner, seed=0) <= 0.01
    noisy = F.normalize(clean + 4 * some(300, 30, seed=5))
    assert alignment.best_strength(noisy, images, owner, seed=0) >= 0.01


@pytest.mark.parametrize("ties", [False, True])
def test_ranks_by_sorting(ties: bool) -> None:
    images, texts, owner = some(20, 5), some(30, 5, seed=1), torch.arange(30) % 20
    if ties:
        images, texts = images.sign(), texts.sign()
    expected = []
    for text, own in zip(texts, owner.tolist(), strict=True):
        order = sorted(range(20), key=lambda i, t=text, o=own: (-float(t @ images[i]), i == o))
        expected.append(order.index(own))
    assert alignment.image_ranks(images, texts, owner).tolist() == expected
