"""Vectors of a locked text tower, computed once, as they are the same in every step.

All texts are encoded before the first step, in an order that depends on their lengths alone: a resumed run gets the
same vectors, to the last bit.
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
    """The raw vectors of N captions from a locked text tower, in memory in float32, one per distinct text."""

    def __init__(
        self,
        lengths: Int[np.ndarray, " U"],
        numbers: Int[np.ndarray, " N"],
        encode: Callable[[np.ndarray], Tensor],
    ) -> None:
        """Encode U distinct texts.

        `lengths` are their token counts and `numbers` the text of each caption; `encode` gives the vectors [n, W] of n
        texts, given their numbers.
        """
        order = np.argsort(lengths, kind="stable")  # texts of similar length share a batch
        parts = []
        with torch.no_grad(), track("encoding captions, once", "texts", len(order)) as task:
            for begin in range(0, len(order), BATCH):
                parts.append(encode(order[begin : begin + BATCH]).float().cpu())
                task.advance(len(parts[-1]))
        self.vectors = torch.cat(parts)
        self.rows = np.argsort(order)[numbers]

    def __call__(self, captions: Int[np.ndarray, " n"]) -> Float[Tensor, "n W"]:
        """The vectors of these captions, on the CPU."""
        return self.vectors[torch.from_numpy(self.rows[captions])]
