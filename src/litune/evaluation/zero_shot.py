"""Zero-shot classification: accuracy out of scores."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from litune.errors import DataError

DEFINITION = (
    "accuracy: the share of images whose own class has the highest score; mean_per_class: the same share taken per "
    "class, then averaged over the classes; top5: the own class is among the five highest. Ties count against the "
    "model."
)


def accuracy(scores: Float[Tensor, "B C"], labels: Int[Tensor, " B"]) -> dict[str, Any]:
    """Accuracy, mean per-class accuracy and, above five classes, top-5, as shares of one."""
    if not scores.isfinite().all():
        raise DataError("some scores are not finite: no accuracy can be told from them")
    own = scores.gather(1, labels[:, None])
    rank = (scores >= own).sum(1) - 1
    hits = (rank == 0).double()
    classes = scores.shape[1]
    count = torch.bincount(labels, minlength=classes)
    per_class = torch.zeros(classes, dtype=torch.float64).scatter_add_(0, labels, hits)
    present = count > 0
    found: dict[str, Any] = {
        "accuracy": float(hits.mean()),
        "mean_per_class": float((per_class[present] / count[present]).mean()),
    }
    if classes > 5:
        found["top5"] = float((rank < 5).double().mean())
    return found | {"chance": 1 / classes, "images": len(labels), "classes": classes}
