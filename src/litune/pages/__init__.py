"""HTML pages that need nothing from elsewhere: this folder's templates over one base, with styles and pictures inside.

jinja2 escapes whatever a template prints, so that names of people's files and captions stay text.
"""

from __future__ import annotations

import base64
import functools
import io
from pathlib import Path
from typing import Any

import jinja2
from PIL import ImageOps

from litune.errors import DataError
from litune.files import write_text
from litune.image.pictures import open_rgb
from litune.pairs.reference import open_picture


def write_page(file: Path, template: str, **values: Any) -> None:
    """Write the page that a template of this folder makes of `values`.

    Templates may use `count|thousands`, and `path|thumbnail(pixels)` for a picture's address: each is read once.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("litune", "pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"thousands": "{:,}".format, "thumbnail": functools.cache(thumbnail)}
    write_text(file, environment.get_template(template).render(values))


def thumbnail(path: str, pixels: int, quality: int = 80, square: bool = False) -> str:
    """A small JPEG of a picture as a `data:` address; empty where the picture can't be read.

    Its longer side has at most `pixels`; with `square` it is cut to a square of that size.
    """
    if not path:
        return ""
    try:
        with open_picture(path) as file:
            image = open_rgb(file.read())
    except (OSError, DataError):
        return ""
    if square:
        image = ImageOps.fit(image, (pixels, pixels))
    else:
        image.thumbnail((pixels, pixels))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality, optimize=square)
    return data_address(data.getvalue(), "image/jpeg")


def data_address(data: bytes, kind: str) -> str:
    """Bytes of a media type as an address that a page can hold."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
