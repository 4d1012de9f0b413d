"""The optimizer, its parameter groups, and the learning rate's schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: to weight matrices only.

    Not to biases, norms, the temperature, or tables of tokens and positions (LiT's "embeddings-like vectors").
    """
    return parameter.ndim >= 2 and "embedding" not in name


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    learning_rate: float,
    weight_decay: float,
    rates: dict[str, float],
) -> list[dict[str, Any]]:
    """Groups for AdamW out of all parameters that have gradients; locked ones are in none.

    `rates` multiplies the learning rate of parameters whose name starts with its key. `weight_decay` is the
    paper's, which follows the schedule but not the learning rate; AdamW multiplies by the rate, so the groups
    hold weight_decay / rate.
    """
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        factor = next((f for prefix, f in rates.items() if name.startswith(prefix)), 1.0)
        peak, decayed = learning_rate * factor, decays(name, parameter)
        group = groups.setdefault(
            (factor, decayed),
            {
                "params": [],
                "names": [],
                "lr": 0.0,
                "peak": peak,
                "weight_decay": weight_decay / peak if decayed and peak else 0.0,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def make_adamw(groups: list[dict[str, Any]], beta2: float) -> torch.optim.AdamW:
    """AdamW with β1 = 0.9 over these groups."""
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, beta2), fused=True)


def warmup_cosine(step: int, steps: int, warmup: int) -> float:
    """The share of the peak rate at `step` of `steps`: a linear rise over `warmup` steps, a cosine to zero.

    >>> [round(warmup_cosine(s, 5, 1), 3) for s in range(5)]
    [1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_rate(optimizer: torch.optim.Optimizer, share: float) -> None:
    """Set every group's learning rate to this share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
