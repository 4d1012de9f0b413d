"""Hubs: images that are near to every text, texts near to every image; their ranks are corrected by CSLS.

Cross-domain similarity local scaling (Conneau et al., arXiv 1710.04087): an image x is ranked for a text t by
cos(t, x) − r(x) / 2, where r(x) is the mean of the ten highest cosines of x with a bank of texts; a text is ranked for
an image by cos(t, x) − r(t) / 2, with a bank of images. So candidates get one further dimension, −r / 2, queries a 1
there, and an inner product has the corrected score.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor, nn

NEAREST = 10
SCORES = 1 << 24
"""Cosines with a bank that are in memory at once."""


@dataclass(frozen=True)
class Bank:
    """Features of texts and of images that a run was tuned on, by which hubs are told; float16, of length one."""

    texts: Float[Tensor, "N D"]
    images: Float[Tensor, "M D"]

    @classmethod
    def of(cls, texts: Float[Tensor, "N D"], images: Float[Tensor, "M D"]) -> Bank:
        """A bank of these features, on the CPU."""
        return cls(texts.to("cpu", torch.float16), images.to("cpu", torch.float16))

    def corrected(
        self, images: Float[Tensor, "B D"], texts: Float[Tensor, "Q D"]
    ) -> tuple[Float[Tensor, "B E"], Float[Tensor, "Q E"]]:
        """Both sides with two further dimensions (E = D + 2): inner products are corrected in both directions.

        cos(t, x) − r(x) / 2 − r(t) / 2: in a ranking of images r(t) is the same for all, in one of texts r(x) is.
        """
        one_more = as_queries(as_candidates(images, self.texts))
        return one_more, torch.cat([as_queries(texts), corrections(texts, self.images)[:, None]], dim=1)

    @cached_property
    def digest(self) -> str:
        """A hash of the bank."""
        digest = hashlib.sha256()
        for features in (self.texts, self.images):
            digest.update(features.contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def corrections(features: Float[Tensor, "B D"], bank: Float[Tensor, "N D"]) -> Float[Tensor, " B"]:
    """−r / 2 of each of B features: r is the mean of its ten highest cosines with a bank of the other side."""
    columns = bank.to(features).T
    parts = features.split(max(1, SCORES // len(bank)))
    nearest = [(part @ columns).topk(min(NEAREST, len(bank)), dim=1).values for part in parts]
    return -torch.cat(nearest).mean(1) / 2


def as_candidates(features: Float[Tensor, "B D"], bank: Float[Tensor, "N D"]) -> Float[Tensor, "B E"]:
    """Features of what is ranked, with −r / 2 as one further dimension (E = D + 1)."""
    return torch.cat([features, corrections(features, bank)[:, None]], dim=1)


def as_queries(features: Float[Tensor, "Q D"], share: float = 1.0) -> Float[Tensor, "Q E"]:
    """Features of queries, with `share` as one further dimension (E = D + 1): 1 corrects scores, 0 leaves them."""
    return nn.functional.pad(features, (0, 1), value=share)
