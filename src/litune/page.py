"""One HTML page with numbers and pictures in it, that needs nothing from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from litune.errors import DataError
from litune.files import write_text
from litune.image.pictures import open_rgb
from litune.pairs.reference import open_picture

PICTURE = 220
"""The longer side of a picture in a page, in pixels."""


def write_page(file: Path, title: str, intro: str, parts: Iterable[str], style: str | None = None) -> None:
    """A page of these parts (HTML) under a heading, in its own `style` (CSS) or that of the data commands' pages."""
    style = style or resources.files("litune").joinpath("page.css").read_text(encoding="utf-8")
    head = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body><main>",
        f"<h1>{html.escape(title)}</h1><p>{html.escape(intro)}</p>",
    ]
    write_text(file, "\n".join([*head, *parts, "</main></body></html>\n"]))


def heading(text: str, about: str = "") -> str:
    """A heading, and a line under it."""
    return f"<h2>{html.escape(text)}</h2>" + (f"<p>{html.escape(about)}</p>" if about else "")


def tiles(facts: Iterable[tuple[str, str, bool]]) -> str:
    """Large figures side by side: (figure, what it is, whether it is bad)."""
    each = (
        f'<div class="tile{" warn" if bad else ""}"><b>{html.escape(figure)}</b><span>{html.escape(what)}</span></div>'
        for figure, what, bad in facts
    )
    return '<div class="tiles">' + "".join(each) + "</div>"


def columns(parts: Iterable[str]) -> str:
    """Parts side by side where the page is wide enough."""
    return '<div class="columns">' + "".join(f"<section>{part}</section>" for part in parts) + "</div>"


def bars(counts: dict[str, int]) -> str:
    """Counts by name, each with its share and a bar."""
    total, most = max(1, sum(counts.values())), max(1, *counts.values(), 1)
    rows = (
        f'<tr><td>{html.escape(name)}</td><td class="bar"><i style="width:{100 * count / most:.1f}%"></i></td>'
        f'<td class="number">{count:,}</td><td class="number">{count / total:.1%}</td></tr>'
        for name, count in counts.items()
    )
    return "<table>" + "".join(rows) + "</table>"


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of texts under their names."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>" + "".join(body) + "</table>"


def picture(path: str, caption: str) -> str:
    """A picture, small and inlined, with its caption; a blank one where it can't be read."""
    alt = html.escape(caption, quote=True)
    return f'<figure><img src="{_inline(path)}" alt="{alt}"><figcaption>{html.escape(caption)}</figcaption></figure>'


def sheet(figures: Iterable[str]) -> str:
    """Pictures in rows."""
    return '<div class="sheet">' + "".join(figures) + "</div>"


def pair(left: str, right: str, about: str) -> str:
    """Two pictures side by side, and a line on both."""
    return f'<div class="pair"><div>{left}{right}</div><small>{html.escape(about)}</small></div>'


def pairs(each: Iterable[str]) -> str:
    """Pairs in rows."""
    return '<div class="pairs">' + "".join(each) + "</div>"


def _inline(path: str) -> str:
    try:
        with open_picture(path) as file:
            image = open_rgb(file.read())
    except (OSError, DataError):
        return "data:,"
    image.thumbnail((PICTURE, PICTURE))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
