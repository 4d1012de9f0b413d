"""A tower on a GPU: batches in a continuous stream, of a size that is fast and fits the memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor

from litune.devices import free_memory, receive
from litune.errors import TowerError
from litune.progress import say

T = TypeVar("T")
Encode = Callable[[Tensor], Tensor]
"""Preprocessed pictures [B, …] to features [B, W], on the tower's device."""

BATCH = 32
"""The batch size where none was measured: on CPUs, and for few pictures."""
START, MOST = 64, 1024
"""The first batch size to try, and the largest: beyond it, decoding pictures is slower than any GPU that would gain."""
GAIN = 1.05
"""A batch of twice the size must be faster by this factor, since it takes twice the memory."""
ROOM = 0.8
"""The share of the free memory that a batch may take; the rest is for other, temporary allocations."""
IN_FLIGHT = 2
"""Batches queued on the GPU behind the one whose features are awaited."""


def stream(encode: Encode, batches: Iterable[tuple[T, Tensor | None]]) -> Iterator[tuple[T, Tensor | None]]:
    """The features of each batch of pictures, on the CPU and in order, with its companion; None stays None.

    Batches are launched before the features of earlier ones are awaited, so that the GPU always has work.
    """
    waiting: deque[tuple[T, Callable[[], Tensor | None]]] = deque()
    for beside, pixels in batches:
        waiting.append((beside, (lambda: None) if pixels is None else receive(encode(pixels))))
        if len(waiting) > IN_FLIGHT:
            first, features = waiting.popleft()
            yield first, features()
    yield from ((beside, features()) for beside, features in waiting)


def stream_rate(encode: Encode, pixels: Tensor, seconds: float) -> float:
    """Pictures per second in a stream of batches like this one, measured for at least this many seconds."""
    list(stream(encode, [(None, pixels)]))  # warm-up: chooses kernels, allocates memory
    began = time.perf_counter()

    def until() -> Iterator[tuple[None, Tensor]]:
        while time.perf_counter() - began < seconds:
            yield None, pixels

    done = sum(len(pixels) for _ in stream(encode, until()))
    return done / (time.perf_counter() - began)


class Parts:
    """A tower's `encode` for batches of `size` pictures, in smaller parts once the memory is too small for them.

    Each time memory runs out, `size` is halved for good. With `fill`, a smaller part is padded to `size` and the
    padding's features are dropped: the network sees one shape and is compiled once.
    """

    def __init__(self, encode: Encode, size: int, *, fill: bool = False) -> None:
        self.size = size
        self._encode, self._fill = encode, fill

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features [B, W] of pictures [B, …]. Raises `TowerError` where not even one picture fits."""
        while True:
            with suppress(torch.OutOfMemoryError), torch.inference_mode():
                features = [self._encode_part(part) for part in pixels.split(self.size)]
                return features[0] if len(features) == 1 else torch.cat(features)
            self._halve()  # not in an except block: the error would keep the parts computed so far in memory

    def _encode_part(self, part: Tensor) -> Tensor:
        missing = self.size - len(part)
        if missing and self._fill:
            return self._encode(torch.cat([part, part[-1:].expand(missing, *part.shape[1:])]))[: len(part)]
        return self._encode(part)

    def _halve(self) -> None:
        if self.size == 1:
            raise TowerError("the GPU's memory is too small for --batch-size 1: free some of it, or give --device cpu")
        self.size //= 2
        torch.cuda.empty_cache()
        say(f"the GPU's memory is full: encoding in parts of {self.size} (--batch-size)")


def repeated(pixels: Tensor, size: int) -> Tensor:
    """A batch of `size` pictures, made by repeating these."""
    return pixels[torch.arange(size) % len(pixels)]


def best_batch(rate: Callable[[int], float | None], most: int) -> int:
    """The batch size up to `most` at which doubling it stops paying: the double is hardly faster or does not fit.

    `rate` gives the pictures per second for a batch size, None where it does not fit. Raises `TowerError` where
    nothing fits.
    """
    size = first = min(START, most)
    best = rate(size)
    while best is None and size > 1:
        size //= 2
        best = rate(size)
    if best is None:
        raise TowerError("the GPU's memory is too small for --batch-size 1: free some of it, or give --device cpu")
    while first <= size <= most // 2:
        doubled = rate(2 * size)
        if doubled is None or doubled < GAIN * best:
            break
        size, best = 2 * size, doubled
    return size


def fitting_batch(encode: Encode, pixels: Tensor, device: torch.device, most: int) -> int:
    """The best batch size up to `most` for a tower in a CUDA device's free memory, tried on copies of `pixels`."""
    bytes_per_picture = 0.0

    def rate(size: int) -> float | None:
        nonlocal bytes_per_picture
        if size * bytes_per_picture > ROOM * free_memory(device):
            return None
        before, images_per_second = torch.cuda.memory_allocated(device), None
        torch.cuda.reset_peak_memory_stats(device)
        with suppress(torch.OutOfMemoryError), torch.inference_mode():
            images_per_second = stream_rate(encode, repeated(pixels, size).pin_memory(), 0.2)
        if images_per_second is None:
            torch.cuda.empty_cache()
        else:
            bytes_per_picture = (torch.cuda.max_memory_allocated(device) - before) / size
        return images_per_second

    return best_batch(rate, most)
