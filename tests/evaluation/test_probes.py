from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from litune.errors import DataError
from litune.evaluation import probes

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def clouds(width: int, noise: float, train: int = 120, test: int = 200, classes: int = 4) -> Split:
    """Classes as clouds around random centers, in features of very different sizes."""
    random = np.random.default_rng(0)
    centers, sizes = random.normal(size=(classes, width)), np.exp(random.normal(size=width))

    def some(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % classes
        values = (centers[labels] + noise * random.normal(size=(count, width))) * sizes + 3
        return values.astype(np.float32), labels

    return (*some(train), *some(test))


@pytest.mark.parametrize("width", [6, 90])
def test_ridge_against_sklearn(width: int) -> None:
    """Both forms, of fewer features than images and of more; the bias is nearly free of the L2 term."""
    x, y, test, own = clouds(width, noise=2.0)
    found = probes.ridge(x, y, test, own, shots=10)
    accuracies = []
    for seed in range(3):
        random = np.random.default_rng(seed)
        taken = np.concatenate([random.permutation(np.flatnonzero(y == c))[:10] for c in range(4)])
        mean, deviation = x[taken].mean(0), x[taken].std(0)
        targets = np.where(np.arange(4) == y[taken][:, None], 1.0, -1.0)
        reference = Ridge(alpha=2**10).fit((x[taken] - mean) / deviation, targets)
        accuracies.append((reference.predict((test - mean) / deviation).argmax(1) == own).mean())
    assert found["by_seed"] == pytest.approx(accuracies, abs=0.006)
    assert found["accuracy"] == pytest.approx(np.mean(found["by_seed"]))
    assert found["train_images"] == 40
    assert found["images"] == 200
    assert found["interval"][0] < found["accuracy"] < found["interval"][1]


def test_draws() -> None:
    labels = np.array([0, 1, 1, 0, 1, 1, 2])
    draws = probes.draw_shots(labels, 2)
    assert [np.bincount(labels[rows]).tolist() for rows in draws] == [[2, 2, 1]] * 3
    assert len({tuple(rows) for rows in draws}) == 3
    x, y, test, own = clouds(6, noise=2.0)
    draws = [rows[::-1] for rows in probes.draw_shots(y, 10)]
    assert probes.ridge(x, y, test, own, draws=draws) == probes.ridge(x, y, test, own)


def test_more_shots_are_better() -> None:
    data = clouds(40, noise=2.5, train=400)
    assert probes.ridge(*data, shots=50)["accuracy"] > probes.ridge(*data, shots=2)["accuracy"]


@pytest.mark.parametrize("l2", [0.1, 1e-3])
def test_logistic_regression_against_sklearn(l2: float) -> None:
    x, y, *_ = clouds(8, noise=1.5)
    x = (x - x.mean(0)) / x.std(0)
    weights = probes.logistic_regression(torch.from_numpy(x), torch.from_numpy(y), 4, l2, torch.zeros(9, 4))
    reference = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=2000).fit(x, y)
    ours = (torch.from_numpy(x) @ weights[:-1] + weights[-1]).softmax(1).numpy()
    np.testing.assert_allclose(ours, reference.predict_proba(x), atol=2e-3)


def test_linear_probe() -> None:
    x, y, test, own = clouds(20, noise=1.0)
    found = probes.linear_probe(x, y, test, own)
    assert found["accuracy"] > 0.9
    assert found["chosen_on"]["images"] == 24
    assert probes.linear_probe(x, y, test, (own + 1) % 4)["l2"] == found["l2"]


@pytest.mark.parametrize("chunk", [16, 4096])
def test_neighbours_against_the_full_matrix(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "CHUNK", chunk)
    x, y, test, own = clouds(6, noise=3.0)
    cosines = (test / np.linalg.norm(test, axis=1, keepdims=True)) @ (x / np.linalg.norm(x, axis=1, keepdims=True)).T
    hits = []
    for row, label in zip(cosines, own, strict=True):
        near = np.argsort(-row)[:7]
        votes = [np.exp(row[near] / 0.2)[y[near] == c].sum() for c in range(4)]
        hits.append(np.argmax(votes) == label)
    found = probes.knn(x, y, test, own, k=7, temperature=0.2)
    assert found["accuracy"] == pytest.approx(np.mean(hits))
    assert probes.knn(x[:5], y[:5], test, own)["k"] == 5


def test_refuses() -> None:
    x, y, test, own = clouds(4, noise=1.0)
    with pytest.raises(DataError, match="one label"):
        probes.ridge(x, y[1:], test, own)
    with pytest.raises(DataError, match="one width"):
        probes.knn(x, y, test[:, 1:], own)
    with pytest.raises(DataError, match="not finite"):
        probes.linear_probe(x * np.nan, y, test, own)
    with pytest.raises(DataError, match="two classes"):
        probes.ridge(x, y * 0, test, own * 0)
    with pytest.raises(DataError, match="to learn from"):
        probes.ridge(x[:0], y[:0], test, own)
