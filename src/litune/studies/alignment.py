"""How well two feature spaces agree before tuning: shared neighbours, shared anchors, a linear map.

All are functions of features of length one, images [B, D] and texts [N, W], of towers that were trained separately.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = 10
ANCHORS, POWER = 0.05, 8.0
STRENGTHS = tuple(10.0**power for power in range(-4, 3))
VALIDATION = 0.2

DEFINITIONS = {
    "neighbours": (
        f"mutual neighbours: of an image's {NEIGHBOURS} nearest other images, the share that are also among the "
        f"{NEIGHBOURS} nearest by caption (mutual kNN alignment, arXiv 2405.07987); an image's caption feature is the "
        "mean of its captions'. Nothing is learned."
    ),
    "anchors": (
        "anchors recall@k: text→image retrieval where an image is described by its cosines with the example images and "
        "a text by its cosines with their captions; the highest 5% are kept, to the power of 8 (ASIF, arXiv "
        "2210.01738). Nothing is trained."
    ),
    "linear": (
        "linear recall@k: text→image retrieval after a ridge regression from text features to image features, in "
        "closed form, its strength chosen on a fifth of the example pairs. Ties count against it, as in litune eval."
    ),
    "fit": (
        "fit recall@k: text→image retrieval by what litune fit computes in closed form (canonical correlation "
        "analysis), its settings chosen on a fifth of the example pairs."
    ),
}


def mutual_neighbours(
    images: Float[Tensor, "B D"], texts: Float[Tensor, "B W"], k: int = NEIGHBOURS
) -> Float[np.ndarray, " B"]:
    """For each image with its caption, the share of its k nearest others that both spaces agree on [B]."""
    return _common(_neighbours(images, k), _neighbours(texts, k)).double().mean(1).numpy()


def _neighbours(features: Tensor, k: int) -> Tensor:
    scores = features @ features.T
    return scores.fill_diagonal_(-torch.inf).topk(k, dim=1).indices


def _common(left: Tensor, right: Tensor) -> Tensor:
    """Which entries of `left` are in the same row of `right` [B, k]."""
    return (left[:, :, None] == right[:, None, :]).any(2)


def relative(features: Float[Tensor, "N D"], anchors: Float[Tensor, "A D"]) -> Float[Tensor, "N A"]:
    """Features relative to anchors: the highest cosines to the power of 8, all others zero, of length one."""
    cosines = (features @ anchors.T).clamp(min=0)
    keep = max(1, round(ANCHORS * len(anchors)))
    least = cosines.topk(keep, dim=1).values[:, -1:]
    return F.normalize(torch.where(cosines >= least, cosines, 0.0) ** POWER)


def ridge_map(texts: Float[Tensor, "N W"], images: Float[Tensor, "N D"], strength: float) -> Float[Tensor, "W D"]:
    """The matrix M with the least |texts · M − images|² + λ|M|².

    λ is `strength` times the mean over the text dimensions of their sums of squares.
    """
    x, y = texts.double(), images.double()
    gram = x.T @ x
    penalty = strength * gram.diagonal().mean()
    weights: Tensor = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype), x.T @ y)
    return weights.float()


def best_strength(
    texts: Float[Tensor, "N W"], images: Float[Tensor, "B D"], owner: Int[Tensor, " N"], seed: int
) -> float:
    """The strength with the highest recall@10 on a fifth of the images, learned from the others."""
    held_rows = np.random.default_rng(seed).permutation(len(images))[: max(1, round(VALIDATION * len(images)))]
    held_image = torch.zeros(len(images), dtype=torch.bool)
    held_image[torch.from_numpy(held_rows)] = True
    held = held_image[owner]
    position = held_image.cumsum(0) - 1
    recalls = {}
    for strength in STRENGTHS:
        mapped = F.normalize(texts[held] @ ridge_map(texts[~held], images[owner[~held]], strength))
        recalls[strength] = (image_ranks(images[held_image], mapped, position[owner[held]]) < 10).mean()
    return max(recalls, key=lambda strength: float(recalls[strength]))


def image_ranks(
    images: Float[Tensor, "B D"], texts: Float[Tensor, "N D"], owner: Int[Tensor, " N"]
) -> Int[np.ndarray, " N"]:
    """How many images score at least as high as each text's own [N]; ties count against it."""
    ranks = []
    for part, own in zip(texts.split(1024), owner.split(1024), strict=True):
        scores = part @ images.T
        ranks.append((scores >= scores.gather(1, own[:, None])).sum(1) - 1)
    return torch.cat(ranks).numpy()
