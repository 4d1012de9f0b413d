"""Batches for tuning: one random caption per image and epoch, in an order that the seed alone decides.

Any step can be gone on from: its batch follows from its number. An epoch's order costs a few bytes per image, and no
Python object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np

Shuffle = Literal["full", "window"]
Mix = Literal["proportional", "alternate"] | tuple[Fraction, ...]

DRAWN = 65536
"""Images whose captions are drawn at once."""
BLOCK = 4096
"""Images that the windowed shuffle keeps together: they lie side by side on the disk."""
WINDOW = 64
"""Blocks that it shuffles among each other."""
GOLDEN = (5**0.5 - 1) / 2


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
        return Batch(self.epoch, self.images[rows], tuple(c[rows] for c in self.captions))

    @property
    def all_captions(self) -> np.ndarray:
        """The captions that there are, field after field."""
        return np.concatenate([captions[captions >= 0] for captions in self.captions])


@dataclass(frozen=True)
class Field:
    """The captions of one text field, image by image: those of image i are captions[first[i] : first[i + 1]]."""

    first: np.ndarray
    captions: np.ndarray | None
    """None: the captions are numbered as they lie."""

    def draw(self, images: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """One caption of each of these images, drawn evenly; −1 for an image that has none."""
        first = self.first[images]
        counts = self.first[images + 1] - first
        return self._at(first + random.integers(np.maximum(counts, 1)), counts)

    def _at(self, places: np.ndarray, counts: np.ndarray) -> np.ndarray:
        if self.captions is not None:
            places = self.captions[np.minimum(places, len(self.captions) - 1)]
        return np.where(counts > 0, places, -1)

    def draw_all(self, images: range, random: np.random.Generator) -> np.ndarray:
        """For each of these images, which of its captions is drawn, in the fewest bytes; DRAWN at a time."""
        counts = np.diff(self.first[images.start : images.stop + 1])
        found = np.empty(len(images), np.min_scalar_type(int(counts.max(initial=1))))
        for start in range(0, len(images), DRAWN):
            found[start : start + DRAWN] = random.integers(np.maximum(counts[start : start + DRAWN], 1))
        return found

    def drawn(self, images: np.ndarray, which: np.ndarray) -> np.ndarray:
        """The captions that `draw_all` has drawn for these images."""
        first = self.first[images]
        return self._at(first + which.astype(np.int64), self.first[images + 1] - first)


class FullPass:
    """Every one of some images once, in an order in which each is as likely: 4 bytes an image, 1 for each caption."""

    def __init__(self, images: range, fields: Sequence[Field], seed: Sequence[int]) -> None:
        random = np.random.default_rng(seed)
        self.images, self.fields = images, fields
        self.order = random.permutation(np.arange(len(images), dtype=np.int32 if len(images) < 2**31 else np.int64))
        self.which = [one.draw_all(images, random) for one in fields]

    def part(self, begin: int, end: int) -> tuple[np.ndarray, ...]:
        """The images at places `begin` to `end` − 1, and their captions of each field."""
        places = self.order[begin:end].astype(np.int64)
        images = places + self.images.start
        return images, *(f.drawn(images, which[places]) for f, which in zip(self.fields, self.which, strict=True))


class WindowedPass:
    """Every one of some images once: blocks of neighbours in random order, images in random order within a window.

    A window is some blocks that follow each other in the order: what is read from the disk in some hundred steps lies
    in few places, and can be read ahead (`coming` is called with the next window's blocks).
    """

    def __init__(
        self,
        images: range,
        fields: Sequence[Field],
        seed: Sequence[int],
        coming: Callable[[list[range]], None] | None = None,
    ) -> None:
        self.images, self.fields, self.seed, self.coming = images, fields, seed, coming
        random = np.random.default_rng([*seed, 1])
        firsts = images.start + BLOCK * random.permutation(-(-len(images) // BLOCK))
        self.blocks = [range(first, min(first + BLOCK, images.stop)) for first in firsts.tolist()]
        windows = [self.blocks[i : i + WINDOW] for i in range(0, len(self.blocks), WINDOW)]
        self.starts = np.cumsum([0, *(sum(map(len, window)) for window in windows)])
        self.windows = windows
        self._number = -1
        self._window: tuple[np.ndarray, ...] = ()

    def part(self, begin: int, end: int) -> tuple[np.ndarray, ...]:
        """The images at places `begin` to `end` − 1, and their captions of each field."""
        parts = []
        for number in range(
            int(np.searchsorted(self.starts, begin, "right")) - 1, int(np.searchsorted(self.starts, end))
        ):
            start = int(self.starts[number])
            window = self._of(number)
            parts.append([column[max(begin - start, 0) : end - start] for column in window])
        return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))

    def _of(self, number: int) -> tuple[np.ndarray, ...]:
        if number != self._number:
            if self.coming is not None and number + 1 < len(self.windows):
                self.coming(self.windows[number + 1])
            random = np.random.default_rng([*self.seed, 1, number + 1])
            rows = np.concatenate([np.arange(block.start, block.stop) for block in self.windows[number]])
            images = random.permutation(rows)
            self._number, self._window = number, (images, *(one.draw(images, random) for one in self.fields))
        return self._window


@dataclass(frozen=True)
class Batches:
    """All batches of a run: step → batch, without state, so that any step can be gone on from.

    The images are those of one source, or of several, one after the other. What an epoch is:

    - one source, or `mix` is "proportional": every image of all sources once, in one order (but for the rest that does
      not fill a batch), with one of its captions of each text field drawn at random;
    - "alternate": as many batches. Each is of one source, which take turns. A source has its own order: every image
      of it once, then every one once again in another order, and so on; no rest is left out;
    - weights: as many batches. Each has size × w images of a source of weight w (weights sum to 1): exactly where that
      is a whole number, else it is rounded up or down, on average to that number. Sources go through their orders as
      above; so a source of n images is gone through w × N / n times in an epoch, where N is the number of all images.
    """

    images: int
    fields: Sequence[Field]
    size: int
    seed: int
    shuffle: Shuffle = "full"
    sources: Sequence[int] = ()
    """The number of images of each source; by default there is one."""
    mix: Mix = "proportional"
    coming: Callable[[list[range]], None] | None = None
    """Called with the images that the windowed shuffle will be at next."""
    _passes: dict[int, tuple[Sequence[int], FullPass | WindowedPass]] = field(default_factory=dict, compare=False)
    """Of each source, the pass that was asked for last."""

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return self.images // self.size

    @property
    def starts(self) -> np.ndarray:
        """Where each source's images begin, and the end."""
        return np.cumsum([0, *(self.sources or (self.images,))])

    def from_step(self, step: int, steps: int) -> Iterator[Batch]:
        """The batches of steps `step` to `steps` − 1."""
        if self.mix == "proportional":
            for number in range(step, steps):
                epoch, within = divmod(number, self.per_epoch)
                one = self._pass(0, range(self.images), [self.seed, epoch])
                yield Batch(epoch, *_split(one.part(within * self.size, (within + 1) * self.size)))
            return
        done = self.pairs_of_sources(0, step)
        for number in range(step, steps):
            counts = self.pairs_of_sources(number, number + 1)
            parts = [
                self._of_source(source, int(begin), int(begin + count))
                for source, (begin, count) in enumerate(zip(done, counts, strict=True))
                if count
            ]
            columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
            # Mixed, so that of several ranks each has its share of every source.
            order = np.random.default_rng([self.seed, number, 3]).permutation(self.size)
            yield Batch(number // self.per_epoch, *_split([column[order] for column in columns]))
            done = done + counts

    def pairs_of_sources(self, begin: int, end: int) -> np.ndarray:
        """How many pairs of each source are in the batches `begin` to `end` − 1, where the mode fixes that."""
        if self.mix == "proportional":
            raise ValueError("the order decides how many pairs of each source are in a proportional batch")
        if self.mix == "alternate":
            count = len(self.sources)
            turns = [-(-(np.array([begin, end]) - source) // count) for source in range(count)]
            return self.size * np.diff(turns)[:, 0]
        # Systematic sampling: the shares lie side by side on a line as long as the batch, and a comb with teeth at
        # distance 1 is laid on it. Shifted from batch to batch by the golden section, it hits each share evenly.
        shift = np.arange(begin + 1, end + 1) * GOLDEN % 1
        edges = [0]
        for last in range(1, len(self.mix) + 1):
            whole, rest = divmod(self.size * sum(self.mix[:last], Fraction()) / sum(self.mix, Fraction()), 1)
            edges.append((end - begin) * int(whole) + int((shift >= float(1 - rest)).sum()))
        return np.diff(edges)

    def _of_source(self, source: int, begin: int, end: int) -> tuple[np.ndarray, ...]:
        """Images `begin` to `end` − 1 of a source's endless order, and their captions."""
        images = range(int(self.starts[source]), int(self.starts[source + 1]))
        parts = []
        while begin < end:
            turn, within = divmod(begin, len(images))
            stop = min(len(images), within + end - begin)
            parts.append(self._pass(source, images, [self.seed, turn, 4, source + 1]).part(within, stop))
            begin += stop - within
        return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))

    def _pass(self, source: int, images: range, seed: Sequence[int]) -> FullPass | WindowedPass:
        if source not in self._passes or self._passes[source][0] != seed:
            self._passes.pop(source, None)  # room for the new one
            if self.shuffle == "full":
                self._passes[source] = seed, FullPass(images, self.fields, seed)
            else:
                self._passes[source] = seed, WindowedPass(images, self.fields, seed, self.coming)
        return self._passes[source][1]


def _split(columns: Sequence[np.ndarray]) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    return columns[0], tuple(columns[1:])
