"""Image files into RGB pictures, and pictures into a tower's input."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from jaxtyping import Int
from PIL import Image, ImageFile, ImageOps

from litune.errors import ConfigError, DataError, LituneError
from litune.files import LFS_POINTER
from litune.pairs.reference import first_line, read_bytes
from litune.pairs.sample import Damage

MAX_PIXELS = 179_000_000  # Pillow's own limit for a decompression bomb
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000", "TGA")
"""The formats that are decoded, whatever a file's name. Pillow knows more, but would run Ghostscript for EPS."""

LONGEST = 100
"""The largest aspect ratio of a picture that is scaled whole."""
LONG_TEXT = 1 << 20
"""Bytes of a text in a PNG file that Pillow reads."""
HEAD = 1024
"""The bytes of a file by which a picture that can't be read is named."""
HEIF = re.compile(rb"....ftyp(heic|heix|hevc|heim|heis|mif1|msf1)", re.DOTALL)
JXL = re.compile(rb"\xff\x0a|\0\0\0\x0cJXL ")
DEPTHS = (8, 10, 12, 14, 16, 24, 32)
"""Bits of the samples that cameras and scanners give."""
DIM = 16
"""The level that some color of 16 bits reaches, if there are more than 12 bits in any."""
BITS, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339
"""Tags of TIFF."""
WHITE_IS_ZERO, SEPARATE, SIGNED = 0, 2, 2
"""Values of the tags."""

Preprocess = Callable[[Image.Image], np.ndarray]
"""An RGB picture into a tower's input [3, H, W]."""

T = TypeVar("T")
R = TypeVar("R")


def open_rgb(data: bytes) -> Image.Image:
    """Image bytes as an upright RGB picture: EXIF rotation applied, transparent pixels on white, the first frame.

    Samples of other than 8 bits become 8, see `to_levels`. Raises `DataError` with the reason where the bytes are not
    an image, truncated, or larger than `MAX_PIXELS` (checked before anything is decoded).
    """
    if not data:
        raise DataError("the file is empty")
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise DataError("PIL.ImageFile.LOAD_TRUNCATED_IMAGES is set: damaged images would pass unnoticed")
    return read_picture(io.BytesIO(data), lambda image: _to_rgb(upright(image)))


def read_picture(file: Any, use: Callable[[ImageFile.ImageFile], T]) -> T:
    """What `use` makes of the picture in a file, which is not decoded yet.

    Raises `DataError` with the reason where the file is no image or damaged, or has more than `MAX_PIXELS`.
    """
    try:
        try:
            return _use(file, use)
        except ValueError as why:
            if "MAX_TEXT" not in str(why):  # Pillow refuses pictures whose texts are long
                raise
            file.seek(0)
            return _use(io.BytesIO(_without_long_texts(file.read())), use)
    except (DataError, FileNotFoundError):
        raise
    # Pillow's decoders raise many kinds of errors for damaged files: OSError, SyntaxError, ValueError, struct.error …
    except Exception as why:
        file.seek(0)
        unknown = type(why).__name__ == "UnidentifiedImageError"
        raise DataError(_not_read(file.read(HEAD)) if unknown else first_line(str(why) or repr(why))) from None


def _use(file: Any, use: Callable[[ImageFile.ImageFile], T]) -> T:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file, formats=_formats()) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(f"{width}×{height} pixels, more than {MAX_PIXELS:,}")
            return use(image)


@cache
def _formats() -> tuple[str, ...]:
    """The FORMATS that this build of Pillow supports, with those of the extra `pictures` that are installed."""
    with suppress(ImportError):
        import_module("pillow_heif").register_heif_opener()
    with suppress(ImportError):
        import_module("pillow_jxl")
    Image.init()
    return tuple(name for name in (*FORMATS, "HEIF", "JXL") if name in Image.OPEN)


def _not_read(head: bytes) -> str:
    """Why a file that begins like this is not read."""
    for kind, package, start in (("HEIC", "pillow-heif", HEIF), ("JPEG XL", "pillow-jxl-plugin", JXL)):
        if start.match(head):
            return f"{kind} needs the package {package}: run  pip install 'litune[pictures]'"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "a TIFF of a kind that can't be read: save it with 8 or 16 bits a sample"
    if b"<svg" in head:
        return "not an image of pixels but a drawing (SVG): save it as PNG"
    if head.startswith(LFS_POINTER):
        return "not an image but a pointer of Git LFS: run  git lfs pull"
    return "not an image"


def _without_long_texts(png: bytes) -> bytes:
    """A PNG file without the texts and profiles that are longer than `LONG_TEXT`, packed or not."""
    chunks, at = [png[:8]], 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4])
        end = at + 12 + length
        if not _is_long_text(png[at + 4 : at + 8], png[at + 8 : at + 8 + length]):
            chunks.append(png[at:end])
        at = end
    return b"".join(chunks)


