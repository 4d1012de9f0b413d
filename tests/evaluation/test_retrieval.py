from __future__ import annotations

import numpy as np
import pytest
import torch

from litune.errors import DataError
from litune.evaluation.retrieval import chance, rank, retrieval


def by_sorting(images: np.ndarray, texts: np.ndarray, owner: np.ndarray, k: int) -> tuple[float, float]:
    """Recall@k by sorting whole rows in float64, ties against the model."""
    scores = images @ texts.T
    hits = []
    for j, own in enumerate(owner):
        column = scores[:, j]
        order = sorted(range(len(images)), key=lambda i: (-column[i], i == own))
        hits.append(own in order[:k])
    found = []
    for i in range(len(images)):
        order = sorted(range(len(texts)), key=lambda j: (-scores[i, j], owner[j] == i))
        found.append(any(owner[j] == i for j in order[:k]))
    return float(np.mean(hits)), float(np.mean(found))


def test_by_hand() -> None:
    """Three images, four captions; the scores are written out."""
    scores = torch.tensor(
        [
            # captions: 0 and 1 of image 0, 2 of image 1, 3 of image 2
            [0.9, 0.1, 0.2, 0.3],
            [0.5, 0.6, 0.2, 0.8],
            [0.1, 0.7, 0.4, 0.3],
        ]
    )
    # Features whose products are these scores: images are rows, captions unit vectors.
    found = retrieval(scores, torch.eye(4), torch.tensor([0, 0, 1, 2]), ks=(1, 2))
    # Caption 0: its image is first. Caption 1: last. Caption 2: its image ties with another behind the first, so it is
    # last. Caption 3: its image ties with another behind the first: last.
    assert found["text_to_image"] == {"recall@1": 0.25, "recall@2": 0.25}
    # Image 0: its caption 0 is first. Image 1: its caption is last. Image 2: captions 1 and 2 are ahead of 3.
    assert found["image_to_text"] == {"recall@1": pytest.approx(1 / 3), "recall@2": pytest.approx(1 / 3)}


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("ties", [False, True])
def test_against_sorting(chunk: int, ties: bool) -> None:
    random = np.random.default_rng(3)
    images, texts = random.normal(size=(20, 5)), random.normal(size=(53, 5))
    if ties:
        images, texts = images.round(), texts.round()
    owner = np.concatenate([np.arange(20), random.integers(20, size=33)])
    found = retrieval(torch.from_numpy(images), torch.from_numpy(texts), torch.from_numpy(owner), chunk=chunk)
    for k in (1, 5, 10):
        text_to_image, image_to_text = by_sorting(images, texts, owner, k)
        assert found["text_to_image"][f"recall@{k}"] == pytest.approx(text_to_image)
        assert found["image_to_text"][f"recall@{k}"] == pytest.approx(image_to_text)


def test_equal_features_find_nothing() -> None:
    """A collapsed model scores every pair alike: no hit, where counting ties for it would give a full score."""
    found = retrieval(torch.ones(8, 3), torch.ones(8, 3), torch.arange(8), ks=(1, 5))
    assert found["text_to_image"]["recall@5"] == 0
    assert found["image_to_text"]["recall@5"] == 0


def test_chance_against_drawing() -> None:
    random = np.random.default_rng(0)
    captions = [1, 5, 2, 2]
    expected = chance(4, captions, (1, 3))
    owner = np.repeat(np.arange(4), captions)
    hits = np.zeros(2)
    for _ in range(4000):
        order = random.permutation(len(owner))
        hits += [np.mean([i in owner[order[:k]] for i in range(4)]) for k in (1, 3)]
    assert expected["image_to_text"]["recall@1"] == pytest.approx(hits[0] / 4000, abs=0.01)
    assert expected["image_to_text"]["recall@3"] == pytest.approx(hits[1] / 4000, abs=0.01)
    assert expected["text_to_image"]["recall@3"] == 0.75


def test_not_finite() -> None:
    images = torch.eye(3)
    images[0, 0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        retrieval(images, torch.eye(3), torch.arange(3))


def test_image_without_caption() -> None:
    with pytest.raises(DataError, match="no caption"):
        retrieval(torch.eye(3), torch.eye(3), torch.tensor([0, 0, 1]))


def test_as_clip_benchmark() -> None:
    """Every caption and every image, both ways, with any number of captions."""
    from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k

    random = torch.Generator().manual_seed(0)
    images, texts = torch.randn(40, 8, generator=random), torch.randn(130, 8, generator=random)
    owner = torch.cat([torch.arange(40), torch.randint(0, 40, (90,), generator=random)])
    ranks = rank(images, texts, owner, chunk=17)
    scores = texts @ images.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(130), owner] = True
    hits = ranks.hits((1, 5, 10))
    for k in (1, 5, 10):
        assert (hits[f"text_to_image recall@{k}"] == (recall_at_k(scores, positive, k) > 0).numpy()).all()
        assert (hits[f"image_to_text recall@{k}"] == (recall_at_k(scores.T, positive.T, k) > 0).numpy()).all()
    assert (ranks.best_images == scores.topk(5, dim=1).indices.numpy()).all()


def test_ties_and_repeated_captions_beside_clip_benchmark() -> None:
    """It breaks a tie by the order of the images; here the model loses it. So no hit of ours is none of theirs."""
    from clip_benchmark.metrics.zeroshot_retrieval import recall_at_k

    random = torch.Generator().manual_seed(1)
    images, distinct = (torch.randint(-2, 3, (n, 4), generator=random).double() for n in (40, 60))
    owner = torch.cat([torch.arange(40), torch.randint(0, 40, (90,), generator=random)])
    texts = distinct[torch.randint(0, 60, (130,), generator=random)]  # the same captions of several images
    scores = texts @ images.T
    positive = torch.nn.functional.one_hot(owner, 40).bool()
    hits = rank(images, texts, owner, chunk=17).hits((1, 5, 10))
    # Theirs, with each own score a trifle lower: then no tie is left, and both count alike.
    lower = scores - 1e-6 * positive
    for k in (1, 5, 10):
        for way, own, there, apart in (
            ("text_to_image", scores, positive, lower), ("image_to_text", scores.T, positive.T, lower.T),
        ):  # fmt: skip
            ours = hits[f"{way} recall@{k}"]
            assert (ours == (recall_at_k(apart, there, k) > 0).numpy()).all()
            assert not (ours & ~(recall_at_k(own, there, k) > 0).numpy()).any()
        assert ours.any()
        assert not ours.all()
