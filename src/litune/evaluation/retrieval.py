"""Image-text retrieval: recall@k in both directions, with any number of captions an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from litune.devices import send
from litune.errors import DataError

DEFINITION = (
    "text_to_image recall@k: the share of captions whose own image is among the k images with the highest scores; "
    "image_to_text recall@k: the share of images for which any of their captions is among the k captions with the "
    "highest scores. Ties count against the model. All images and captions of the selection are candidates, so "
    "numbers from selections of another size can't be compared."
)


HUBS_CORRECTED = " (hubs corrected)"
"""What the name of a task ends with in a result that is measured with the hub correction."""
CORRECTED = (
    " Of a task with hubs corrected the scores are those of CSLS (Conneau et al., arXiv 1710.04087), with texts and "
    "images that the run was tuned on: not to be compared with figures of bare cosines."
)


@dataclass(frozen=True)
class Ranks:
    """The ranks of N captions and B images in each other's order.

    `of_images` [N]: how many other images score at least as high with a caption as its own. `of_captions` [B]: how many
    other images' captions score at least as high with an image as the best of its own. `best_images` [N, 5]: the images
    with the highest scores for each caption, best first.
    """

    of_images: np.ndarray
    of_captions: np.ndarray
    best_images: np.ndarray

    def hits(self, ks: Sequence[int]) -> dict[str, np.ndarray]:
        """Whether each caption, or image, is found among the first k, by the figure's name."""
        ways = {"text_to_image": self.of_images, "image_to_text": self.of_captions}
        return {f"{way} recall@{k}": ranks < k for way, ranks in ways.items() for k in ks}


def rank(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "N D"],
    owner: Int[Tensor, " N"],
    chunk: int = 1024,
    best: int = 5,
) -> Ranks:
    """The ranks of N captions among B images and the other way round, with the `best` images of each caption.

    `owner[j]` is the image that caption j belongs to; every image needs a caption. Computed on the images'
    device, in memory of B × `chunk`. Raises `DataError` for an image without a caption or features that are not
    finite.
    """
    texts, owner = send(texts, images.device), send(owner, images.device)
    for what, features in (("image", images), ("text", texts)):
        if not features.isfinite().all():
            raise DataError(f"some {what} features are not finite: no recall can be told from them")
    if len(torch.unique(owner)) != len(images):
        raise DataError("an image has no caption: retrieval needs at least one for each")
    text_ranks = torch.empty_like(owner)
    best_images = owner.new_empty(len(texts), min(best, len(images)))
    best_own = images.new_full((len(images),), -torch.inf)
    for start in range(0, len(texts), chunk):
        part = slice(start, start + chunk)
        scores = texts[part] @ images.T
        own = scores.gather(1, owner[part, None])
        # − 1: the caption's own image is among the scores ≥ its own.
        text_ranks[part] = (scores >= own).sum(1) - 1
        best_images[part] = scores.topk(best_images.shape[1], dim=1).indices
        best_own.scatter_reduce_(0, owner[part], own[:, 0], "amax")
    ahead = owner.new_zeros(len(images))
    for start in range(0, len(texts), chunk):
        part = slice(start, start + chunk)
        scores = texts[part] @ images.T
        not_own = torch.ones_like(scores, dtype=torch.bool).scatter_(1, owner[part, None], False)
        ahead += ((scores >= best_own) & not_own).sum(0)
    return Ranks(text_ranks.cpu().numpy(), ahead.cpu().numpy(), best_images.cpu().numpy())


def retrieval(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "N D"],
    owner: Int[Tensor, " N"],
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[str, Any]:
    """Recall@k, as shares of one, of N captions among B images and the other way round (see `rank`)."""
    return figures(rank(images, texts, owner, chunk), owner.cpu().numpy(), ks)


def figures(ranks: Ranks, owner: np.ndarray, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Any]:
    """Recall@k from ranks, beside chance."""
    images = len(ranks.of_captions)
    return {
        "text_to_image": {f"recall@{k}": float((ranks.of_images < k).mean()) for k in ks},
        "image_to_text": {f"recall@{k}": float((ranks.of_captions < k).mean()) for k in ks},
        "chance": chance(images, np.bincount(owner, minlength=images).tolist(), ks),
        "images": images,
        "captions": len(ranks.of_images),
    }


def chance(images: int, captions: Sequence[int], ks: Sequence[int]) -> dict[str, dict[str, float]]:
    """Recall@k of random scores for `images` images with these numbers of captions.

    Text to image: k / images. Image to text: 1 − C(N − c, k) / C(N, k), averaged over the images, where c are
    an image's captions out of N.
    """
    total = sum(captions)
    counts = {c: captions.count(c) for c in set(captions)}
    hit = {
        k: sum(n * (1 - comb(total - c, k) / comb(total, k)) if k <= total else n for c, n in counts.items()) / images
        for k in ks
    }
    return {
        "text_to_image": {f"recall@{k}": min(1.0, k / images) for k in ks},
        "image_to_text": {f"recall@{k}": hit[k] for k in ks},
    }
