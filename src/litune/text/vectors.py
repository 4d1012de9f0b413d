"""A locked text tower gives the same vectors in every step: each text is encoded once.

All texts are encoded before the first step, in an order that follows from their lengths alone: a run that was
interrupted finds the same vectors again, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from litune.progress import track

BATCH = 512


class KeptTexts:
    """The raw vectors of N captions out of a locked text tower, float32 and in memory, each distinct text's once."""

    def __init__(
        self,
        lengths: Int[np.ndarray, " U"],
        numbers: Int[np.ndarray, " N"],
        encode: Callable[[np.ndarray], Tensor],
    ) -> None:
        """Encode U distinct texts.

        `lengths` holds their tokens, `numbers` each caption's text; `encode` gives the vectors [n, W] of n texts.
        """
        order = np.argsort(lengths, kind="stable")  # texts of similar length share a batch
        parts = []
        with torch.no_grad(), track("encoding captions, once", "texts", len(order)) as task:
            for begin in range(0, len(order), BATCH):
                parts.append(encode(order[begin : begin + BATCH]).float().cpu())
                task.advance(len(parts[-1]))
        self.vectors = torch.cat(parts)
        self.places = np.argsort(order)[numbers]

    def __call__(self, captions: Int[np.ndarray, " n"]) -> Float[Tensor, "n W"]:
        """The vectors of these captions, on the processor."""
        return self.vectors[torch.from_numpy(self.places[captions])]
