"""The highest scores of all images, block by block: on the processor, or on the model's GPU.

Blocks are sent to a GPU as they are stored (float16) while the previous one is scored; mapped features, products and
the best so far stay there, and one copy comes back per search. Products are float32 on both devices: scores agree to
its rounding (about 1e-6), and equal ones are in the order of the rows.
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
"""The share of a GPU's free memory that a block takes, and that cached features may take."""
MOST_ROWS = 1 << 17
"""Rows of a block on a GPU: more would not be faster, and the processor has to hold them, too."""
QUERIES = 16
"""Queries whose best images are picked at once: few enough to stay in a processor's cache."""
ROWS = 1 << 32


def block_rows(device: torch.device, width: int, dim: int, queries: int) -> int:
    """How many rows of `width` raw features are scored at once."""
    if device.type != "cuda":
        return BLOCK
    each = 14 * width + 12 * dim + 4 * queries + 24 * min(queries, QUERIES)  # bytes, temporaries included
    return max(1024, min(MOST_ROWS, int(SHARE * free_memory(device)) // each))


def best_of(
    blocks: Iterator[tuple[np.ndarray, Tensor]], queries: Float[Tensor, "Q D"], top: int
) -> tuple[list[Tensor], list[Tensor]]:
    """For each query the `top` highest scores and their rows, over blocks of (rows [n], features [n, D]).

    Equal scores are in the order of the rows. Features are on the queries' device; the results are on the CPU.
    """
    best = [torch.empty(len(group), 0, dtype=torch.int64, device=queries.device) for group in queries.split(QUERIES)]
    for rows, features in blocks:
        numbers = send(torch.from_numpy(rows), queries.device)
        for i, scores in enumerate((queries @ features.T).split(QUERIES)):
            keys = torch.cat([best[i], _keys(scores, numbers)], dim=1)
            best[i] = keys.topk(min(top, keys.shape[1]), dim=1).values
    keys = torch.cat(best).cpu()
    return list(_scores(keys)), list(ROWS - 1 - keys % ROWS)


def _keys(scores: Float[Tensor, "Q n"], rows: Int[Tensor, " n"]) -> Int[Tensor, "Q n"]:
    """Distinct integers in the order of the scores; equal scores are in the order of their rows.

    `topk` does not say which of several equal scores it takes, and takes others on a GPU than on a processor.
    """
    bits = (scores + 0.0).view(torch.int32)  # the same zero for both signs
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() * ROWS) + (ROWS - 1 - rows)


def _scores(keys: Int[Tensor, "Q k"]) -> Float[Tensor, "Q k"]:
    """The scores that the keys were made from, bit for bit."""
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
