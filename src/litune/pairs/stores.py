"""Reads the pairs in the metadata of a feature store or of clip-retrieval's output, to embed them again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from litune.errors import DataError
from litune.pairs.address import is_file
from litune.pairs.reference import BROKEN, file_of, first_line
from litune.pairs.sample import Damage, Options, Sample, SampleSource

ROWS = 10_000
LOOKED_UP = 20
"""How many images of a file are looked for where the pictures were moved."""


def is_store(address: Path | str) -> bool:
    """Whether an address is a folder of features, as clip-retrieval and litune write it."""
    return (Path(address) / "store.json").is_file() or (Path(address) / "img_emb").is_dir()


def metadata_files(folder: Path) -> list[Path]:
    """The files of a store's metadata, in order."""
    return sorted((folder / "metadata").glob("metadata_*.parquet"), key=lambda file: (len(file.name), file.name))


def store_source(folder: Path, options: Options) -> SampleSource:
    """The images and captions in a store's metadata."""
    files = metadata_files(folder)
    if not files:
        raise DataError(f"{folder} has no metadata/metadata_*.parquet: its pairs are not known")

    moved = moved_to(folder, files, options.images)

    def read() -> Iterator[Sample | Damage]:
        for file in files:
            try:
                with pa.parquet.ParquetFile(file) as parquet:
                    for batch in parquet.iter_batches(ROWS):
                        yield from _rows(file, batch.to_pylist(), options, moved)
            except BROKEN as why:
                yield Damage(str(file), f"the file can't be read: {first_line(why)}", whole_file=True)

    about = f"the pairs of the store {folder}"
    return SampleSource(lambda _: about, read(), name=str(folder), files=len(files), takes=("images",))


def moved_to(folder: Path, files: Sequence[Path], images: Path | str | None) -> Callable[[str], str]:
    """What gives the place of a store's picture in the folder `images`, where its pictures are now.

    The end of a path that is a file in `images` says what its beginning stands for. Raises `DataError` where no path
    ends so.
    """
    if images is None:
        return str
    for file in files:
        for path in pa.parquet.read_table(file, columns=["image_path"])["image_path"].to_pylist()[:LOOKED_UP]:
            parts = file_of(str(path)).split("/")
            for i in range(len(parts)):
                inside = "/".join(parts[i:])
                if inside and is_file(f"{images}/{inside}"):
                    before = "".join(f"{part}/" for part in parts[:i])
                    return lambda path: f"{images}/{path.removeprefix(before)}" if path.startswith(before) else path
    raise DataError(
        f"none of the images of the store {folder} was found in --images {images}: name the folder they are in"
    )


def _rows(
    file: Path, rows: list[dict[str, Any]], options: Options, moved: Callable[[str], str]
) -> Iterator[Sample | Damage]:
    for i, row in enumerate(rows):
        path = row.get("image_path")
        if not isinstance(path, str) or not path:
            yield Damage(f"row {i + 1} of {file.name}", "it has no image_path")
            continue
        captions = row.get("captions", row.get("caption"))
        texts: dict[str, Any] = {"caption": captions} if captions not in (None, "", []) else {}
        fields, langs = row.get("fields"), row.get("langs") or ""
        if isinstance(fields, list) and isinstance(captions, list) and len(fields) == len(captions):
            texts = {name: _values_of_field(name, fields, captions) for name in dict.fromkeys(fields)}
            langs = {name: _values_of_field(name, fields, langs) for name in texts} if langs else ""
        yield Sample(
            f"row {i + 1} of {file.name}",
            row.get("key") or path,
            moved(path),
            texts,
            langs,
            row.get("split") or "",
            row.get("label"),
            {name: row[name] for name in options.kept if name in row},
        )


def _values_of_field(name: Any, fields: list[Any], values: Any) -> list[Any]:
    """The values of one text field."""
    return [value for value, field in zip(values, fields, strict=True) if field == name]
