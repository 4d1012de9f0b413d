"""Uploaded pictures, which are not trusted, and thumbnails of the store's."""

from __future__ import annotations

import io
import stat
import warnings
from pathlib import Path

from PIL import Image, ImageOps

from litune.errors import DataError
from litune.image.pictures import LONGEST, cut_thin, open_rgb
from litune.pairs.address import is_url
from litune.pairs.reference import parse, read_bytes

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_FILE_BYTES = 512 << 20
QUALITY = 85


def open_upload(data: bytes, max_pixels: int) -> Image.Image:
    """An uploaded picture as upright RGB. Its size is read before anything is decoded.

    Raises `DataError` for data that is no picture of `FORMATS`, damaged, larger than `max_pixels`, or too thin.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        raise DataError(f"it has more than {max_pixels:,} pixels") from None
    except Exception:  # Pillow's readers raise whatever they meet
        raise DataError(f"it is no picture that can be read ({', '.join(FORMATS)})") from None
    if width * height > max_pixels:
        raise DataError(f"it has {width}×{height} pixels, more than {max_pixels:,}")
    if max(width, height) > LONGEST * min(width, height):
        raise DataError(f"it has {width}×{height} pixels: one side is more than {LONGEST} times the other")
    return open_rgb(data)


def thumbnail(reference: str, size: int) -> bytes:
    """The picture that a reference points to, as a JPEG whose longer side has at most `size` pixels.

    Raises `DataError` where the file is gone, no plain file, too large or no picture.
    """
    data = _read(reference)
    picture = ImageOps.contain(cut_thin(open_rgb(data)), (size, size))
    out = io.BytesIO()
    picture.save(out, format="JPEG", quality=QUALITY)
    return out.getvalue()


def _read(reference: str) -> bytes:
    # The reasons name no folder: clients must not learn about the server's disk.
    if is_url(reference) or not isinstance(parse(reference), str):
        try:
            return read_bytes(reference)
        except (OSError, DataError):
            raise DataError("its archive can't be read") from None
    try:
        status = Path(reference).stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError("it is no plain file")
        if status.st_size > MAX_FILE_BYTES:
            raise DataError(f"its file has more than {MAX_FILE_BYTES >> 20} MB")
        return Path(reference).read_bytes()
    except FileNotFoundError:
        raise DataError("its file is gone") from None
    except (OSError, ValueError) as why:
        raise DataError(f"its file can't be read ({getattr(why, 'strerror', None) or why})") from None
