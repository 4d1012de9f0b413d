"""Probes of image features alone: few-shot ridge regression, a linear probe, nearest neighbours.

Each takes features [N, D] with labels [N] to train on and others to test on, and returns plain values: the accuracy
with its interval, the hyperparameters and what they were chosen on, and the numbers of images and classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from litune.errors import DataError
from litune.evaluation.intervals import interval

BIAS = 100.0
"""A constant feature this large makes a bias that the L2 term hardly affects."""
RIDGE_STRENGTH = 2.0**10
SEEDS = 3
LINEAR_GRID = tuple(10.0**power for power in range(1, -7, -1))
VALIDATION = 0.2
CHUNK = 4096

DEFINITIONS = {
    "ridge": (
        "k images of each class; features standardised by them, a large constant for the bias; least squares to "
        "targets of +1 for the own class and −1 for all others with an L2 term of 2^10, in closed form; the mean "
        "accuracy of the draws of three seeds: the few-shot evaluator of LiT's official code (big_vision, fewshot_lsr)."
    ),
    "linear": (
        "Multinomial logistic regression on standardised features by L-BFGS (as in CLIP, arXiv 2103.00020); "
        "its L2 term is chosen from 10^1 … 10^-6 on a fifth of the training images, then all are used."
    ),
    "knn": (
        "The k training images with the highest cosine vote for their classes, each with the weight "
        "exp(cosine / temperature) (k = 20, temperature = 0.07, as in DINO, arXiv 2104.14294)."
    ),
}


def draw_shots(labels: np.ndarray, shots: int, seeds: int = SEEDS) -> list[np.ndarray]:
    """For each seed from 0 on, the rows of `shots` images of each class, or of all that a class has.

    The same draws as big_vision's, where images come in the same order.
    """
    randoms = [np.random.default_rng(seed) for seed in range(seeds)]
    of_class = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    none = np.empty(0, np.int64)
    return [np.concatenate([none, *(random.permutation(rows)[:shots] for rows in of_class)]) for random in randoms]


def ridge(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    shots: int = 10,
    draws: list[np.ndarray] | None = None,
) -> dict[str, Any]:
    """Mean accuracy of ridge regressions on `shots` images of each class, drawn with three seeds.

    This is big_vision's `fewshot_lsr` at its usual setting: features are standardised by the mean and the deviation
    (+ 1e-5) of the drawn images and get a constant 100 for the bias, targets are 1 for the own class and −1 for all
    others, the L2 term is 2^10, and the class with the highest score is predicted. `draws` holds each seed's rows,
    by default those of `draw_shots`. Raises `DataError` for input that can't be learned from, as all probes here do.
    """
    classes = _check(features, labels, test_features, test_labels)
    draws = draw_shots(labels, shots) if draws is None else draws
    hits = np.stack(
        [
            _Ridge(features[rows], labels[rows], classes).predict(test_features, RIDGE_STRENGTH) == test_labels
            for rows in draws
        ]
    )
    result = _result("ridge", hits.mean(0), classes, len(draws[0]))
    return result | {"l2": RIDGE_STRENGTH, "shots": shots, "by_seed": hits.mean(1).tolist()}


class _Ridge:
    """Least squares to ±1 targets: one eigendecomposition serves any strength of the L2 term."""

    def __init__(self, features: np.ndarray, labels: np.ndarray, classes: int) -> None:
        x = features.astype(np.float64)
        self.mean, self.deviation = x.mean(0), x.std(0) + 1e-5
        x = self._prepared(x)
        targets = np.where(np.arange(classes) == labels[:, None], 1.0, -1.0)
        # (XᵀX + λ)⁻¹XᵀY = Xᵀ(XXᵀ + λ)⁻¹Y: whichever matrix is the smaller one is decomposed.
        few = len(x) < x.shape[1]
        self.values, vectors = np.linalg.eigh(x @ x.T if few else x.T @ x)
        self.left = x.T @ vectors if few else vectors
        self.right = vectors.T @ (targets if few else x.T @ targets)

    def _prepared(self, x: np.ndarray) -> np.ndarray:
        return np.pad((x - self.mean) / self.deviation, ((0, 0), (0, 1)), constant_values=BIAS)

    def predict(self, features: np.ndarray, strength: float) -> np.ndarray:
        """The class [B] with the highest score."""
        weights = (self.left / (np.maximum(self.values, 0) + strength)) @ self.right
        parts = [
            (self._prepared(features[start : start + CHUNK].astype(np.float64)) @ weights).argmax(1)
            for start in range(0, len(features), CHUNK)
        ]
        predicted: np.ndarray = np.concatenate(parts)
        return predicted


def linear_probe(
    features: np.ndarray, labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray, seed: int = 0
) -> dict[str, Any]:
    """Accuracy of a logistic regression trained on all training images."""
    classes = _check(features, labels, test_features, test_labels)
    mean, deviation = features.mean(0), features.std(0) + 1e-5
    x, test = (torch.from_numpy(((array - mean) / deviation).astype(np.float32)) for array in (features, test_features))
    y = torch.from_numpy(labels).long()
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[np.random.default_rng(seed).permutation(len(labels))[: round(VALIDATION * len(labels))]] = True
    strength, validated = LINEAR_GRID[len(LINEAR_GRID) // 2], None
    if held_out.any():
        rest = torch.from_numpy(~held_out)
        weights = torch.zeros(x.shape[1] + 1, classes)
        best = -1.0
        for l2 in LINEAR_GRID:  # from strong to weak, each starting from the previous solution
            weights = logistic_regression(x[rest], y[rest], classes, l2, weights)
            score = float((_predict(x[~rest], weights) == y[~rest]).double().mean())
            if score > best:
                best, strength = score, l2
        validated = {"images": int(held_out.sum()), "accuracy": best}
    weights = logistic_regression(x, y, classes, strength, torch.zeros(x.shape[1] + 1, classes))
    hits = _predict(test, weights).numpy() == test_labels
    return _result("linear", hits, classes, len(labels)) | {"l2": strength, "chosen_on": validated, "seed": seed}


def logistic_regression(x: Tensor, y: Tensor, classes: int, l2: float, start: Tensor) -> Tensor:
    """Weights [D + 1, C], the bias last, with the least mean cross-entropy + l2 / 2 · |weights without bias|²."""
    weights = start.clone().requires_grad_()
    search = torch.optim.LBFGS([weights], max_iter=200, tolerance_grad=1e-6, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = F.cross_entropy(x @ weights[:-1] + weights[-1], y) + l2 / 2 * weights[:-1].square().sum()
        value.backward()
        return value

    search.step(loss)
    return weights.detach()


def _predict(x: Tensor, weights: Tensor) -> Tensor:
    return (x @ weights[:-1] + weights[-1]).argmax(1)


def knn(
    features: np.ndarray,
    labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    k: int = 20,
    temperature: float = 0.07,
) -> dict[str, Any]:
    """Accuracy of the weighted vote of the k nearest training images (of all, where there are fewer)."""
    classes = _check(features, labels, test_features, test_labels)
    k = min(k, len(features))
    train, own = F.normalize(torch.from_numpy(features).float()), torch.from_numpy(labels).long()
    parts = []
    for start in range(0, len(test_features), CHUNK):
        test = F.normalize(torch.from_numpy(test_features[start : start + CHUNK]).float())
        cosines, rows = nearest(test, train, k)
        votes = torch.zeros(len(test), classes).scatter_add_(1, own[rows], ((cosines - 1) / temperature).exp())
        parts.append(votes.argmax(1))
    hits = torch.cat(parts).numpy() == test_labels
    return _result("knn", hits, classes, len(features)) | {"k": k, "temperature": temperature}


def nearest(queries: Tensor, among: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest products [Q, k] of queries [Q, D] with rows of `among` [N, D], and which rows; flat memory."""
    best = torch.full((len(queries), k), -torch.inf)
    which = torch.zeros(len(queries), k, dtype=torch.int64)
    for start in range(0, len(among), CHUNK):
        scores = torch.cat([best, queries @ among[start : start + CHUNK].T], 1)
        rows = torch.arange(start, start + scores.shape[1] - k).expand(len(queries), -1)
        best, chosen = scores.topk(k, dim=1)
        which = torch.cat([which, rows], 1).gather(1, chosen)
    return best, which


def _check(features: np.ndarray, labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray) -> int:
    """The number of classes. Raises `DataError` for input that can't be learned from."""
    if len(features) != len(labels) or len(test_features) != len(test_labels):
        raise DataError("a probe needs one label for each image")
    if not len(labels) or not len(test_labels):
        raise DataError("a probe needs images to learn from and others to be measured on")
    if features.shape[1] != test_features.shape[1]:
        raise DataError(f"a probe needs features of one width, not of {features.shape[1]} and {test_features.shape[1]}")
    if not (np.isfinite(features).all() and np.isfinite(test_features).all()):
        raise DataError("some features are not finite: no probe can learn from them")
    classes = int(max(labels.max(), test_labels.max())) + 1
    if classes < 2:
        raise DataError("a probe needs two classes or more")
    return classes


def _result(name: str, hits: np.ndarray, classes: int, train: int) -> dict[str, Any]:
    return {
        "accuracy": float(hits.mean()),
        "interval": list(interval(hits)),
        "chance": 1 / classes,
        "classes": classes,
        "train_images": train,
        "images": len(hits),
        "definition": DEFINITIONS[name],
    }
