from __future__ import annotations

import numpy as np
import pytest
import torch

from litune.errors import DataError
from litune.evaluation.zero_shot import accuracies, classify


def test_by_hand() -> None:
    """Rows of the identity as images: their scores are the weights' columns."""
    scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.1], [0.5, 0.5, 0.1], [0.1, 0.2, 0.3]])
    labels = np.array([0, 0, 0, 2])
    figures = accuracies(classify([torch.eye(4)], scores.T, list(labels[:, None])), labels, 3)
    # Right, wrong, a tie (against the model), right; class 0 has one of three, class 2 one of one, class 1 none.
    assert figures.values["accuracy"] == 0.5
    assert figures.values["mean_per_class"] == pytest.approx((1 / 3 + 1) / 2)
    assert figures.values.keys() == figures.examples.keys() == {"accuracy", "mean_per_class"}
    assert figures.examples["accuracy"].tolist() == [1, 0, 0, 1]
    assert figures.groups["mean_per_class"].tolist() == labels.tolist()


def test_top5() -> None:
    weights = torch.arange(7.0).flip(0)[:, None]
    labels = np.array([4, 5])
    assert accuracies(classify([torch.ones(2, 1)], weights, [*labels[:, None]]), labels, 7).values["top5"] == 0.5


def test_not_finite() -> None:
    for images, weights in (([[float("nan")]], [[0.0], [1.0]]), ([[1.0]], [[float("inf")], [1.0]])):
        with pytest.raises(DataError, match="not finite"):
            classify([torch.tensor(images)], torch.tensor(weights), [np.array([0])])


def unit(*shape: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("block", [1, 7, 300])
def test_classify_as_clip_benchmark(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last example, in whatever blocks the scores are made."""
    from clip_benchmark.metrics import zeroshot_classification as theirs

    monkeypatch.setattr(theirs, "float", lambda one: one.item(), raising=False)  # NumPy 2.4 refuses float([x])
    images, weights = unit(300, 16, seed=0), unit(23, 16, seed=1)
    labels = torch.randint(0, 23, (300,), generator=torch.Generator().manual_seed(2))
    found = classify(images.split(block), weights, list(labels.numpy()[:, None]), scale=10.0)
    logits = 100.0 * images @ weights.T
    top1, top5 = theirs.accuracy(logits, labels, topk=(1, 5))
    assert found.hits.mean() == pytest.approx(top1)
    assert (found.ahead < 5).mean() == pytest.approx(top5)
    assert (found.hits == (logits.argmax(1) == labels).numpy()).all()
    assert (found.predicted == logits.argmax(1).numpy()).all()
    recall = np.mean([found.hits[labels.numpy() == c].mean() for c in range(23)])
    assert recall == pytest.approx(theirs.balanced_accuracy_score(labels, logits.argmax(1)))
    assert np.allclose(found.confidence, (10 * images @ weights.T).softmax(1).max(1).values)


def test_classify_label_sets_by_hand() -> None:
    """Rows of the identity as images: their scores are the weights' columns."""
    weights = torch.tensor([[0.9, 0.1, 0.3], [0.5, 0.4, 0.3], [0.1, 0.8, 0.2], [0.2, 0.6, 0.3]])
    found = classify([torch.eye(3)], weights, [np.array([1, 0]), np.array([1, 3]), np.array([2])])
    assert found.hits.tolist() == [True, False, False]
    assert found.predicted.tolist() == [0, 2, 0]
    assert found.ahead.tolist() == [0, 1, 3]


def test_classify_ties_count_against_the_model() -> None:
    """Classes with equal vectors tie exactly, wherever they stand among many."""
    weights = unit(997, 33, seed=3)
    weights[996] = weights[4]
    images = weights[[4, 996, 5]]
    found = classify([images], weights, [np.array([4]), np.array([996]), np.array([5])])
    assert found.hits.tolist() == [False, False, True]
    assert found.predicted.tolist() == [996, 4, 5]
    both = classify([images], weights, [np.array([4, 996])] * 2 + [np.array([5])])
    assert both.hits.all()


def test_classify_not_finite() -> None:
    with pytest.raises(DataError, match="not finite"):
        classify([torch.tensor([[float("nan")]])], torch.ones(2, 1), [np.array([0])])
