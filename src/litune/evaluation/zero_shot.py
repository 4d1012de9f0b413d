"""Zero-shot classification: accuracy from scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
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
    rank, labels = ahead_of_own(scores, labels).cpu(), labels.cpu()
    hits = (rank == 0).double()
    classes = scores.shape[1]
    count = torch.bincount(labels, minlength=classes)
    per_class = torch.zeros(classes, dtype=torch.float64).scatter_add_(0, labels, hits)
    present = count > 0
    figures: dict[str, Any] = {
        "accuracy": float(hits.mean()),
        "mean_per_class": float((per_class[present] / count[present]).mean()),
    }
    if classes > 5:
        figures["top5"] = float((rank < 5).double().mean())
    return figures | {"chance": 1 / classes, "images": len(labels), "classes": classes}


def ahead_of_own(scores: Float[Tensor, "B C"], labels: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """How many wrong classes score at least as high as the own one: 0 is a hit. Raises `DataError` for NaN."""
    if not scores.isfinite().all():
        raise DataError("some scores are not finite: no accuracy can be told from them")
    return (scores >= scores.gather(1, labels.to(scores.device)[:, None])).sum(1) - 1


@dataclass(frozen=True)
class Outcomes:
    """The outcome of classifying each of B images.

    `ahead` [B] is how many wrong classes score at least as high as the best right one: 0 is a hit. `predicted` [B] is
    the class with the highest score, a wrong one where it ties with the right one; `confidence` [B] its probability.
    """

    ahead: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        """Whether each image is classified rightly [B]."""
        hits: np.ndarray = self.ahead == 0
        return hits


def classify(
    blocks: Iterable[Float[Tensor, "_ D"]],
    weights: Float[Tensor, "C D"],
    accepted: Sequence[np.ndarray],
    scale: float = 1.0,
) -> Outcomes:
    """The outcomes of images, whose features come in blocks, among C classes with these vectors.

    `accepted[i]` are the classes that are right for image i. Scores exist for one block at a time. Classes with equal
    vectors (ImageNet has two called "missile") have equal scores, whatever the order of the sums: they tie. Raises
    `DataError` for features that are not finite.
    """
    if not weights.isfinite().all():
        raise DataError("some class vectors are not finite: no accuracy can be told from them")
    distinct, vector_of = weights.unique(dim=0, return_inverse=True)
    # Allocated beforehand: small lasting arrays among large temporary ones would fragment memory.
    ahead, predicted = (torch.empty(len(accepted), dtype=torch.int64) for _ in range(2))
    confidence = torch.empty(len(accepted))
    done = 0
    for block in blocks:
        if not block.isfinite().all():
            raise DataError("some image features are not finite: no accuracy can be told from them")
        scores = block @ weights.T if len(distinct) == len(weights) else (block @ distinct.T)[:, vector_of]
        part = slice(done, done + len(block))
        right = accepted[part]
        rows = torch.from_numpy(np.repeat(np.arange(len(right)), [len(classes) for classes in right]))
        mask = torch.zeros(scores.shape, dtype=torch.bool)
        mask[rows, torch.from_numpy(np.concatenate(right))] = True
        own, best = scores.masked_fill(~mask, -torch.inf).max(1)
        wrong = scores.masked_fill(mask, -torch.inf)
        count = (wrong >= own[:, None]).sum(1)
        chosen = best if mask.all() else torch.where(count == 0, best, wrong.argmax(1))
        ahead[part], predicted[part] = count, chosen
        confidence[part] = (scale * scores).softmax(1).gather(1, chosen[:, None])[:, 0]
        done = part.stop
    return Outcomes(ahead.numpy(), predicted.numpy(), confidence.numpy())
