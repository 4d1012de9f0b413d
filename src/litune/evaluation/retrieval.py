"""Image-text retrieval: recall@k in both directions, with any number of captions an image."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from litune.errors import DataError

DEFINITION = (
    "text_to_image recall@k: the share of captions whose own image is among the k images with the highest scores; "
    "image_to_text recall@k: the share of images for which any of their captions is among the k captions with the "
    "highest scores. Ties count against the model. All images and captions of the selection are candidates, so "
    "numbers from selections of another size can't be compared."
)


def retrieval(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "N D"],
    owner: Int[Tensor, " N"],
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[str, Any]:
    """Recall@k, as shares of one, of N captions among B images and the other way round.

    `owner[j]` is the image that caption j belongs to; every image needs a caption. Memory is B × `chunk`. Raises
    `DataError` for an image without a caption or features that are not finite.
    """
    for what, features in (("image", images), ("text", texts)):
        if not features.isfinite().all():
            raise DataError(f"some {what} features are not finite: no recall can be told from them")
    if len(torch.unique(owner)) != len(images):
        raise DataError("an image has no caption: retrieval needs at least one for each")
    text_ranks = torch.empty(len(texts), dtype=torch.int64)
    best_own = images.new_full((len(images),), -torch.inf)
    for start in range(0, len(texts), chunk):
        part = slice(start, start + chunk)
        scores = texts[part] @ images.T
        own = scores.gather(1, owner[part, None])
        # The own image itself is among the scores ≥ its own: hence − 1.
        text_ranks[part] = (scores >= own).sum(1) - 1
        best_own.scatter_reduce_(0, owner[part], own[:, 0], "amax")
    ahead = torch.zeros(len(images), dtype=torch.int64)
    for start in range(0, len(texts), chunk):
        part = slice(start, start + chunk)
        scores = texts[part] @ images.T
        not_own = torch.ones_like(scores, dtype=torch.bool).scatter_(1, owner[part, None], False)
        ahead += ((scores >= best_own) & not_own).sum(0)
    return {
        "text_to_image": {f"recall@{k}": _share(text_ranks < k) for k in ks},
        "image_to_text": {f"recall@{k}": _share(ahead < k) for k in ks},
        "chance": chance(len(images), torch.bincount(owner, minlength=len(images)).tolist(), ks),
        "images": len(images),
        "captions": len(texts),
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


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())
