"""The hub correction against CSLS written out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from litune.model import hubs
from litune.model.hubs import Bank, as_candidates, as_queries, corrections
from litune.vectors import normalize


def unit(rows: int, seed: int) -> torch.Tensor:
    return normalize(torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed)))


def reference(candidates: torch.Tensor, queries: torch.Tensor, bank: torch.Tensor) -> NDArray[np.float64]:
    """cos(q, c) − r(c) / 2, where r(c) is the mean of the ten highest cosines of c with the bank."""
    x, q, b = (side.double().numpy() for side in (candidates, queries, bank))
    nearest = np.sort(x @ b.T, axis=1)[:, -10:]
    return q @ x.T - nearest.mean(1) / 2


def test_an_inner_product_is_the_corrected_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both directions, and in blocks of any size; a query whose further dimension is 0 has the cosine."""
    images, texts = unit(70, 0), unit(50, 1)
    bank = Bank.of(unit(40, 2), unit(30, 3))
    for scores in (1 << 24, 90):
        monkeypatch.setattr(hubs, "SCORES", scores)
        of_images = as_queries(texts) @ as_candidates(images, bank.texts).T
        assert np.allclose(of_images, reference(images, texts, bank.texts), atol=1e-6)
        of_texts = as_queries(images) @ as_candidates(texts, bank.images).T
        assert np.allclose(of_texts, reference(texts, images, bank.images), atol=1e-6)
    assert torch.equal(as_queries(texts, 0.0) @ as_candidates(images, bank.texts).T, texts @ images.T)


def test_both_sides_corrected_have_the_order_of_each() -> None:
    images, texts = unit(70, 0), unit(50, 1)
    bank = Bank.of(unit(40, 2), unit(30, 3))
    of_images, of_texts = reference(images, texts, bank.texts), reference(texts, images, bank.images)
    x, t = bank.corrected(images, texts)
    both = (t @ x.T).numpy()
    assert (both.argsort(1) == of_images.argsort(1)).all()
    assert (both.T.argsort(1) == of_texts.argsort(1)).all()


def test_a_bank_of_fewer_than_ten_takes_all() -> None:
    images, few = unit(5, 0), unit(3, 1)
    assert torch.allclose(corrections(images, few), -(images @ few.T).mean(1) / 2, atol=1e-6)


def test_another_bank_has_another_digest() -> None:
    bank = Bank.of(unit(4, 0), unit(4, 1))
    assert bank.digest == Bank.of(unit(4, 0), unit(4, 1)).digest
    assert bank.digest != Bank.of(unit(4, 1), unit(4, 0)).digest
