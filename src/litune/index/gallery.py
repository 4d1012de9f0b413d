"""Pictures of results: a contact sheet as PNG, a page as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from litune import pages
from litune.errors import DataError
from litune.files import atomic
from litune.image.pictures import open_rgb
from litune.index.index import Found
from litune.pairs.reference import read_bytes

TILE, GAP, LABEL = 150, 10, 34


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _tile(path: str) -> Image.Image:
    """A picture fitted into a square tile; a crossed-out one where the file is gone."""
    try:
        picture = open_rgb(read_bytes(path))
        return ImageOps.pad(picture, (TILE, TILE), color="white")
    except (OSError, DataError):
        tile = Image.new("RGB", (TILE, TILE), "#eeeeee")
        ImageDraw.Draw(tile).line([(0, 0), (TILE, TILE)], fill="#999999", width=3)
        return tile


def write_sheet(file: Path, rows: Sequence[tuple[str, Sequence[Found]]], marked: Sequence[set[str]] = ()) -> None:
    """A PNG with one line per query: its text, then the pictures found with their scores.

    Keys in `marked[i]` (the right answers to query i) get a green frame.
    """
    across = max(1, max(len(found) for _, found in rows))
    width = GAP + across * (TILE + GAP)
    line = LABEL + TILE + 24
    sheet = Image.new("RGB", (max(width, 420), GAP + len(rows) * line), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (query, found) in enumerate(rows):
        top = GAP + i * line
        draw.text((GAP, top + 4), f"“{query}”", fill="#111111", font=_font(18))
        for j, one in enumerate(found):
            left = GAP + j * (TILE + GAP)
            right = bool(marked) and one.key in marked[i]
            sheet.paste(_tile(one.path), (left, top + LABEL))
            draw.rectangle(
                (left, top + LABEL, left + TILE - 1, top + LABEL + TILE - 1),
                outline="#1a8f3c" if right else "#cccccc",
                width=4 if right else 1,
            )
            draw.text((left, top + LABEL + TILE + 2), f"{one.score:.3f}", fill="#666666", font=_font(12))
    with atomic(file) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def write_page(
    file: Path,
    title: str,
    intro: str,
    rows: Sequence[tuple[str, Sequence[Found]]],
    marked: Sequence[set[str]],
    credit: str,
) -> None:
    """One HTML page with the same, its pictures linked relative to the page's folder; needs nothing from elsewhere."""
    lines = [
        (query, [_image(match, match.key in right, file.parent) for match in matches])
        for (query, matches), right in zip(rows, marked, strict=True)
    ]
    pages.write_page(file, "gallery.html", title=title, intro=intro, rows=lines, credit=credit)


def _image(match: Found, right: bool, folder: Path) -> dict[str, Any]:
    """What the page shows of a picture."""
    return {
        "key": match.key,
        "score": f"{match.score:.3f}",
        "right": right,
        "address": _relative(match.path, folder),
    }


def _relative(path: str, folder: Path) -> str:
    try:
        return Path(path).resolve().relative_to(folder.resolve()).as_posix()
    except ValueError:
        return Path(path).resolve().as_uri()
