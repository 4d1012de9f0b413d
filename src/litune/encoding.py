"""Image files through a locked tower: every thread decodes a batch and encodes it.

Where a runtime computes on one core per call, the cores never wait for each other: reading, decoding, resizing and the
tower itself go side by side. On a GPU the threads decode while one of them at a time holds the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from litune import distributed
from litune.data.images import Decoded, Preprocess, decode, decode_file, map_ahead
from litune.data.references import read_each
from litune.devices import processor_cores
from litune.towers.image import ImageTower
from litune.towers.runtimes import Runtime, build, fastest, shared_by_threads

WORTH_TRYING = 512
"""With fewer images than this, choosing the fastest runtime would take longer than it saves."""

Locate = Callable[[int], tuple[str, Path | str]]
"""The key of an image, and where its bytes are (a file or another reference), by its number."""


def encode_images(
    runtime: Runtime,
    preprocess: Preprocess,
    images: Sequence[int],
    locate: Locate,
    *,
    batch_size: int,
    workers: int = 0,
) -> Iterator[tuple[list[Decoded], np.ndarray | None]]:
    """Batches of images in order, without their pixels, and the features [good, W] of those that could be read.

    `workers` threads, one per core by default; some batches are waiting, so memory stays flat.
    """
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    threads = workers or processor_cores()
    with shared_by_threads(runtime) as run:

        def work(batch: Sequence[int]) -> tuple[list[Decoded], np.ndarray | None]:
            located = [locate(image) for image in batch]
            read = read_each([str(path) for _, path in located])
            decoded = [
                decode(image, key, path, data, preprocess)
                for image, (key, path), data in zip(batch, located, read, strict=True)
            ]
            good = [one.pixels for one in decoded if one.pixels is not None]
            features = run(torch.from_numpy(np.stack(good))).numpy() if good else None
            return [replace(one, pixels=None) for one in decoded], features

        yield from map_ahead(work, batches, threads, ahead=2 * threads)


def pick_runtime(
    tower: ImageTower, images: Sequence[int], locate: Locate, *, name: str, precision: str, batch_size: int
) -> Runtime:
    """The runtime for these images: the one that is named, else the fastest that agrees, tried on the first of them.

    Of few images none is tried: torch in float32 takes them.
    """
    exact = "float32" if precision == "auto" else precision
    if name == "auto" and len(images) < WORTH_TRYING and exact != "int8":
        return build(tower, "torch", exact, torch.empty(0))
    pixels = []
    for image in images[: 4 * batch_size]:  # that many, should the first ones be damaged
        found = decode_file(image, *locate(image), tower.preprocess).pixels
        if found is not None:
            pixels.append(found)
        if len(pixels) == batch_size:
            break
    if not pixels:
        return build(tower, "torch", exact, torch.empty(0))
    return fastest(tower, torch.from_numpy(np.stack(pixels)), name=name, precision=precision)


def pick_alike(pick: Callable[..., Runtime], name: str, precision: str) -> Runtime:
    """The runtime that `pick` finds; of several processes the first one chooses, and the others build the same."""
    if distributed.world_size() == 1:
        return pick(name=name, precision=precision)
    own: list[Runtime] = []  # the first process has built it by the time that the others are told

    def choose() -> tuple[str, str]:
        own.append(pick(name=name, precision=precision))
        return own[0].name, own[0].precision

    chosen = distributed.from_main(choose)
    return distributed.together(lambda: own[0] if own else pick(name=chosen[0], precision=chosen[1]))
