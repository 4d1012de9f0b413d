"""The contrastive loss pair by pair, to be looked at: how well each source of a mixed batch is learned."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from litune import distributed
from litune.devices import send
from litune.tuning.losses import Ids, MoreImages, Negatives


@torch.no_grad()
def pair_losses(
    images: Float[Tensor, "b D"],
    texts: Float[Tensor, "b D"],
    scale: Float[Tensor, ""],
    *,
    bias: Float[Tensor, ""] | None = None,
    image_to_text: float = 0.5,
    ids: Ids | None = None,
    more_images: MoreImages | None = None,
    chunk: int = 1024,
    negatives: Negatives = "global",
) -> Float[Tensor, " b"]:
    """The loss of each of this rank's pairs: their mean over the batch is `softmax_loss`, with a bias `sigmoid_loss`.

    Of a softmax it is −λ log p(text i | image i) − (1 − λ) log p(image i | text i), of a sigmoid the sum of text i's
    terms with all images. The arguments are those of the losses; no gradient flows.
    """
    counts = [len(images)] if negatives == "local" else distributed.row_counts(images)
    first = sum(counts[: distributed.rank()]) if len(counts) > 1 else 0

    def gather(rows: Tensor) -> Tensor:
        return rows if len(counts) == 1 else distributed.gather_rows(rows)

    all_images, all_texts = gather(images), gather(texts)
    pair_ids = None if ids is None else gather(send(torch.stack([ids.images, ids.texts], dim=1), images.device))
    more_ids = None
    if more_images is not None:
        all_images = torch.cat([all_images, gather(more_images.features.to(images))])
        more_ids = gather(send(torch.cat([more_images.images[:, None], more_images.texts], dim=1), images.device))

    def masked(own: Tensor, columns: int) -> Bool[Tensor, "c N"] | None:
        """What is no negative of these pairs, among all pairs and, where there are so many columns, more images."""
        if pair_ids is None:
            return None
        image, text = pair_ids[own, 0, None], pair_ids[own, 1, None]
        same = (image == pair_ids[:, 0]) | (text == pair_ids[:, 1])
        same[torch.arange(len(own), device=own.device), own] = False
        if more_ids is not None and columns > same.shape[1]:
            other = image == more_ids[:, 0]
            for caption in more_ids[:, 1:].T:
                other |= text == caption
            same = torch.cat([same, other], dim=1)
        return same

    found = []
    for begin in range(0, len(images), chunk):
        rows = slice(begin, begin + chunk)
        own = torch.arange(begin, min(begin + chunk, len(images)), device=images.device) + first
        to_images = scale * texts[rows] @ all_images.T
        if (same := masked(own, to_images.shape[1])) is not None:
            to_images.masked_fill_(same, -torch.inf)
        if bias is not None:
            signs = torch.full_like(to_images, -1.0)
            signs[torch.arange(len(own), device=own.device), own] = 1.0
            found.append(-F.logsigmoid(signs * (to_images + bias)).masked_fill(to_images.isneginf(), 0.0).sum(dim=1))
            continue
        to_texts = scale * images[rows] @ all_texts.T
        if (same := masked(own, to_texts.shape[1])) is not None:
            to_texts.masked_fill_(same, -torch.inf)
        there, back = (F.cross_entropy(scores, own, reduction="none") for scores in (to_texts, to_images))
        found.append(image_to_text * there + (1 - image_to_text) * back)
    return torch.cat(found) if found else images.new_zeros(0)
