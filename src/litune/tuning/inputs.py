"""What a step reads, made ready on the processor: captions tokenised and packed, features gathered, ids looked up.

None of it needs the model's state, so a thread makes it ahead of the step. On a GPU it is copied out of pinned memory
by a stream of its own while the step before computes: the host work of 16,384 captions takes longer than their step
does on a fast card.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from litune import distributed
from litune.config import TuneConfig
from litune.devices import sent, tensors_of
from litune.model.lit import LiT
from litune.store.captions import BLOCK, TOKENIZED_MOST, LaterTokens, first_of_equal, hash_texts
from litune.store.selection import Selection
from litune.text.packing import Packed
from litune.text.tokenizers import Tokens
from litune.tuning.batches import Batch, Batches
from litune.tuning.losses import Ids, MoreImages

T = TypeVar("T")
AHEAD = 2
"""Steps whose inputs are made before they are asked for."""


KeptTexts = Callable[[np.ndarray], Tensor]
"""Gives the raw vectors [n, W] of the captions with these numbers."""


@dataclass(frozen=True)
class Micro:
    """The most texts and images that pass through a tower at once."""

    texts: int
    images: int


@dataclass(frozen=True)
class Piece:
    """A micro-batch of one side: what its tower reads, and the seed of what is random in it."""

    rows: int
    """How many features it has. A tower that ranks share reads a text, to no effect, where a rank has none."""
    read: Packed | Tensor | np.ndarray
    """Packed texts, stored vectors [rows, W], or pixels (on the processor until the tower reads them)."""
    seed: int


@dataclass(frozen=True)
class FieldPairs:
    """The pairs of one text field: of an image that has none of it there is no pair."""

    there: np.ndarray
    """Which rows of the rank's batch have the field."""
    index: Tensor | None
    """The same on the device; None: all rows."""
    total: int
    """The number of pairs, over all ranks."""
    ids: Ids | None


@dataclass(frozen=True)
class Inputs:
    """What one rank reads for one step."""

    step: int
    batch: Batch
    """This rank's pairs."""
    micro: Micro
    texts: list[Piece]
    images: list[Piece]
    fields: list[FieldPairs]
    more_images: MoreImages | None
    """Images from outside the batch, with their *raw* features."""


