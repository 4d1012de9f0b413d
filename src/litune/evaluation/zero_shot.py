"""Zero-shot classification: each image's outcome among the classes, and accuracies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from litune.errors import DataError

DEFINITION = (
    "accuracy: the share of images whose own class has the highest score; mean_per_class: the same share taken per "
    "class, then averaged over the classes; top5: the own class is among the five highest. Ties count against the "
    "model."
)


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


@dataclass(frozen=True)
class Accuracies:
    """Figures of a classification, as shares of one, with what each is the mean of.

    `examples`: each image's outcome [B], 0 or 1, by figure. `groups`: the class of each image [B], for figures that are
    means of the classes' means.
    """

    values: dict[str, float]
    examples: dict[str, np.ndarray]
    groups: dict[str, np.ndarray]


def accuracies(outcomes: Outcomes, labels: np.ndarray, classes: int, *, single: bool = True) -> Accuracies:
    """Accuracy, mean per-class accuracy and, above five classes, top-5 accuracy of B images with these labels [B].

    Without `single` (an image may have several right classes) there is no mean over classes.
    """
    hits = outcomes.hits.astype(np.float64)
    values, examples, groups = {"accuracy": float(hits.mean())}, {"accuracy": hits}, {}
    if single:
        values["mean_per_class"] = float(np.mean([hits[labels == label].mean() for label in np.unique(labels)]))
        examples["mean_per_class"], groups["mean_per_class"] = hits, labels
    if classes > 5:
        examples["top5"] = (outcomes.ahead < 5).astype(np.float64)
        values["top5"] = float(examples["top5"].mean())
    return Accuracies(values, examples, groups)
