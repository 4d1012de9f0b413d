"""Image files into RGB pictures, and pictures into a tower's input."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image, ImageFile, ImageOps

from litune.errors import ConfigError, DataError, LituneError
from litune.pairs.reference import first_line, read_bytes
from litune.pairs.sample import Damage

MAX_PIXELS = 179_000_000  # Pillow's own limit for a decompression bomb
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "TGA")
"""The formats that are decoded, whatever a file's name. Pillow knows more, but would run Ghostscript for EPS."""

Preprocess = Callable[[Image.Image], np.ndarray]
"""An RGB picture into a tower's input [3, H, W]."""

T = TypeVar("T")
R = TypeVar("R")


def open_rgb(data: bytes) -> Image.Image:
    """Image bytes as an upright RGB picture: EXIF rotation applied, transparent pixels on white, the first frame.

    Raises `DataError` with the reason where the bytes are not an image, truncated, or larger than `MAX_PIXELS` (checked
    before anything is decoded).
    """
    if not data:
        raise DataError("the file is empty")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DataError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: damaged images would pass unnoticed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise DataError(f"{width}×{height} pixels, more than {MAX_PIXELS:,}")
                image.load()
                return _to_rgb(_upright(image))
    except DataError:
        raise
    # Pillow's decoders raise many kinds of errors for damaged files: OSError, SyntaxError, ValueError, struct.error …
    except Exception as why:
        reason = "not an image" if type(why).__name__ == "UnidentifiedImageError" else str(why) or repr(why)
        raise DataError(first_line(reason)) from None


@cache
def _formats() -> tuple[str, ...]:
    """The FORMATS that this build of Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _upright(image: Image.Image) -> Image.Image:
    """The picture rotated by its EXIF orientation; unchanged if only the EXIF data is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises many kinds of errors for damaged EXIF data
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow clips these to 255; keep the upper eight of sixteen bits.
        deep = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageTransform:
    """A tower's preprocessing: resize, crop, then (value / 255 − mean) / std, as timm does it for evaluation.

    Called with an RGB picture it gives uint8 values of shape [3, H, W]; the tower normalises whole batches.
    """

    size: tuple[int, int]
    """Height and width of the tower's input, in pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float = 1.0
    """The share of the resized picture that the crop keeps."""
    crop_mode: Literal["center", "squash", "border"] = "center"
    interpolation: str = "bicubic"
    """A name of timm's, or tensorflow: the squashing resize of LiT's official models (`resize_tensorflow`)."""

    def __post_init__(self) -> None:
        if self.interpolation == "tensorflow" and (self.crop_mode, self.crop_pct) != ("squash", 1.0):
            raise ConfigError("interpolation tensorflow scales whole pictures: it needs crop_mode squash, crop_pct 1")

    @cached_property
    def _pipeline(self) -> Callable[[Image.Image], np.ndarray]:
        if self.interpolation == "tensorflow":
            return partial(resize_tensorflow, size=self.size)
        from timm.data import create_transform

        pipeline: Callable[[Image.Image], np.ndarray] = create_transform(
            (3, *self.size),
            is_training=False,
            use_prefetcher=True,  # uint8 out, not normalised
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            interpolation=self.interpolation,
        )
        return pipeline

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Resized and cropped values, uint8 [3, H, W]."""
        return np.asarray(self._pipeline(image))

    def describe(self) -> dict[str, Any]:
        """The settings, as recorded in a store's fingerprint."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


VIEWS = (1, 2, 5, 10)
CORNER = 7 / 8
"""The side of a corner's square, in sides of the largest square in the picture."""


@dataclass(frozen=True)
class Views:
    """A tower's preprocessing, of several views of each picture: 1, 2, 5 or 10.

    The picture as it is, with 5 and 10 also a square at each of its corners, and with 2 and 10 the mirror images of all
    these (as the ten crops of AlexNet, Krizhevsky et al. 2012). Each view passes the tower's own preprocessing.
    """

    preprocess: Preprocess
    count: int

    def __call__(self, image: Image.Image) -> np.ndarray:
        """The views' values, [V, 3, H, W]."""
        views = [image, *(image.crop(box) for box in corners(*image.size))] if self.count >= 5 else [image]
        if self.count in (2, 10):
            views += [ImageOps.mirror(view) for view in views]
        return np.stack([self.preprocess(view) for view in views])


