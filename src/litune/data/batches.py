"""Batches for tuning: one random caption per image and epoch, in an order that the seed alone decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Batch:
    """One step's pairs: image i, and its caption i of each text field."""

    epoch: int
    images: np.ndarray
    """Positions [B] of the images among the tuned ones."""
    captions: tuple[np.ndarray, ...]
    """For each text field, positions [B] of their captions among all captions; −1 for an image without the field."""

    def take(self, rows: np.ndarray) -> Batch:
        """Some of the pairs, by number or by mask."""
        return replace(self, images=self.images[rows], captions=tuple(c[rows] for c in self.captions))


@dataclass(frozen=True)
class Field:
    """The captions of one text field, image by image: those of image i are captions[first[i] : first[i + 1]]."""

    first: np.ndarray
    captions: np.ndarray


@dataclass(frozen=True)
class Batches:
    """All batches of a run: step → batch, without state, so that any step can be gone on from.

    In an epoch every one of the `images` images comes once (but for the rest that does not fill a batch), with one
    of its captions of each text field drawn at random.
    """

    images: int
    fields: Sequence[Field]
    size: int
    seed: int

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return self.images // self.size

    def from_step(self, step: int, steps: int) -> Iterator[Batch]:
        """The batches of steps `step` to `steps` − 1."""
        while step < steps:
            epoch, within = divmod(step, self.per_epoch)
            whole = self._epoch(epoch)
            for start in range(within * self.size, self.per_epoch * self.size, self.size):
                if step == steps:
                    return
                yield whole.take(np.arange(start, start + self.size))
                step += 1

    def _epoch(self, epoch: int) -> Batch:
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(self.images)
        captions = []
        for field in self.fields:
            counts = np.diff(field.first)
            drawn = field.first[:-1] + random.integers(np.maximum(counts, 1))
            found = np.where(counts > 0, field.captions[np.minimum(drawn, len(field.captions) - 1)], -1)
            captions.append(found[order])
        return Batch(epoch, order, tuple(captions))
