"""Dropout whose random numbers cost little on CPUs.

torch draws a Bernoulli variable at a time there, which for a small tower takes longer than its matrix products.
Here a mask comes out of one random byte per value, and is applied by a bitwise and.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Zero each value with a probability of p, rounded to 256ths on CPUs, and divide the others by what is left.

    Draws from torch's generator, so that `torch.manual_seed` decides.
    """
    if not training or p == 0:
        return x
    if p == 1 or x.device.type != "cpu":
        return F.dropout(x, p)
    return _Dropout.apply(x, p)  # type: ignore[no-any-return]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, p: float) -> Tensor:
        keep = keep_mask(x.shape, p, x.dtype)
        ctx.save_for_backward(keep)
        ctx.p = p  # type: ignore[attr-defined]
        return drop(x, keep, p)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        (keep,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return drop(gradients[0], keep, ctx.p), None  # type: ignore[attr-defined]


def draw_seed() -> int:
    """63 random bits from torch's generator."""
    return int(torch.empty((), dtype=torch.int64).random_())


def keep_mask(shape: Sequence[int], p: float, dtype: torch.dtype) -> Tensor:
    """A random integer mask for values of `dtype`: no bit set with probability `p` in 256ths, else all of them."""
    count = math.prod(shape)
    words = np.random.SFC64(draw_seed()).random_raw(-(-count // 8))
    numbers = torch.from_numpy(words.view(np.uint8)[:count]).view(*shape).to(torch.int16)
    # Negative, and after the shift all ones, where the byte is at least 256 p.
    mask = torch.rsub(numbers, _in_256ths(p) - 1).bitwise_right_shift_(15)
    return mask.to(_INTEGERS[dtype.itemsize])


def drop(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """The values of `x` that `keep` keeps, divided by the probability that one is kept."""
    kept = x.contiguous().view(keep.dtype).bitwise_and(keep).view(x.dtype)
    return kept.mul_(256 / (256 - _in_256ths(p)))


def _in_256ths(p: float) -> int:
    return min(255, max(1, round(256 * p)))