def corners(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """The squares at the corners of a picture, in pixels: left, top, right, bottom."""
    side = max(1, round(CORNER * min(width, height)))
    return [(x, y, x + side, y + side) for y in (0, height - side) for x in (0, width - side)]


def one_view(preprocess: Preprocess) -> Preprocess:
    """What a tower does with a single view of a picture."""
    return preprocess.preprocess if isinstance(preprocess, Views) else preprocess


def timm_settings(transform: ImageTransform) -> dict[str, Any]:
    """Settings for `timm.data.create_transform` that give the tower's preprocessing."""
    settings = transform.describe()
    return {"input_size": [3, *settings.pop("size")], **settings}


def resize_tensorflow(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """A picture scaled to height and width `size` as TF2's tf.image.resize does it, cast to uint8: [3, H, W].

    Bilinear with half-pixel centres, without antialiasing, the aspect ratio not kept; in float32 and in TensorFlow's
    order of operations, as the cast truncates and a rounding error could change a whole level.
    """
    pixels = np.asarray(image.convert("RGB")).astype(np.float32)
    low, high, share = _sources(pixels.shape[0], size[0])
    left, right, along = _sources(pixels.shape[1], size[1])
    share, along = share[:, None, None], along[:, None]
    top, bottom = (rows[:, left] + (rows[:, right] - rows[:, left]) * along for rows in (pixels[low], pixels[high]))
    scaled: np.ndarray = (top + (bottom - top) * share).astype(np.uint8)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def _sources(before: int, after: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `after` output points: the two nearest of `before` input pixels, and the weight of the second."""
    scale = np.float32(before) / np.float32(after)
    point = (np.arange(after, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    floor = np.floor(point)
    low = np.maximum(floor, 0).astype(np.int64)
    high = np.minimum(np.ceil(point), before - 1).astype(np.int64)
    return low, high, point - floor


@dataclass(frozen=True)
class Decoded:
    """An image file as a tower's input with the metadata that a store keeps; or why it can't be used."""

    row: int
    key: str
    pixels: np.ndarray | None
    width: int = 0
    height: int = 0
    sha256: str = ""
    damage: Damage | None = None


def decode_file(row: int, key: str, path: Path | str, preprocess: Preprocess) -> Decoded:
    """Read, hash, decode and preprocess one image; `path` is a file or any other reference."""
    try:
        data: bytes | Exception = read_bytes(path)
    except (OSError, DataError) as why:
        data = why
    return decode(row, key, path, data, preprocess)


def decode(row: int, key: str, path: Path | str, data: bytes | Exception, preprocess: Preprocess) -> Decoded:
    """Hash, decode and preprocess one image's bytes; `data` is the error if they could not be read."""
    try:
        if isinstance(data, Exception):
            raise data
        image = open_rgb(data)
        pixels = preprocess(image)
    except FileNotFoundError:
        return Decoded(row, key, None, damage=Damage(key, f"{path} does not exist"))
    except OSError as why:
        return Decoded(row, key, None, damage=Damage(key, why.strerror or first_line(why)))
    except LituneError as why:
        return Decoded(row, key, None, damage=Damage(key, str(why)))
    except Exception as why:  # a tower's own preprocessing, on a picture it did not expect
        reason = f"the tower's preprocessing failed: {type(why).__name__}: {why}"
        return Decoded(row, key, None, damage=Damage(key, reason))
    return Decoded(row, key, pixels, image.width, image.height, hashlib.sha256(data).hexdigest())


def map_ahead(function: Callable[[T], R], items: Iterable[T], workers: int, ahead: int) -> Generator[R]:
    """`function` over `items` in threads, results in order, at most `ahead` of them pending: bounded memory."""
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
