"""The highest scores of all images, block by block: on the processor, or on the GPU that the model is on.

On a GPU, blocks go there as they are stored (float16) while the one before is scored; what a run compares, the
products and the best so far stay there, and one copy comes back per search. Products are float32's in both places: the
scores agree to its rounding (some 1e-6), and equal ones are in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from litune.devices import free_memory, send
from litune.index.cells import BLOCK

SHARE = 0.25
"""The share of a GPU's free memory that a block takes, and that features which are kept may take."""
MOST_ROWS = 1 << 17
"""Rows of a GPU's block: more would not be faster, and the processor has to hold them, too."""
QUERIES = 16
"""Queries whose best images are picked at once: what that takes stays in a processor's cache."""
ROWS = 1 << 32


def block_rows(device: torch.device, width: int, dim: int, queries: int) -> int:
    """How many rows of `width` raw features are scored at once."""
    if device.type != "cuda":
        return BLOCK
    each = 14 * width + 12 * dim + 4 * queries + 24 * min(queries, QUERIES)  # bytes, with what lies between
    return max(1024, min(MOST_ROWS, int(SHARE * free_memory(device)) // each))


def best_of(
    parts: Iterator[tuple[np.ndarray, Tensor]], queries: Float[Tensor, "Q D"], top: int
) -> tuple[list[Tensor], list[Tensor]]:
    """For each query the `top` highest scores, and their rows, out of parts of (rows [n], features [n, D]).

    Equal scores are in the order of the rows. Features are where the queries are; the results are on the CPU.
    """
    best = [torch.empty(len(some), 0, dtype=torch.int64, device=queries.device) for some in queries.split(QUERIES)]
    for rows, features in parts:
        places = send(torch.from_numpy(rows), queries.device)
        for i, scores in enumerate((queries @ features.T).split(QUERIES)):
            both = torch.cat([best[i], _keys(scores, places)], dim=1)
            best[i] = both.topk(min(top, both.shape[1]), dim=1).values
    keys = torch.cat(best).cpu()
    return list(_scores(keys)), list(ROWS - 1 - keys % ROWS)


def _keys(scores: Float[Tensor, "Q n"], rows: Int[Tensor, " n"]) -> Int[Tensor, "Q n"]:
    """Integers, all of them different, that are in the order of the scores, of equal ones in that of the rows.

    `topk` alone says nothing of which of several equal scores it takes, and on a GPU takes others than on a processor.
    """
    bits = (scores + 0.0).view(torch.int32)  # the same zero for both signs
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() * ROWS) + (ROWS - 1 - rows)


def _scores(keys: Int[Tensor, "Q k"]) -> Float[Tensor, "Q k"]:
    """The scores that keys were made of, to the bit."""
    bits = keys.div(ROWS, rounding_mode="floor").int()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).view(torch.float32)


def top_positions(scores: Float[Tensor, " N"], top: int) -> Tensor:
    """The positions of the `top` highest scores, best first; equal ones in order."""
    if len(scores) > top:
        least = scores.topk(top).values[-1]
        candidates = torch.nonzero(scores >= least)[:, 0]
    else:
        candidates = torch.arange(len(scores))
    return candidates[scores[candidates].argsort(descending=True, stable=True)[:top]]
