"""A run's fixed maps and linear heads as one affine map, and affine maps for libraries that only have a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from litune.errors import ExportError
from litune.model.lit import LiT

Affine = tuple[Float[Tensor, "D W"], Float[Tensor, " D"]]


def image_affine(model: LiT, target: str) -> Affine:
    """Weight [D, W] and bias [D], float64, of everything between the image tower and the normalisation."""
    weight, bias = _head(model.image_head, model.image_width, "image", target)
    if model.whitening is not None:
        weight = weight @ model.whitening.detach().cpu().double().T
    return weight, bias - weight @ model.center.detach().cpu().double()


def text_affine(model: LiT, target: str) -> Affine:
    """Weight [D, W] and bias [D], float64, of the text head."""
    return _head(model.text_head, model.text.width, "text", target)


def _head(head: nn.Module, width: int, side: str, target: str) -> Affine:
    if isinstance(head, nn.Identity):
        return torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    if isinstance(head, nn.Linear):
        return head.weight.detach().cpu().double(), head.bias.detach().cpu().double()
    raise ExportError(f"{target} has no {side} head of several layers like the run's: export to onnx instead")


def without_bias(norm: Any, affine: Affine) -> Float[Tensor, "D W"]:
    """A matrix equivalent to an affine map of a tower's output, where that output comes from the LayerNorm `norm`.

    The output is h = γ·n + β, and normalised values n sum to zero, for every token and every mean of tokens. Gain and
    shift move into the map, and `norm` gets ones for both: its output n + 1 then always sums to the width W, and the
    matrix obtains the bias from that sum. For an affine map without a bias, `norm` is left unchanged.
    """
    weight, bias = affine
    if not bias.abs().max() > 0:
        return weight
    gain, shift = norm.weight.detach().cpu().double(), norm.bias.detach().cpu().double()
    scaled = weight * gain
    constant = bias + weight @ shift - scaled.sum(1)
    with torch.no_grad():
        norm.weight.fill_(1)
        norm.bias.fill_(1)
    matrix: Tensor = scaled + constant[:, None] / len(gain)
    return matrix


def last_norm(tower: nn.Module, width: int, pooled: Callable[[], Tensor]) -> nn.LayerNorm | None:
    """The LayerNorm whose output, or a mean of whose outputs, is the pooled output; None where there is none.

    `pooled` runs the tower and returns [B, W]. The tower is left unchanged.
    """
    for norm in reversed([m for m in tower.modules() if isinstance(m, nn.LayerNorm)]):
        if norm.bias is None or norm.bias.shape != (width,):
            continue
        bias, step = norm.bias.detach().clone(), torch.linspace(-1, 1, width)
        with torch.no_grad():
            before = pooled()
            norm.bias.add_(step)
            after = pooled()
            norm.bias.copy_(bias)
        sums = ((before - bias) / norm.weight).sum(1)
        if torch.allclose(after - before, step.expand_as(before), atol=1e-4) and sums.abs().max() < 1e-2:
            return norm
    return None
