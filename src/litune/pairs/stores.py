"""Reads the pairs in the metadata of a feature store or of clip-retrieval's output, to embed them again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from litune.errors import DataError
from litune.pairs.reference import BROKEN, first_line
from litune.pairs.sample import Damage, Options, Sample, SampleSource

ROWS = 10_000


def is_store(address: Path | str) -> bool:
    """Whether an address is a folder of features, as clip-retrieval and litune write it."""
    return (Path(address) / "store.json").is_file() or (Path(address) / "img_emb").is_dir()


def store_source(folder: Path, options: Options) -> SampleSource:
    """The images and captions in a store's metadata."""
    files = sorted((folder / "metadata").glob("metadata_*.parquet"), key=lambda file: (len(file.name), file.name))
    if not files:
        raise DataError(f"{folder} has no metadata/metadata_*.parquet: its pairs are not known")

    def read() -> Iterator[Sample | Damage]:
        for file in files:
            try:
                with pa.parquet.ParquetFile(file) as parquet:
                    for batch in parquet.iter_batches(ROWS):
                        yield from _rows(file, batch.to_pylist(), options)
            except BROKEN as why:
                yield Damage(str(file), f"the file can't be read: {first_line(why)}", whole_file=True)

    return SampleSource(lambda _: f"the pairs of the store {folder}", read(), name=str(folder), files=len(files))


def _rows(file: Path, rows: list[dict[str, Any]], options: Options) -> Iterator[Sample | Damage]:
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
            path,
            texts,
            langs,
            row.get("split") or "",
            row.get("label"),
            {name: row[name] for name in options.kept if name in row},
        )


def _values_of_field(name: Any, fields: list[Any], values: Any) -> list[Any]:
    """The values of one text field."""
    return [value for value, field in zip(values, fields, strict=True) if field == name]