class Preparation:
    """Makes the inputs of any step out of its batch."""

    def __init__(
        self,
        config: TuneConfig,
        train: Selection,
        batches: Batches,
        model: LiT,
        tokens: Tokens | LaterTokens,
        device: torch.device,
        *,
        bfloat16: bool,
        shared: bool,
    ) -> None:
        """`shared`: ranks share the text tower, so that all run it equally often."""
        self.config, self.train, self.batches, self.model = config, train, batches, model
        self.tokens, self.device, self.bfloat16, self.shared = tokens, device, bfloat16, shared
        self.kept_texts: KeptTexts | None = None
        self.image_ids = image_ids(train) if config.mask_duplicates else None
        self.text_ids = _text_ids(train) if config.mask_duplicates and isinstance(tokens, Tokens) else None
        self.most_captions = int(train.counts.max()) if config.image_negatives else 0

    @property
    def own(self) -> list[np.ndarray]:
        """The rows of a batch that each rank has."""
        return np.array_split(np.arange(self.batches.size), distributed.world_size())

    def __call__(
        self, step: int, whole: Batch, micro: Micro, own: Batch | None = None, pixels: np.ndarray | None = None
    ) -> Inputs:
        """The rank's inputs of a step; where pictures are tuned on, `own` are its pairs and `pixels` their pictures."""
        batch = whole.take(self.own[distributed.rank()]) if own is None else own
        self.train.touch(batch.images)
        return Inputs(
            step,
            batch,
            micro,
            self._texts(step, whole, batch, micro.texts),
            self._images(step, batch, micro, pixels),
            [self._field(batch, whole, number) for number in range(len(batch.captions))],
            self._more_images(step, whole),
        )

    def _texts(self, step: int, whole: Batch, batch: Batch, micro: int) -> list[Piece]:
        captions = batch.all_captions
        count = -(-len(captions) // micro)
        if self.shared:  # as many on every rank, so that some may be empty
            have = np.sum([c >= 0 for c in whole.captions], axis=0)
            count = max(-(-int(have[rows].sum()) // micro) for rows in self.own)
        return [
            Piece(len(rows), self._read_texts(rows), seed)
            for rows, seed in self._seeded(step, captions, max(1, count), stream=0)
        ]

    def _read_texts(self, captions: np.ndarray) -> Packed | Tensor:
        if not len(captions) and self.shared:
            captions = np.zeros(1, dtype=int)
        if self.kept_texts is not None:
            return self.kept_texts(captions)
        return self.model.text.pack(self.tokens.take(captions), self.device, bfloat16=self.bfloat16)

    def _images(self, step: int, batch: Batch, micro: Micro, pixels: np.ndarray | None) -> list[Piece]:
        if pixels is not None:
            count = -(-len(pixels) // micro.images)
            if micro.images > 1:  # a lone picture has no batch statistics
                count = max(1, min(count, len(pixels) // 2))
            parts = self._seeded(step, np.arange(len(pixels)), count, stream=1)
            return [Piece(len(rows), pixels[rows], seed) for rows, seed in parts]
        count = max(1, -(-len(batch.images) // (8 * micro.texts)))  # a head takes less than a tower
        return [
            Piece(len(rows), torch.from_numpy(self.train.features(rows)), seed)
            for rows, seed in self._seeded(step, batch.images, count, stream=1)
        ]

    def _seeded(self, step: int, rows: np.ndarray, count: int, *, stream: int) -> Iterator[tuple[np.ndarray, int]]:
        """`count` parts of the rows, of like size (no part is a lone picture), each with a seed of its own."""
        root = np.random.SeedSequence([self.config.seed, step, stream, distributed.rank()])
        seeds = root.generate_state(count, np.uint64)
        for part, seed in zip(np.array_split(rows, count), seeds, strict=True):
            yield part, int(seed >> 1)

    def _field(self, batch: Batch, whole: Batch, number: int) -> FieldPairs:
        captions = batch.captions[number]
        there = np.flatnonzero(captions >= 0)
        index = None if len(there) == len(captions) else torch.from_numpy(there)
        if self.model.image_tuned:  # pictures that can't be read have left the batch, and only their rank knows
            total = distributed.sum_counts(len(there))
        else:
            total = int((whole.captions[number] >= 0).sum())
        return FieldPairs(there, index, total, self.ids(batch.images[there], captions[there]))

    def ids(self, images: np.ndarray, captions: np.ndarray) -> Ids | None:
        """What tells equal images and equal captions, unless they are to be each other's negatives."""
        if not self.config.mask_duplicates:
            return None
        return Ids(torch.from_numpy(self._image_ids(images)), torch.from_numpy(self._ids_of_texts(captions)))

    def _image_ids(self, images: np.ndarray) -> np.ndarray:
        found: np.ndarray = images if self.image_ids is None else self.image_ids[images]
        return found

    def _ids_of_texts(self, captions: np.ndarray) -> np.ndarray:
        if self.text_ids is not None:
            found: np.ndarray = self.text_ids[captions]
            return found
        return hash_texts(self.train.take_captions(captions))

    def _more_images(self, step: int, whole: Batch) -> MoreImages | None:
        """Images from outside the batch, drawn for this step alone; each rank brings its share."""
        wanted = min(self.config.image_negatives, len(self.train) - self.batches.size)
        if wanted <= 0:
            return None
        random = np.random.default_rng([self.config.seed, step, 2])
        # As many more as the batch has, so that enough are left without its own; a step costs what it draws.
        drawn = random.choice(len(self.train), wanted + len(whole.images), replace=False)
        drawn = drawn[~np.isin(drawn, whole.images)][:wanted]
        drawn = np.array_split(drawn, distributed.world_size())[distributed.rank()]
        first = self.train.offsets[drawn].astype(np.int64)
        counts = self.train.offsets[drawn + 1] - first
        place = np.arange(self.most_captions)
        there = place < counts[:, None]
        texts = np.full(there.shape, -1)
        if self.config.mask_duplicates:
            texts[there] = self._ids_of_texts((first[:, None] + place)[there])
        features = torch.from_numpy(self.train.features(drawn))
        return MoreImages(features, torch.from_numpy(self._image_ids(drawn)), torch.from_numpy(texts))


def image_ids(train: Selection) -> np.ndarray | None:
    """Numbers [N] that are equal for equal image files: the position of the first; None where no two are equal."""
    hashes = train.image_hashes()
    return None if hashes is None else first_of_equal(hashes)


def _text_ids(train: Selection) -> np.ndarray | None:
    """The hash of every caption, once; None where there are too many to hold."""
    count = int(train.offsets[-1])
    if count > TOKENIZED_MOST:
        return None
    starts = range(0, count, BLOCK)
    found = [hash_texts(train.take_captions(np.arange(start, min(start + BLOCK, count)))) for start in starts]
    return np.concatenate(found)


def ahead(items: Iterable[T], depth: int = AHEAD) -> Iterator[T]:
    """The items, `depth` of them made in a thread while those before are in use."""
    items = iter(items)
    coming: deque[Future[T | None]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="loader") as pool:
        coming.extend(pool.submit(next, items, None) for _ in range(depth))
        while (item := coming.popleft().result()) is not None:
            coming.append(pool.submit(next, items, None))
            yield item


def on_device(items: Iterable[Inputs], device: torch.device) -> Iterator[Inputs]:
    """The inputs with their tensors on `device`, made and sent in a thread."""
    if device.type != "cuda":
        yield from ahead(sent(item, device) for item in items)
        return
    stream = torch.cuda.Stream()  # of this rank's card; the thread's own default would be the first

    def copying() -> Iterator[tuple[Inputs, torch.cuda.Event]]:
        for item in items:
            with torch.cuda.stream(stream):
                copy, copied = sent(item, device), stream.record_event()
            yield copy, copied

    for item, copied in ahead(copying()):
        use_from(item, copied)
        yield item


def use_from(item: Inputs, copied: torch.cuda.Event) -> None:
    """Have the current stream wait for the copies, and keep their memory until it has read them."""
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for tensor in tensors_of(item):
        tensor.record_stream(current)
