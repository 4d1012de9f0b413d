"""How much passes through a tower at once: as asked for, or what the memory of the GPU holds."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from litune import distributed
from litune.config import TuneConfig
from litune.devices import free_memory
from litune.errors import ConfigError
from litune.progress import say
from litune.tuning.inputs import Micro

TRIAL = 64
"""Rows of the smaller of two trials, whose difference is what a row takes."""
SHARE = 0.8
"""Of the memory that is free, what micro-batches may fill: fragments and the scores need room as well."""
ON_CPU = Micro(texts=512, images=64)
"""What the caches of processors like."""

Trial = Callable[[int], Tensor]
"""Encodes so many rows, with gradients where the tower is tuned."""


def choose_micro(config: TuneConfig, most: int, texts: Trial, images: Trial | None, reserved: int) -> Micro:
    """The micro-batches on GPUs, of a run whose rank has `most` pairs a step; `reserved` bytes are yet to be taken.

    What is asked for stands. By default all pairs pass at once, without gradient caching, or as many as were measured
    to fit. All ranks get the same.
    """
    chosen = Micro(
        config.micro_batch or _fitting(texts, most, reserved),
        config.image_micro_batch or (_fitting(images, most, reserved) if images else most),
    )
    everywhere = distributed.gather_objects(chosen)
    return Micro(min(one.texts for one in everywhere), min(one.images for one in everywhere))


def _fitting(encode: Trial, most: int, reserved: int) -> int:
    """How many rows fit into the memory that is free, forward and backward, by two trials after a first one."""
    try:
        # The first takes the memory of the parameters' gradients. They can be larger than a trial's activations, which
        # are given up while gradients are made, and would hide them.
        _peak(encode, min(TRIAL, most))
        small, large = _peak(encode, min(TRIAL, most)), _peak(encode, min(2 * TRIAL, most))
    except torch.OutOfMemoryError:
        return max(1, min(TRIAL, most) // 8)
    each = max(1.0, (large - small) / TRIAL)
    fixed = max(0.0, small - TRIAL * each)
    room = SHARE * free_memory(torch.device("cuda")) - reserved - fixed
    return max(1, min(most, int(room / each)))


def _peak(encode: Trial, rows: int) -> int:
    """The bytes that these rows take at most, forward and backward."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    features = encode(rows)
    if features.requires_grad:
        features.sum().backward()
    return torch.cuda.max_memory_allocated() - before


def halved(micro: Micro, at: str, most: int) -> Micro:
    """The micro-batches after memory ran out while a step was `at` something (see `Step.at`).

    Raises `ConfigError`, which names the setting, where nothing is left to be halved.
    """
    alone = distributed.world_size() == 1
    side = "images" if at == "images" and micro.images > 2 else "texts"
    rows = min(getattr(micro, side), most)
    if at == "optimizer" or rows <= (2 if side == "images" else 1) or not alone:
        raise ConfigError(_remedy(at, micro, alone))
    fewer = Micro(rows // 2, micro.images) if side == "texts" else Micro(micro.texts, rows // 2)
    name = "micro-batch" if side == "texts" else "image-micro-batch"
    say(f"the GPU's memory ran out: {side} pass their tower {rows // 2:,} at once from here on (--{name})")
    return fewer


def _remedy(at: str, micro: Micro, alone: bool) -> str:
    if at == "optimizer":
        return (
            "the optimizer's states don't fit into the GPU's memory beside the model: use --optimizer adafactor, or "
            "several GPUs with --shard"
        )
    if not alone:
        return (
            f"the GPU's memory ran out with --micro-batch {micro.texts} and --image-micro-batch {micro.images}: "
            "give smaller ones"
        )
    return (
        "a step doesn't fit into the GPU's memory even one text at a time: lower --batch-size, use "
        "--gradient-checkpointing, or several GPUs with --shard"
    )
