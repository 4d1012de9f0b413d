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


def encode_by_length(
    lengths: Int[np.ndarray, " U"],
    encode: Callable[[np.ndarray], Tensor],
    advance: Callable[[int], None] = lambda _: None,
) -> Float[Tensor, "U W"]:
    """The float32 vectors of U texts, on the CPU, without gradients; texts of similar length share a batch.

    `lengths` are their token counts; `encode` gives the vectors [n, W] of n texts, given their numbers; `advance` is
    told of each batch how many it had.
    """
    order = np.argsort(lengths, kind="stable")
    vectors = torch.empty(0)
    with torch.no_grad():
        for begin in range(0, len(order), BATCH):
            rows = order[begin : begin + BATCH]
            part = encode(rows).float().cpu()
            if begin == 0:
                vectors = part.new_empty(len(order), part.shape[1])
            vectors[torch.from_numpy(rows)] = part
            advance(len(rows))
    return vectors


class KeptTexts:
    """The raw vectors of N captions from a locked text tower, in memory in float32, one per distinct text."""

    def __init__(
        self,
        lengths: Int[np.ndarray, " U"],
        numbers: Int[np.ndarray, " N"],
        encode: Callable[[np.ndarray], Tensor],
    ) -> None:
        """Encode U distinct texts (see `encode_by_length`); `numbers` are the text of each caption."""
        with track("encoding captions, once", "texts", len(lengths)) as task:
            self.vectors = encode_by_length(lengths, encode, task.advance)
        self.numbers = numbers

    def __call__(self, captions: Int[np.ndarray, " n"]) -> Float[Tensor, "n W"]:
        """The vectors of these captions, on the CPU."""
        return self.vectors[torch.from_numpy(self.numbers[captions])]