def _is_long_text(kind: bytes, body: bytes) -> bool:
    if kind not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
        return False
    rest = body.partition(b"\0")[2]
    packed = kind in (b"zTXt", b"iCCP") or (kind == b"iTXt" and rest[:1] == b"\1")
    text = rest[2:].split(b"\0", 2)[-1] if kind == b"iTXt" else rest[1:]
    try:
        return len(zlib.decompressobj().decompress(text, LONG_TEXT + 1) if packed else text) > LONG_TEXT
    except zlib.error:
        return True


def upright(image: ImageFile.ImageFile) -> Image.Image:
    """A picture decoded, rotated by its EXIF orientation, and of 8 bits a sample; of no rotation if EXIF is damaged."""
    tags: Any = getattr(image, "tag_v2", {})
    deep = 16 in tags.get(BITS, ()) or any(";16" in str(tile.args) for tile in image.tile)
    if deep and tags.get(PLANAR) == SEPARATE:
        _read_planes(image)
    image.load()
    if deep and image.mode in ("RGB", "RGBA", "LA") and _brightest(image) < DIM:
        raise DataError("its samples of 16 bits hold no more than 12: save it with 8 bits a sample")
    picture: Image.Image = image
    with suppress(Exception):  # Pillow raises many kinds of errors for damaged EXIF data
        picture = ImageOps.exif_transpose(image)
    return _eight_bits(picture, tags)


def _brightest(image: Image.Image) -> int:
    """The highest level of any color, transparency left out."""
    bands: Any = [image.getchannel(band) for band in image.getbands() if band != "A"]
    return max(int(band.getextrema()[1]) for band in bands)


def _read_planes(image: Any) -> None:
    """Have Pillow read planes of 16 bits that are not packed as such: it would take them for planes of 8 bits."""
    order = "L" if image.tag_v2.prefix == b"II" else "B"
    image.tile = [
        tile._replace(args=(f"{tile.args[0]};16{order}", *tile.args[1:])) if tile.codec_name == "raw" else tile
        for tile in image.tile
    ]


def _eight_bits(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """A picture of one deep or signed sample a pixel as one of 8 bits, by its TIFF tags; others as they are."""
    signed = SIGNED in tags.get(SAMPLE_FORMAT, ())
    values = np.asarray(image)
    if image.mode == "L" and signed:
        return Image.fromarray(to_levels(values.view(np.int8)))
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    if image.mode == "I" and tags and (not signed or _is_wrapped(values)):
        values = values.view(np.uint32)
    levels = to_levels(values)
    return Image.fromarray(255 - levels if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else levels)


def _is_wrapped(values: Int[np.ndarray, "H W"]) -> bool:
    """Whether signed samples are unsigned ones declared as signed, as Pillow declares them: neighbours differ less."""

    def steps(samples: np.ndarray) -> float:
        wide = samples.astype(np.float64)
        return float(sum(np.abs(np.diff(wide, axis=axis)).sum() for axis in (0, 1)))

    return bool(values.min() < 0) and steps(values.view(np.uint32)) < steps(values)


def to_levels(values: np.ndarray) -> np.ndarray:
    """Samples [H, W] of any type as uint8, by what they hold.

    Whole numbers are taken for ones of as few of `DEPTHS` bits as hold the highest, of which the upper eight are kept.
    Floats from 0 to 1 are scaled from there. Where there are negative samples, or floats above 1, the range from the
    lowest, or 0, to the highest is scaled. Raises `DataError` for samples that are not finite.
    """
    lowest, highest = values.min(), values.max()
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise DataError("it has samples that are not finite")
    if values.dtype.kind != "f" and lowest >= 0:
        depth = next(bits for bits in DEPTHS if int(highest) < 1 << bits)
        return np.asarray(values >> (depth - 8)).astype(np.uint8)
    low, high = min(float(lowest), 0.0), float(highest)
    if low == 0 and high <= 1:
        high = 1.0
    scaled: np.ndarray = ((values.astype(np.float64) - low) * (255 / (high - low))).round().astype(np.uint8)
    return scaled


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def cut_thin(image: Image.Image) -> Image.Image:
    """The middle of a picture one of whose sides is more than `LONGEST` times the other; others as they are.

    Scaled until the shorter side fits, as most towers do, such a picture would take gigabytes.
    """
    width, height = image.size
    most = LONGEST * min(width, height)
    if max(width, height) <= most:
        return image
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    return image.crop((left, top, left + min(width, most), top + min(height, most)))


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
        return np.asarray(self._pipeline(image if self.crop_mode == "squash" else cut_thin(image)))

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
