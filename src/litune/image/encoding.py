"""Image files through a locked tower: on processors every thread decodes a batch and encodes it.

Where a runtime computes on one core per call, the cores never wait for each other: reading, decoding, resizing and the
tower itself go side by side.

A GPU is fed by one thread, which gives it a batch before the features of the last ones are there. Other threads decode
ahead, and put pictures together in pinned memory: bytes as they are, which the GPU normalises. So the GPU is the limit
where the threads decode fast enough, and a thread of the processor never waits for the GPU to hand it over.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from litune import distributed
from litune.devices import processor_cores
from litune.image.gpu import BATCH, MOST, Encode, repeated, stream
from litune.image.pictures import Decoded, Preprocess, decode, decode_file, map_ahead
from litune.image.registry import ImageTower
from litune.image.runtimes import Runtime, build, fastest, shared_by_threads
from litune.pairs.reference import read_each
from litune.pairs.sample import Damage

WORTH_TRYING = 512
"""With fewer images than this, choosing the fastest runtime would take longer than it saves."""
WORTH_COMPILING = 100_000
"""With fewer images than this, torch's compiler takes longer, half a minute and more, than it saves on a GPU."""
PIECE = 32
"""Pictures that a thread decodes at a time for a GPU."""
FEATURES = "its features"
"""How the reason begins why an image is damaged that could be read."""

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
    dtype: str = "float32",
) -> Iterator[tuple[list[Decoded], np.ndarray | None]]:
    """Batches of images in order, without their pixels, and the float32 features [good, W] of those that can be used.

    A picture whose features are no finite numbers in `dtype`, that of the store, is damaged as one that can't be read.
    `workers` threads, one per core by default; some batches are waiting, so memory stays flat.
    """
    batches = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
    read = partial(_read, preprocess=preprocess, locate=locate)
    with shared_by_threads(runtime) as run:
        encode = _by_threads if runtime.device == "cpu" else partial(_by_device, device=runtime.device)
        with closing(encode(run, read, batches, workers or processor_cores())) as encoded:
            for decoded, features in encoded:
                yield _usable(decoded, features, dtype, runtime)


def _read(images: Sequence[int], *, preprocess: Preprocess, locate: Locate) -> list[Decoded]:
    """These images, read together, decoded and preprocessed."""
    located = [locate(image) for image in images]
    read = read_each([str(path) for _, path in located])
    return [
        decode(image, key, path, data, preprocess)
        for image, (key, path), data in zip(images, located, read, strict=True)
    ]


def _stack(decoded: list[Decoded]) -> tuple[list[Decoded], Tensor | None]:
    """The images without their pixels, and the pixels [good, …] of those that could be read; None where none could."""
    good = [one.pixels for one in decoded if one.pixels is not None]
    pixels = torch.from_numpy(np.stack(good)) if good else None
    return [replace(one, pixels=None) for one in decoded], pixels


def _by_threads(
    run: Encode, read: Callable[[Sequence[int]], list[Decoded]], batches: Sequence[Sequence[int]], threads: int
) -> Generator[tuple[list[Decoded], Tensor | None]]:
    """Batches and their features: each thread reads a batch and encodes it."""

    def work(batch: Sequence[int]) -> tuple[list[Decoded], Tensor | None]:
        decoded, pixels = _stack(read(batch))
        return decoded, None if pixels is None else run(pixels).cpu()

    yield from map_ahead(work, batches, threads, ahead=2 * threads)


