"""Small pictures and samples, packed as people pack them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
from tests.conftest import COLORS, SHAPES, draw

NAMES = [f"{color}-{shape}" for color in COLORS for shape in SHAPES]


def picture(name: str, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of the picture of this name, such as red-bar."""
    buffer = io.BytesIO()
    draw(*name.split("-")).save(buffer, kind, **options)
    return buffer.getvalue()


def sample(key: str, name: str, **facts: Any) -> list[tuple[str, bytes]]:
    """What img2dataset writes for one picture."""
    about = {"caption": f"a {name}", "url": f"http://example/{name}", "key": key, "width": 1, "height": 2} | facts
    return [
        (f"{key}.png", picture(name)),
        (f"{key}.json", json.dumps(about).encode()),
        (f"{key}.txt", f"a {name}".encode()),
    ]


def write_tar(file: Path, members: Iterable[tuple[str, bytes] | tarfile.TarInfo], **settings: Any) -> Path:
    """A tar of these files, and of whatever a TarInfo without data says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **settings) as tar:
        for one in members:
            if isinstance(one, tarfile.TarInfo):
                tar.addfile(one)
            else:
                info = tarfile.TarInfo(one[0])
                info.size = len(one[1])
                tar.addfile(info, io.BytesIO(one[1]))
    return file


def write_shards(folder: Path, shards: int = 3) -> Path:
    """All pictures in tar shards, with what img2dataset writes beside them."""
    each = len(NAMES) // shards
    for i in range(shards):
        part = NAMES[i * each : (i + 1) * each]
        write_tar(folder / f"{i:05}.tar", [m for j, name in enumerate(part) for m in sample(f"{i:05}{j:04}", name)])
        (folder / f"{i:05}_stats.json").write_text("{}")
        pa.parquet.write_table(pa.table({"url": part, "caption": part}), folder / f"{i:05}.parquet")
    return folder


def hub_table(names: Iterable[str]) -> pa.Table:
    """A table as Hugging Face's datasets have it: pictures as structs of bytes and path."""
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = [{"bytes": picture(name), "path": f"{name}.png"} for name in names]
    return pa.table({"image": pa.array(pictures, struct), "caption": [[f"a {n}", f"one {n}"] for n in names]})
