"""Image files into a tower's input, batch by batch, for a tower that is trained from pixels.

The Inception crop (arXiv 1409.4842, section 6) is a part of the picture of random place, area and aspect, scaled to
the tower's input. Its area is 5% to 100% of the picture as in big_vision's `inception_crop`; area and the logarithm
of the aspect are uniform as in torchvision's `RandomResizedCrop`. (TensorFlow's op behind big_vision draws the
aspect and the height uniformly, which favours smaller areas.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from litune.errors import DataError, TowerError
from litune.image.pictures import Decoded, ImageTransform, Preprocess, decode_file, map_ahead
from litune.pairs.sample import Damage
from litune.tuning.batches import Batch

AREA = (0.05, 1.0)
"""The crop's share of the picture's area."""
ASPECT = (3 / 4, 4 / 3)
"""The crop's width over its height."""
TRIES = 10


class PixelLoader:
    """Pictures of N image files as a tower's input, decoded ahead in threads.

    Nothing random has state: an image's crop and flip follow from the seed, the epoch and the image's position, so
    that neither the threads' timing nor an interruption changes a pixel.

    An image that can't be read is left out of its batch and kept in `damaged`, position → `Damage`.
    """

    def __init__(
        self,
        files: Sequence[Path | str],
        preprocess: Preprocess,
        *,
        augment: Literal["none", "inception"] = "none",
        flip: bool = False,
        seed: int = 0,
        workers: int,
        ahead: int,
        max_damaged: float,
    ) -> None:
        """Get ready to read `files` (or other references to pictures); nothing is opened yet.

        `preprocess` is the tower's. `flip` mirrors half of the pictures, left to right (captions that speak of left
        and right become wrong). At most `ahead` pictures are in the making or wait decoded, beside the batch that is
        being put together; two batches keep `workers` threads busy. Raises `TowerError` where the tower's
        preprocessing does not allow for crops.
        """
        self.files, self.preprocess = list(files), preprocess
        self.crop, self.flip, self.seed = augment == "inception", flip, seed
        self.preprocess_part = _preprocess_crop(preprocess) if self.crop else preprocess
        self.workers, self.ahead, self.max_damaged = workers, ahead, max_damaged
        self.damaged: dict[int, Damage] = {}

    def from_batches(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, np.ndarray]]:
        """For each batch, the pairs whose images could be read, and their augmented pixels [B, 3, H, W].

        Pixels are uint8 where the tower's preprocessing is an `ImageTransform`, else what that gives. Raises
        `DataError` where more than the share `max_damaged` of the N images can't be read, or no image of a batch.
        """
        batches, coming = itertools.tee(batches)
        stream = self._stream((batch.epoch, batch.images) for batch in coming)
        for batch, (kept, pixels) in zip(batches, stream, strict=True):
            yield batch.take(kept), pixels

    def in_order(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All images in batches of `size`, without crop and flip: positions [B] and pixels [B, 3, H, W].

        Raises `DataError` as `from_batches`.
        """
        parts = [np.arange(begin, min(begin + size, len(self.files))) for begin in range(0, len(self.files), size)]
        stream = self._stream((None, part) for part in parts)
        for part, (kept, pixels) in zip(parts, stream, strict=True):
            yield part[kept], pixels

    def _stream(self, groups: Iterable[tuple[int | None, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each (epoch, positions), which of the positions could be read, as a mask, and the pixels of those."""
        groups, coming = itertools.tee(groups)
        wanted = ((epoch, int(image)) for epoch, images in coming for image in images)
        with closing(map_ahead(lambda pair: self._decode(*pair), wanted, self.workers, self.ahead)) as decoded:
            for _, images in groups:
                found = list(itertools.islice(decoded, len(images)))
                self._note_damage(found)
                good = [d.pixels for d in found if d.pixels is not None]
                if not good:
                    raise DataError(f"none of the {len(found)} images of a batch can be read, as {self._one_damaged()}")
                yield np.array([d.pixels is not None for d in found]), np.stack(good)

    def _decode(self, epoch: int | None, image: int) -> Decoded:
        """The image at a position, as it looks in an epoch; as it is for an evaluation where that is None."""
        file = str(self.files[image])
        if epoch is None:
            return decode_file(image, file, file, self.preprocess)
        # NumPy takes seeds as equal that differ by trailing zeros: the position + 1 tells the first image's
        # numbers from those that order the epoch.
        random = np.random.default_rng([self.seed, epoch, image + 1])
        return decode_file(image, file, file, lambda picture: self._augment(picture, random))

    def _augment(self, picture: Image.Image, random: np.random.Generator) -> np.ndarray:
        mirrored = random.random() < 0.5  # drawn in any case: the crops are the same with and without flips
        if self.crop:
            picture = picture.crop(inception_box(*picture.size, random))
        if self.flip and mirrored:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return self.preprocess_part(picture)

    def _note_damage(self, found: list[Decoded]) -> None:
        """Keep each damaged image once, whatever the epoch. Raises `DataError` where there are too many."""
        self.damaged |= {d.row: d.damage for d in found if d.damage is not None and d.row not in self.damaged}
        if len(self.damaged) > self.max_damaged * len(self.files):
            raise DataError(
                f"{len(self.damaged):,} of {len(self.files):,} images can't be read (at most {self.max_damaged:.1%} "
                f"may), as {self._one_damaged()}; mend them, or embed the images again without them"
            )

    def _one_damaged(self) -> str:
        """A damaged image, for a message."""
        damage = next(iter(self.damaged.values()))
        return f"{damage.key}: {damage.reason}"


def inception_box(width: int, height: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """A random part of a picture, in pixels: left, top, right, bottom.

    Area and aspect are drawn until the part fits into the picture; for long and thin pictures where none did, it is
    the largest part in the middle whose aspect is allowed.
    """
    for _ in range(TRIES):
        area = random.uniform(*AREA) * width * height
        aspect = math.exp(random.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(random.integers(width - w + 1)), int(random.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _preprocess_crop(preprocess: Preprocess) -> Preprocess:
    """The tower's preprocessing for a picture that is a crop already: all of it is scaled to the tower's input."""
    if isinstance(preprocess, ImageTransform):
        return replace(preprocess, crop_pct=1.0, crop_mode="squash")
    # The crop is given the height and width that come out; a processor that cuts a margin off still does.
    shape = preprocess(Image.new("RGB", (256, 256))).shape
    if len(shape) != 3 or shape[0] != 3:
        raise TowerError(f"random crops need a tower whose preprocessing gives [3, H, W], not {list(shape)}")
    _, height, width = shape
    return lambda crop: preprocess(crop.resize((width, height), Image.Resampling.BICUBIC))
