"""Contrastive losses: pure functions of features and the scale."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-8


def normalize(z: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """Z / (|z| + 1e-8): features of length one; a zero vector stays zero (LiT's official code)."""
    # A zero vector's length has no gradient: where() keeps the NaN of 0/0 out of the backward pass.
    squared = z.square().sum(dim=-1, keepdim=True)
    zero = squared == 0
    return z / (torch.where(zero, torch.ones_like(squared), squared).sqrt().masked_fill(zero, 0.0) + EPSILON)


def softmax_loss(
    images: Float[Tensor, "B D"],
    texts: Float[Tensor, "B D"],
    scale: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """The mean of image→text and text→image cross-entropy over the batch; row i of both is a pair.

    With s = scale · images @ textsᵀ, the loss is −½ · mean_i [log softmax(s_i·)_i + log softmax(s_·i)_i]
    (LiT, arXiv 2111.07991, equation 1; CLIP, arXiv 2103.00020). Features are expected normalised.
    """
    scores = scale * images @ texts.T
    targets = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, targets) + F.cross_entropy(scores.T, targets)) / 2