def _by_device(
    run: Encode,
    read: Callable[[Sequence[int]], list[Decoded]],
    batches: Sequence[Sequence[int]],
    threads: int,
    *,
    device: str,
) -> Generator[tuple[list[Decoded], Tensor | None]]:
    """Batches and their features: threads read pieces of batches, one puts them together, this one feeds the device.

    So many pieces are read ahead that the threads are busy while the device has a batch.
    """
    size = len(batches[0]) if batches else 0
    pieces = [batch[start : start + PIECE] for batch in batches for start in range(0, len(batch), PIECE)]

    def gather(parts: list[list[Decoded]]) -> tuple[list[Decoded], Tensor | None]:
        decoded, pixels = _stack(list(chain.from_iterable(parts)))
        return decoded, pixels.pin_memory() if pixels is not None and device == "cuda" else pixels

    with (
        closing(map_ahead(read, pieces, threads, ahead=2 * threads + -(-size // PIECE))) as done,
        closing(map_ahead(gather, (list(islice(done, -(-len(one) // PIECE))) for one in batches), 1, ahead=2)) as ready,
    ):
        yield from stream(run, ready)


def _usable(
    decoded: list[Decoded], features: Tensor | None, dtype: str, runtime: Runtime
) -> tuple[list[Decoded], np.ndarray | None]:
    """The images, those damaged whose features are no finite numbers in `dtype`; and the features of the others."""
    if features is None:
        return decoded, None
    values = features.numpy()
    with np.errstate(over="ignore"):
        fits = np.isfinite(values.astype(dtype)).all(axis=1)
    if fits.all():
        return decoded, values
    good = (i for i, one in enumerate(decoded) if one.damage is None)
    for place, own, fit in zip(good, values, fits, strict=True):
        if not fit:
            finite = np.isfinite(own).all()
            what = f"reach {np.abs(own).max():.3g}, too much for {dtype}" if finite else f"are not finite in {runtime}"
            key = decoded[place].key
            decoded[place] = Decoded(decoded[place].row, key, None, damage=Damage(key, f"{FEATURES} {what}"))
    return decoded, values[fits] if fits.any() else None


def pick_runtime(
    tower: ImageTower, images: Sequence[int], locate: Locate, *, name: str, precision: str, batch_size: int | None
) -> Runtime:
    """The runtime for these images: the one that is named, else the fastest that agrees, tried on the first of them.

    Its `batch_size` is the one given; where that is None, one that suits the memory of a CUDA device, and 32 elsewhere.
    Of few images none is tried: torch in float32 takes them.
    """
    exact = "float32" if precision == "auto" else precision
    on_cuda = tower.device.type == "cuda" and name in ("auto", "torch", "compile")
    size = batch_size or BATCH
    few = name == "auto" and len(images) < WORTH_TRYING and exact != "int8"
    pixels = [] if few else _first(images, locate, tower.preprocess, min(size, BATCH) if on_cuda else size)
    if not pixels:
        return replace(build(tower, "torch", exact, torch.empty(0)), batch_size=size)
    batch, largest = torch.from_numpy(np.stack(pixels)), None
    if on_cuda and batch_size is None:
        largest = _largest_batch(len(images))
    elif on_cuda:
        batch = repeated(batch, size)
    worth = len(images) >= WORTH_COMPILING
    found = fastest(tower, batch, name=name, precision=precision, compiled=worth, largest_batch=largest)
    return found if largest else replace(found, batch_size=size)


def _first(images: Sequence[int], locate: Locate, preprocess: Preprocess, count: int) -> list[np.ndarray]:
    """The pixels of the first images that can be read, at most `count`."""
    found: list[np.ndarray] = []
    for image in images[: 4 * count]:  # that many, should the first ones be damaged
        pixels = decode_file(image, *locate(image), preprocess).pixels
        if pixels is not None:
            found.append(pixels)
        if len(found) == count:
            break
    return found


def _largest_batch(images: int) -> int:
    """The largest batch size worth trying, a power of two: every process has eight batches, if it can."""
    share = max(1, images // (8 * distributed.world_size()))
    return min(MOST, max(BATCH, 1 << share.bit_length() - 1))


def pick_alike(pick: Callable[..., Runtime], name: str, precision: str) -> Runtime:
    """The runtime that `pick` finds; of several processes the first one chooses, and the others build the same."""
    if distributed.world_size() == 1:
        return pick(name=name, precision=precision)
    own: list[Runtime] = []  # the first process has built it by the time that the others are told

    def choose() -> tuple[str, str, int]:
        own.append(pick(name=name, precision=precision))
        return own[0].name, own[0].precision, own[0].batch_size

    chosen = distributed.from_main(choose)
    return distributed.together(
        lambda: own[0] if own else pick(name=chosen[0], precision=chosen[1], batch_size=chosen[2])
    )
