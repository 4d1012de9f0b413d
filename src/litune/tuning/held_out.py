"""Retrieval on the held-out pairs as tuning goes, in tuning's own precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from litune import distributed
from litune.evaluation.retrieval import retrieval
from litune.model.lit import LiT
from litune.store.selection import Selection
from litune.tuning.inputs import image_ids
from litune.tuning.pixels import PixelLoader

EVALUATE_MOST = 1000


def held_out_part(val: Selection) -> Selection:
    """Those of the held-out images that are evaluated: 1,000 at most, from everywhere."""
    if len(val) <= EVALUATE_MOST:
        return val
    return val.subset(np.linspace(0, len(val) - 1, EVALUATE_MOST).round().astype(int))


class HeldOut:
    """Evaluates a model, as it is now, on held-out pairs (at most 1,000 images)."""

    def __init__(
        self,
        model: LiT,
        device: torch.device,
        pictures: Callable[[Selection], PixelLoader],
        *,
        bfloat16: bool,
        image_bfloat16: bool,
        image_micro: int,
        shared: bool,
    ) -> None:
        """`shared`: ranks share the text tower, so that all run it; what is left is rank 0's."""
        self.model, self.device, self.pictures = model, device, pictures
        self.bfloat16, self.image_bfloat16, self.image_micro = bfloat16, image_bfloat16, image_micro
        self.shared = shared

    def __call__(self, val: Selection, texts: Tensor | None = None) -> dict[str, Any]:
        """Recalls of the held-out pairs, both ways; `texts`: the features of their captions, where they are known."""
        texts = self.texts(held_out_part(val).captions) if texts is None else texts
        return self.on_main(lambda: retrieval(*self.pairs(val, texts)))

    def texts(self, captions: list[str]) -> Tensor:
        """Features of captions, in tuning's own precision; where ranks share the text tower, all call this."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.model.encode_text(captions)

    def on_main(self, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What rank 0 finds, where all ranks are here; else what this one does."""
        return distributed.from_main(function) if self.shared else function()

    def pairs(self, val: Selection, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of the images in `held_out_part(val)` and of their captions, and the image of each caption.

        `texts` are the features of all its captions; those of an image that can't be read are left out.
        """
        val = held_out_part(val)
        images, kept = self.images(val)
        # An image that several stores hold out is one image: it would tie with itself.
        first = image_ids(val) if len(val.sources) > 1 else None
        if first is not None:
            once = first[kept] == kept
            images, kept = images[torch.from_numpy(once)], kept[once]
        owner = np.full(len(val), -1)
        owner[kept] = np.arange(len(kept))
        owner = owner if first is None else owner[first]
        there = owner[val.owner] >= 0
        return images, texts[torch.from_numpy(there)], torch.from_numpy(owner[val.owner][there])

    def images(self, val: Selection) -> tuple[Tensor, np.ndarray]:
        """Features of images, and the positions of those that could be read."""
        if not self.model.image_tuned:
            return self.model.encode_features(val.features()), np.arange(len(val))
        tower = self.model.image
        assert tower is not None
        was = tower.training
        tower.eval()
        parts, kept = [], []
        for positions, pixels in self.pictures(val).in_order(self.image_micro):
            raw = tower.encode(torch.from_numpy(pixels), bfloat16=self.image_bfloat16)
            parts.append(self.model.encode_features(raw))
            kept.append(positions)
        tower.train(was)
        return torch.cat(parts), np.concatenate(kept)
