"""Whether a classifier's probabilities can be believed: expected calibration error, and one temperature to mend it.

Both as in Guo et al., On Calibration of Modern Neural Networks (arXiv 1706.04599).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from litune.errors import DataError

BINS = 15
LEAST = 20
"""Images below which half of them say nothing."""
CHUNK = 2**22
"""Scores in float64 that are held at once."""

DEFINITION = (
    f"Expected calibration error: images are put into {BINS} equally wide bins by the probability of their predicted "
    "class; the distances between each bin's mean probability and its accuracy are averaged, weighted by images. The "
    "temperature that makes the images' own classes most likely is fitted on a random half; before and after are "
    "measured on the other half."
)


def reliability(confidence: np.ndarray, hits: np.ndarray, bins: int = BINS) -> list[dict[str, float]]:
    """Mean confidence, accuracy and number of images of each bin that has any; the confidences [B] are in [0, 1]."""
    bin_of = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    rows = []
    for number in np.unique(bin_of):
        in_bin = bin_of == number
        rows.append(
            {
                "confidence": float(confidence[in_bin].mean()),
                "accuracy": float(hits[in_bin].mean()),
                "images": int(in_bin.sum()),
            }
        )
    return rows


def calibration_error(confidence: np.ndarray, hits: np.ndarray, bins: int = BINS) -> float:
    """The expected calibration error of B predictions with these confidences [B] and outcomes [B]."""
    rows = reliability(confidence, hits, bins)
    return sum(row["images"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / len(hits)


def calibrate(logits: Tensor | np.ndarray, labels: Tensor | np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Calibration error before and after one temperature, for logits [B, C] at the model's own scale; labels [B].

    `temperature` divides the logits: above one, the model was too sure of itself. Raises `DataError` for fewer than
    20 images or logits that are not finite.
    """
    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels).long()
    if len(logits) < LEAST:
        raise DataError(f"{len(logits)} images are too few to measure calibration, at least {LEAST} are needed")
    if not logits.isfinite().all():
        raise DataError("some logits are not finite: no calibration can be told from them")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(logits)))
    fitted, measured = order[: len(order) // 2], order[len(order) // 2 :]
    temperature = fit_temperature(logits[fitted], labels[fitted])
    before = _predictions(logits[measured], labels[measured], 1.0)
    after = _predictions(logits[measured], labels[measured], temperature)
    return {
        "ece_before": calibration_error(*before),
        "ece_after": calibration_error(*after),
        "temperature": temperature,
        "bins": BINS,
        "fitted_on": len(fitted),
        "measured_on": len(measured),
        "reliability_before": reliability(*before),
        "reliability_after": reliability(*after),
        "definition": DEFINITION,
    }


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T > 0 with the least mean −log softmax(logits / T) of the labels.

    The loss is convex in β = 1 / T. Newton steps are kept inside a bracket in which its slope changes sign;
    T is between 1/1000 and 1000.
    """
    low, high, beta = 1e-3, 1e3, 1.0
    for _ in range(100):
        slope, curvature = _slope(logits, labels, beta)
        low, high = (beta, high) if slope < 0 else (low, beta)
        step = beta - slope / max(curvature, 1e-30)
        following = step if low < step < high else (low * high) ** 0.5
        if abs(following - beta) <= 1e-7 * beta:
            break
        beta = following
    return 1 / beta


def _slope(logits: Tensor, labels: Tensor, beta: float) -> tuple[float, float]:
    """First and second derivative of the mean loss by β."""
    first = second = 0.0
    rows = max(1, CHUNK // logits.shape[1])
    for part, own in zip(logits.split(rows), labels.split(rows), strict=True):
        values = part.double()
        share = (beta * values).softmax(1)
        mean = (share * values).sum(1)
        first += float((mean - values.gather(1, own[:, None])[:, 0]).sum())
        second += float(((share * values.square()).sum(1) - mean.square()).sum())
    return first / len(logits), second / len(logits)


def _predictions(logits: Tensor, labels: Tensor, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """Confidence [B] and outcome [B] of the predicted classes."""
    confidence, predicted = (logits.float() / temperature).softmax(1).max(1)
    return confidence.numpy(), (predicted == labels).double().numpy()
