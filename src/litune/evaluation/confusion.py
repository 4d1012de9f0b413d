"""Confusions of a classifier: counts, a picture of them, and a row for every class."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from litune.files import atomic

FEW = 40
"""Up to this many classes, every cell has its own label."""
SIDE = 1000
LINES = 32
PAPER, INK, FAINT, RIGHT = "#ffffff", "#1c2126", "#6b7480", (22, 101, 87)
WRONG = (192, 57, 43)


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How many images of each class (rows) were taken for each class (columns): counts [C, C]."""
    cell = labels.astype(np.int64) * classes + predicted
    return np.bincount(cell, minlength=classes * classes).reshape(classes, classes)


def commonest(counts: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """The most frequent confusions: own class, predicted class, images."""
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    own, taken = np.unravel_index(order, wrong.shape)
    return [(int(o), int(t), int(wrong[o, t])) for o, t in zip(own, taken, strict=True) if wrong[o, t]]


def class_rows(counts: np.ndarray, names: list[str]) -> list[dict[str, str | int | float]]:
    """One row per class: images, accuracy, precision, and the class it is most often taken for."""
    images, predictions = counts.sum(1), counts.sum(0)
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    rows: list[dict[str, str | int | float]] = []
    for c, name in enumerate(names):
        other = int(wrong[c].argmax())
        rows.append(
            {
                "class": name,
                "images": int(images[c]),
                "accuracy": round(float(counts[c, c] / images[c]), 4) if images[c] else "",
                "precision": round(float(counts[c, c] / predictions[c]), 4) if predictions[c] else "",
                "taken_for": names[other] if wrong[c, other] else "",
                "taken_for_share": round(float(wrong[c, other] / images[c]), 4) if wrong[c, other] else "",
            }
        )
    return rows


def class_csv(rows: list[dict[str, str | int | float]]) -> str:
    """The rows as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def class_markdown(rows: list[dict[str, str | int | float]]) -> str:
    """The rows as a Markdown table, in percent."""
    lines = ["| class | images | found | of its predictions right | most often taken for |", "|:--|--:|--:|--:|:--|"]
    for row in rows:
        taken = f"{row['taken_for']} ({_percent(row['taken_for_share'])})" if row["taken_for"] else ""
        cells = [row["class"], row["images"], _percent(row["accuracy"]), _percent(row["precision"]), taken]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _percent(share: str | int | float) -> str:
    return f"{share:.1%}" if isinstance(share, int | float) else ""


def write_confusion(file: Path, counts: np.ndarray, names: list[str]) -> None:
    """Write a PNG: rows are the images' own classes, columns the predicted ones, each row in shares of its images.

    Up to `FEW` classes, names and shares are written out; with more, each has a pixel or more, and the most frequent
    confusions are listed beside them.
    """
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    picture = _labelled(shares, names) if len(names) <= FEW else _field(shares, counts, names)
    with atomic(file) as temporary:
        picture.save(temporary, format="PNG", optimize=True)


def _colors(shares: np.ndarray) -> np.ndarray:
    """White to green on the diagonal, white to red off it: [C, C, 3] bytes. Small shares stay visible."""
    strength = np.sqrt(shares)[..., None]
    hue = np.where(np.eye(len(shares), dtype=bool)[..., None], RIGHT, WRONG)
    colors: np.ndarray = (255 - strength * (255 - hue)).astype(np.uint8)
    return colors


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _shortened(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _labelled(shares: np.ndarray, names: list[str]) -> Image.Image:
    cell = max(30, min(64, 900 // len(names)))
    size = 17 if cell > 45 else 12
    font, labels = _font(size), [_shortened(name, 24) for name in names]
    wide = int(max(font.getlength(label) for label in labels)) + 16
    top, side = wide + 30, cell * len(names)
    picture = Image.new("RGB", (wide + side + 24, top + side + 24), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((8, 8), "rows: own class, columns: taken for", fill=FAINT, font=_font(13))
    colors = _colors(shares)
    for i, label in enumerate(labels):
        middle = top + i * cell + cell // 2
        draw.text((wide - 8, middle), label, fill=INK, font=font, anchor="rm")
        _upwards(picture, label, font, wide + i * cell + cell // 2, top - 8)
        for j in range(len(names)):
            left, upper = wide + j * cell, top + i * cell
            draw.rectangle((left, upper, left + cell - 2, upper + cell - 2), fill=tuple(colors[i, j].tolist()))
            if shares[i, j] >= 0.005:
                ink = PAPER if shares[i, j] > 0.35 else INK
                text = f"{100 * shares[i, j]:.0f}"
                draw.text((left + cell // 2 - 1, middle - 1), text, fill=ink, font=_font(size - 1), anchor="mm")
    return picture


def _upwards(
    picture: Image.Image, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, x: int, y: int
) -> None:
    """Write a text from (x, y) upwards, centred on x."""
    width, height = int(font.getlength(text)) + 4, 24
    line = Image.new("RGB", (width, height), PAPER)
    ImageDraw.Draw(line).text((2, height // 2), text, fill=INK, font=font, anchor="lm")
    turned = line.rotate(90, expand=True)
    picture.paste(turned, (x - turned.width // 2, y - turned.height))


def _field(shares: np.ndarray, counts: np.ndarray, names: list[str]) -> Image.Image:
    pixels = max(1, SIDE // len(names))
    colors = _colors(shares)
    if len(names) > SIDE:  # several classes share a pixel: the strongest of them is seen
        edges = np.linspace(0, len(names), SIDE, endpoint=False).astype(int)
        colors = np.minimum.reduceat(np.minimum.reduceat(colors, edges, axis=0), edges, axis=1)
    side = len(colors) * pixels
    left, top, words = 170, 60, 520
    picture = Image.new("RGB", (left + side + 30 + words, top + max(side, 40 + 28 * LINES) + 30), PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((8, 10), f"{len(names):,} classes; rows: own class, columns: taken for", fill=FAINT, font=_font(18))
    field = Image.fromarray(colors).resize((side, side), Image.Resampling.NEAREST)
    if pixels == 1:
        field = field.filter(ImageFilter.MinFilter(3))  # a single pixel would hardly be seen
    picture.paste(field, (left, top))
    draw.rectangle((left - 1, top - 1, left + side, top + side), outline=FAINT)
    for i in range(0, len(names), max(1, len(names) // 25)):
        y = top + i * side // len(names)
        draw.line((left - 6, y, left - 1, y), fill=FAINT)
        draw.text((left - 10, y), _shortened(names[i], 22), fill=INK, font=_font(14), anchor="rm")
    x = left + side + 30
    draw.text((x, top), "Commonest confusions, images", fill=INK, font=_font(22))
    for line, (own, taken, images) in enumerate(commonest(counts, LINES)):
        text = f"{_shortened(names[own], 25)} as {_shortened(names[taken], 25)}"
        draw.text((x, top + 40 + 28 * line), f"{images:,}", fill=FAINT, font=_font(16))
        draw.text((x + 52, top + 40 + 28 * line), text, fill=INK, font=_font(16))
    return picture
