from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from litune.losses import normalize, softmax_loss


def reference_softmax_loss(images: np.ndarray, texts: np.ndarray, scale: float) -> float:
    """The loss written out in float64, pair by pair."""
    n = len(images)
    total = 0.0
    for i in range(n):
        row = [scale * float(images[i] @ texts[j]) for j in range(n)]
        column = [scale * float(images[j] @ texts[i]) for j in range(n)]
        total += -row[i] + math.log(sum(math.exp(s) for s in row))
        total += -column[i] + math.log(sum(math.exp(s) for s in column))
    return total / (2 * n)


def test_by_hand() -> None:
    # Two pairs, orthogonal and right: each softmax is e^s / (e^s + 1).
    eye = torch.eye(2, dtype=torch.float64)
    loss = softmax_loss(eye, eye, torch.tensor(3.0, dtype=torch.float64))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-3)), abs=1e-12)
    # Swapped: the own score is 0, the other 3.
    swapped = softmax_loss(eye, eye.flip(0), torch.tensor(3.0, dtype=torch.float64))
    assert swapped.item() == pytest.approx(math.log(1 + math.exp(3)), abs=1e-12)


@pytest.mark.parametrize(("n", "d", "scale"), [(4, 8, 10.0), (7, 3, 1.0), (33, 16, 50.0)])
def test_against_float64(n: int, d: int, scale: float) -> None:
    torch.manual_seed(n)
    images, texts = (normalize(torch.randn(n, d, dtype=torch.float64)) for _ in range(2))
    expected = reference_softmax_loss(images.numpy(), texts.numpy(), scale)
    found = softmax_loss(images, texts, torch.tensor(scale, dtype=torch.float64))
    assert found.item() == pytest.approx(expected, rel=1e-12)
    single = softmax_loss(images.float(), texts.float(), torch.tensor(scale))
    assert single.item() == pytest.approx(expected, rel=1e-5)


def test_gradient() -> None:
    torch.manual_seed(0)
    images, texts = (torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda i, t, s: softmax_loss(normalize(i), normalize(t), s), (images, texts, scale))


def test_normalize() -> None:
    z = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    found = normalize(z)
    assert torch.allclose(found[0], torch.tensor([0.6, 0.8], dtype=torch.float64), atol=1e-8)
    assert found[1].tolist() == [0.0, 0.0]
    found.sum().backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()
