"""Batches for tuning: one random caption per image and epoch, in an order that the seed alone decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batch:
    """One step's pairs: image i and its caption i."""

    epoch: int
    images: np.ndarray
    """Positions [B] of the images among the tuned ones."""
    captions: np.ndarray
    """Positions [B] of their captions among all captions."""


@dataclass(frozen=True)
class Batches:
    """All batches of a run: step → batch, without state, so that any step can be gone on from.

    `first` [N + 1] says where each of N images' captions begin. In an epoch every image comes once (but for the
    rest that does not fill a batch), with one of its captions drawn at random.
    """

    first: np.ndarray
    size: int
    seed: int

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return (len(self.first) - 1) // self.size

    def from_step(self, step: int, steps: int) -> Iterator[Batch]:
        """The batches of steps `step` to `steps` − 1."""
        while step < steps:
            epoch, within = divmod(step, self.per_epoch)
            order, captions = self._epoch(epoch)
            for start in range(within * self.size, self.per_epoch * self.size, self.size):
                if step == steps:
                    return
                images = order[start : start + self.size]
                yield Batch(epoch, images, captions[images])
                step += 1

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng([self.seed, epoch])
        counts = np.diff(self.first)
        order = random.permutation(len(counts))
        return order, self.first[:-1] + random.integers(counts)
