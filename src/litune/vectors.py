"""Feature vectors: their precision and their length."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-8


def wide(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def class_vectors(prompts: Float[Tensor, "N D"], classes: int) -> Float[Tensor, "C D"]:
    """One vector of length one for each class, out of the features of its prompts, in the order of `write_prompts`.

    The features of a class's prompts, each of length one, are averaged and the mean is normalised again (CLIP, arXiv
    2103.00020; LiT, section 4).
    """
    return normalize(prompts.view(classes, len(prompts) // classes, -1).mean(1))


def normalize(z: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """Z / (|z| + 1e-8): features of length one; a zero vector stays zero (LiT's official code)."""
    # A zero vector's length has no gradient: where() keeps the NaN of 0/0 out of the backward pass.
    squared = z.square().sum(dim=-1, keepdim=True)
    zero = squared == 0
    return z / (torch.where(zero, torch.ones_like(squared), squared).sqrt().masked_fill(zero, 0.0) + EPSILON)
