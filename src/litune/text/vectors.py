"""Vectors of many texts, in an order that depends on their lengths alone: the same texts get the same vectors again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from litune.text.registry import TextTower
from litune.text.tokenizers import Tokens

BATCH = 512


@torch.no_grad()
def encode_texts(
    tower: TextTower,
    tokens: Tokens,
    device: torch.device,
    *,
    bfloat16: bool,
    advance: Callable[[int], None] = lambda _: None,
) -> Float[Tensor, "U W"]:
    """The tower's raw float32 vectors of U tokenised texts, on the CPU; texts of similar length share a batch.

    `advance` is told of each batch how many it had.
    """
    order = np.argsort(tokens.lengths, kind="stable")
    vectors = torch.empty(len(order), tower.width)
    for begin in range(0, len(order), BATCH):
        rows = order[begin : begin + BATCH]
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            part = tower(tower.pack(tokens.take(rows), device, bfloat16=bfloat16).to(device))
        vectors[torch.from_numpy(rows)] = part.float().cpu()
        advance(len(rows))
    return vectors
