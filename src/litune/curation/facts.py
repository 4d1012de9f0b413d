"""Facts about many images, gathered in threads and saved part by part: an interruption loses one part."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from PIL import ImageFile

from litune.errors import DataError
from litune.files import atomic, read_json, sweep_temporaries, write_json
from litune.image.pictures import map_ahead, read_picture
from litune.pairs.pairs import Damage
from litune.pairs.reference import first_line, open_picture
from litune.progress import say, track

PART = 2000
_ABOUT = "about.json"

Facts = dict[str, Any]
"""What is known of one image; `damage` holds the reason where it can't be used, and is empty otherwise."""


def read_facts(path: str, *, content: bool = False, look: Callable[[bytes], object] | None = None) -> Facts:
    """An image's width and height (upright), format, and length in bytes, from its header.

    With `content`, its SHA-256 as well, and `look` is called with its bytes; an error that it raises is damage.
    """
    facts: Facts = {"width": 0, "height": 0, "format": "", "bytes": 0, "sha256": "", "damage": ""}
    try:
        with open_picture(path) as file:
            data = file.read() if content else b""
            facts["bytes"] = file.seek(0, 2)
            file.seek(0)
            if content:
                facts["sha256"] = hashlib.sha256(data).hexdigest()
            facts |= read_picture(file, _header)
            if look is not None:
                look(data)
    except FileNotFoundError:
        facts["damage"] = "the file does not exist"
    except (DataError, OSError) as why:
        facts["damage"] = first_line(why)
    return facts


def _header(image: ImageFile.ImageFile) -> Facts:
    """Width, height and format, as the header says."""
    width, height = image.size
    # For getexif, Pillow would decode a whole PNG.
    if image.format != "PNG" and image.getexif().get(0x0112, 1) >= 5:
        width, height = height, width
    return {"width": width, "height": height, "format": image.format or ""}


def gather(
    work: Callable[[int], Facts],
    rows: Sequence[int],
    folder: Path,
    about: dict[str, Any],
    *,
    what: str,
    workers: int,
    keys: Callable[[int], str],
    max_damaged: float,
) -> Iterator[pa.Table]:
    """`work` on each of `rows` in threads; yields its facts as tables of `PART` rows, in order.

    Parts are saved in `folder`, so that the same call resumes where it stopped; parts with another `about` are
    discarded. Raises `DataError` when more than the share `max_damaged` can't be used.
    """
    if not (folder / _ABOUT).exists() or read_json(folder / _ABOUT, DataError) != about:
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / _ABOUT, about)
    sweep_temporaries(folder)
    damaged = 0
    with track(what, "images", len(rows), _done(folder, len(rows))) as task:
        for start in range(0, len(rows), PART):
            part = rows[start : start + PART]
            file = folder / f"{start // PART:06}.parquet"
            if file.exists():
                table = pa.parquet.read_table(file)
            else:
                rows_done = []
                for row_facts in map_ahead(work, part, workers, ahead=4 * workers):
                    rows_done.append(row_facts)
                    task.advance(1)
                table = pa.Table.from_pylist(rows_done)
                with atomic(file) as temporary:
                    pa.parquet.write_table(table, temporary)
            damages = [
                Damage(keys(row), reason)
                for row, reason in zip(part, table["damage"].to_pylist(), strict=True)
                if reason
            ]
            damaged += len(damages)
            task.note = f"{damaged} damaged" if damaged else ""
            if damaged > max_damaged * len(rows):
                raise DataError(
                    f"{damaged:,} of {len(rows):,} images can't be used (at most {max_damaged:.1%} may), as "
                    f"{damages[0].key}: {damages[0].reason}; mend them or raise --max-damaged"
                )
            for damage in damages[:5]:
                say(f"skipped {damage.key}: {damage.reason}")
            yield table


def _done(folder: Path, rows: int) -> int:
    """The number of images that an earlier call has done."""
    starts = (start for start in range(0, rows, PART) if (folder / f"{start // PART:06}.parquet").exists())
    return sum(min(PART, rows - start) for start in starts)
