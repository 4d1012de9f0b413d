"""Vectors of many texts, in an order that depends on their lengths alone: the same texts get the same vectors again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

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
