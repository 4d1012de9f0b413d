"""A tower on a GPU: batches that follow one another without a wait, of a size that is fast and fits the memory."""

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
"""Preprocessed pictures [B, …] to features [B, W], on the device that computes."""

BATCH = 32
"""Pictures in a batch where none were tried: on processors, and of few pictures."""
START, MOST = 64, 1024
"""The first batch size to try, and the largest: what could gain beyond it is faster than pictures can be decoded."""
GAIN = 1.05
"""A batch of twice the size must be this much faster, since it takes twice the memory."""
ROOM = 0.8
"""The share of the free memory that a batch may take: more leaves no room for what else comes and goes."""
IN_FLIGHT = 2
"""Batches that the GPU has beyond the one whose features are waited for."""


def stream(encode: Encode, batches: Iterable[tuple[T, Tensor | None]]) -> Iterator[tuple[T, Tensor | None]]:
    """For each batch of pictures the features, on the CPU, in order, with what stands beside it; None stays None.

    A batch is launched before the features of those before it are waited for, so that the GPU always has work.
    """
    waiting: deque[tuple[T, Callable[[], Tensor | None]]] = deque()
    for beside, pixels in batches:
        waiting.append((beside, (lambda: None) if pixels is None else receive(encode(pixels))))
        if len(waiting) > IN_FLIGHT:
            first, features = waiting.popleft()
            yield first, features()
    yield from ((beside, features()) for beside, features in waiting)


def stream_rate(encode: Encode, pixels: Tensor, seconds: float) -> float:
    """Pictures a second in batches like this one, one after the other, over this time or longer."""
    list(stream(encode, [(None, pixels)]))  # kernels are chosen and memory is taken
    began = time.perf_counter()

    def until() -> Iterator[tuple[None, Tensor]]:
        while time.perf_counter() - began < seconds:
            yield None, pixels

    done = sum(len(pixels) for _ in stream(encode, until()))
    return done / (time.perf_counter() - began)


class Parts:
    """A tower's `encode` for batches of `size` pictures, in smaller parts once the memory is too small for them.

    Each time that memory runs out, `size` is halved for good. With `fill`, a part of fewer pictures is filled up, and
    what is too much dropped again: the network sees one shape, for which it is compiled once.
    """

    def __init__(self, encode: Encode, size: int, *, fill: bool = False) -> None:
        self.size = size
        self._encode, self._fill = encode, fill

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features [B, W] of pictures [B, …]. Raises `TowerError` where not even one picture fits."""
        while True:
            with suppress(torch.OutOfMemoryError), torch.inference_mode():
                found = [self._one(part) for part in pixels.split(self.size)]
                return found[0] if len(found) == 1 else torch.cat(found)
            self._halve()  # only here, as the error holds what was computed so far

    def _one(self, part: Tensor) -> Tensor:
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
    """A batch of `size` pictures, made of these again and again."""
    return pixels[torch.arange(size) % len(pixels)]


def best_batch(rate: Callable[[int], float | None], most: int) -> int:
    """The batch size, a power of two up to `most`, beyond which twice the size is hardly faster or does not fit.

    `rate` gives the pictures a second in batches of a size, None where they don't fit. Raises `TowerError` where
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
        twice = rate(2 * size)
        if twice is None or twice < GAIN * best:
            break
        size, best = 2 * size, twice
    return size


def fitting_batch(encode: Encode, pixels: Tensor, device: torch.device, most: int) -> int:
    """The batch size up to `most` that suits a tower and a CUDA device's free memory; `pixels` are some pictures."""
    bytes_of_one = 0.0

    def rate(size: int) -> float | None:
        nonlocal bytes_of_one
        if size * bytes_of_one > ROOM * free_memory(device):
            return None
        before, found = torch.cuda.memory_allocated(device), None
        torch.cuda.reset_peak_memory_stats(device)
        with suppress(torch.OutOfMemoryError), torch.inference_mode():
            found = stream_rate(encode, repeated(pixels, size).pin_memory(), 0.2)
        if found is None:
            torch.cuda.empty_cache()
        else:
            bytes_of_one = (torch.cuda.max_memory_allocated(device) - before) / size
        return found

    return best_batch(rate, most)
