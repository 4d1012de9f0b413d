"""How far the loss and its gradients move when matrix products round what they multiply, to TF32 or to bfloat16.

A GPU's tensor cores multiply rounded numbers and add up in float32. Here the same is done on the processor: the
operands of every product that a loss computes are rounded first. The reference is the loss in float64.

    python benchmarks/loss_precision.py --batch 4096

Prints a table; the last line is JSON. Errors of gradients are relative: |g − exact| / |exact|.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from litune.tuning.losses import sigmoid_loss, softmax_loss
from litune.vectors import normalize

BITS = {"float32": None, "TF32": 10, "bfloat16": 7}
"""The bits behind the point that operands keep."""


def rounded(x: Tensor, bits: int) -> Tensor:
    """Float32 values, rounded to the nearest of `bits` bits behind the point, ties to even."""
    dropped = 23 - bits
    whole = x.contiguous().view(torch.int32)
    odd = whole.bitwise_right_shift(dropped).bitwise_and(1)
    return (whole + (odd + ((1 << (dropped - 1)) - 1))).bitwise_and(-(1 << dropped)).view(torch.float32)


class RoundedProducts(TorchDispatchMode):
    """Inside, operands of matrix products are rounded."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        aten = torch.ops.aten
        self.first = {aten.mm.default: 0, aten.mm.out: 0, aten.addmm_.default: 1}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.first:
            begin = self.first[func]
            operands = [rounded(x, self.bits) for x in args[begin : begin + 2]]
            args = (*args[:begin], *operands, *args[begin + 2 :])
        return func(*args, **(kwargs or {}))


def pairs(batch: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of pairs that are hard to tell apart: in groups of 16 alike, whose images have a cosine of 0.94.

    A pair's cosine is 0.7, that of an image with its group's other texts 0.67, so that the largest scale matters too.
    """
    generator = torch.Generator().manual_seed(seed)
    groups, own, noise = (torch.randn(batch, width, dtype=torch.float64, generator=generator) for _ in range(3))
    images = normalize(groups[torch.arange(batch) // 16] + 0.25 * own)
    return images, normalize(images + normalize(noise))


def losses(kind: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if kind == "softmax":
        return softmax_loss
    return lambda images, texts, scale: sigmoid_loss(images, texts, scale, torch.full_like(scale, -10.0).detach())


def gradients(kind: str, images: Tensor, texts: Tensor, scale: float) -> list[Tensor]:
    """The loss and its gradients by images, texts and the scale."""
    inputs = [x.clone().requires_grad_() for x in (images, texts, torch.tensor(scale, dtype=images.dtype))]
    value = losses(kind)(*inputs)
    return [value.detach().double(), *(g.double() for g in torch.autograd.grad(value, inputs))]


def measure(kind: str, batch: int, width: int, scale: float) -> list[dict[str, Any]]:
    """One row of the table for each arithmetic."""
    images, texts = pairs(batch, width)
    exact = gradients(kind, images, texts, scale)
    found = []
    for name, bits in BITS.items():
        arithmetic: AbstractContextManager[Any] = nullcontext() if bits is None else RoundedProducts(bits)
        with arithmetic:
            ours = gradients(kind, images.float(), texts.float(), scale)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(ours, exact, strict=True)]
        names = ("loss", "to_images", "to_texts", "to_scale")
        row = {"loss_kind": kind, "batch": batch, "width": width, "scale": scale, "products": name}
        found.append(row | {"exact_loss": float(exact[0])} | dict(zip(names, errors, strict=True)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[4096])
    parser.add_argument("--width", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--scale", type=float, nargs="+", default=[10.0, 30.0, 100.0])
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'loss':8} {'batch':>6} {'width':>5} {'scale':>5}  {'products':9}      loss  to images  to texts  to scale")
    for kind in ("softmax", "sigmoid"):
        for batch in options.batch:
            for width in options.width:
                for scale in options.scale:
                    for row in measure(kind, batch, width, scale):
                        rows.append(row)
                        errors = " ".join(f"{row[name]:9.1e}" for name in ("loss", "to_images", "to_texts", "to_scale"))
                        print(f"{kind:8} {batch:6} {width:5} {scale:5.0f}  {row['products']:9} {errors}")
    print(json.dumps({"loss_precision": rows}))


if __name__ == "__main__":
    main()
