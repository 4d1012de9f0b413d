"""Pictures in a column: Parquet as Hugging Face and img2dataset write it, and Arrow folders of `save_to_disk`.

Only the other columns are read here; pictures are read row group by row group when they are encoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from litune.errors import DataError
from litune.files import read_json
from litune.pairs.address import folder_of, is_file, open_file
from litune.pairs.reference import BROKEN, Row, absolute, first_line, open_arrow
from litune.pairs.sample import (
    CAPTION_COLUMNS,
    IMAGE_SUFFIXES,
    Damage,
    Options,
    Sample,
    Source,
    each,
    optional_column,
    pick_column,
    split_of,
)
from litune.pairs.tables import IMAGE_COLUMNS
from litune.pairs.tars import short_names
from litune.prompts import canonicalize

ROWS = 10_000
PICTURES = [*IMAGE_COLUMNS, "image_bytes", "bytes", *(suffix[1:] for suffix in sorted(IMAGE_SUFFIXES))]


def holds_pictures(file: str) -> bool:
    """Whether a Parquet file has a column of pictures' bytes; also where it is too damaged to tell."""
    try:
        with open_file(file) as opened:
            return picture_column(pa.parquet.read_schema(opened), None) is not None
    except BROKEN:
        return False


def picture_column(schema: pa.Schema, wanted: str | None) -> str | None:
    """The column with pictures' bytes: binary, or Hugging Face's struct of bytes and path."""
    found = [field.name for field in schema if _binary(field.type) or _is_struct(field.type)]
    if wanted is not None:
        return wanted if wanted in found else None
    usual = [name for usual in PICTURES for name in found if name.lower() == usual]
    structs = [name for name in found if _is_struct(schema.field(name).type)]
    return next(iter([*usual, *structs, *(found if len(found) == 1 else [])]), None)


def _binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_struct(kind: pa.DataType) -> bool:
    names = {kind.field(i).name for i in range(kind.num_fields)} if pa.types.is_struct(kind) else set()
    return "bytes" in names and _binary(kind.field("bytes").type)


def parquet_source(files: Sequence[str], options: Options) -> Source:
    """The rows of Parquet files that hold pictures."""
    return _source(files, options, "Parquet file", [_hub_split(file) for file in files])


def arrow_source(folder: Path, options: Options) -> Source:
    """The rows of a folder that Hugging Face's `save_to_disk` wrote, or of one with such a folder per split."""
    parts = {"": folder}
    if (folder / "dataset_dict.json").is_file():
        names = read_json(folder / "dataset_dict.json", DataError).get("splits")
        there = [part.name for part in sorted(folder.iterdir()) if (part / "state.json").is_file()]
        parts = {name: folder / name for name in (names if isinstance(names, list) else there) if _plain(name)}
    files = [(str(file), split) for split, part in parts.items() for file in _arrow_files(part)]
    if not files:
        raise DataError(f"{folder} has no .arrow files: save the dataset to disk again")
    return arrow_files([file for file, _ in files], options, [split for _, split in files])


def arrow_files(files: Sequence[str], options: Options, splits: Sequence[str] = ()) -> Source:
    """The rows of Arrow files on this machine."""
    return _source(files, options, "Arrow file", splits or [split_of(PurePosixPath(file).stem) for file in files])


def _arrow_files(folder: Path) -> list[Path]:
    """The files that a dataset's state names, be they there or not."""
    if not (folder / "state.json").is_file():
        return [folder / "state.json"]  # which is then named as missing
    listed = read_json(folder / "state.json", DataError).get("_data_files")
    names = [one.get("filename") for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    return [folder / str(name) for name in names if _plain(name)] or sorted(folder.glob("*.arrow"))


def _plain(name: Any) -> bool:
    """Whether this is the name of something in a folder, and of nothing elsewhere."""
    return isinstance(name, str) and PurePosixPath(name).name == name


def _hub_split(file: str) -> str:
    """The split that the name of one of the hub's files begins with: train_all-00000-of-00002.parquet."""
    name, of, _ = PurePosixPath(file).name.rpartition("-of-")
    return name.rpartition("-")[0] if of else split_of(PurePosixPath(file).stem)


def _source(files: Sequence[str], options: Options, kind: str, splits: Sequence[str]) -> Source:
    folder = folder_of(files[0])
    splits = splits if all(splits) else [""] * len(files)
    absent: list[int] = []

    def read() -> Iterator[Sample | Damage]:
        for file, name, split in zip(each(files, "files"), short_names(files), splits, strict=True):
            yield from _read_file(absolute(file), name, split, options, absent)

    def about(_: int) -> str:
        without = f", {sum(absent):,} rows without a picture left out" if sum(absent) else ""
        return f"{len(files):,} {kind}{'s' * (len(files) > 1)} with pictures in {folder}{without}"

    return Source(about, read(), name=folder, files=len(files))


def _read_file(file: str, name: str, split: str, options: Options, absent: list[int]) -> Iterator[Sample | Damage]:
    try:
        if file.endswith(".arrow"):
            if not is_file(file):
                raise FileNotFoundError
            try:
                table = open_arrow(file)
            except DataError as why:
                yield Damage(file, str(why).removeprefix(f"{file} "), whole_file=True)
                return
            found = _Columns(file, table.schema, options)
            rest = table.select(found.read)
            for start in range(0, len(table), ROWS):
                missing = _missing(table[found.picture].slice(start, ROWS))
                yield from found.samples(rest.slice(start, ROWS), missing, (0, start, start), name, split, absent)
            return
        with open_file(file) as opened, pa.parquet.ParquetFile(opened) as parquet:
            found = _Columns(file, parquet.schema_arrow, options)
            before = 0
            for group in range(parquet.num_row_groups):
                rest = parquet.read_row_group(group, columns=found.read)
                rest.validate(full=True)
                missing = _missing_in(parquet, group, found.picture)
                for start in range(0, len(missing), ROWS):
                    place = (group, start, before + start)
                    part = missing[start : start + ROWS]
                    yield from found.samples(rest.slice(start, ROWS), part, place, name, split, absent)
                before += len(missing)
    except FileNotFoundError:
        yield Damage(file, "the file does not exist", whole_file=True)
    except BROKEN as why:
        yield Damage(file, f"the file can't be read: {first_line(why)}", whole_file=True)


def _missing(pictures: pa.ChunkedArray) -> np.ndarray:
    """Which cells have neither bytes nor a path, [N]."""
    absent = pc.is_null(pictures)
    if pa.types.is_struct(pictures.type):
        names = [pictures.type.field(i).name for i in range(pictures.type.num_fields)]
        parts = [pc.is_null(pc.struct_field(pictures, name)) for name in ("bytes", "path") if name in names]
        absent = pc.or_(absent, parts[0] if len(parts) == 1 else pc.and_(*parts))
    return np.asarray(absent.to_numpy())


def _missing_in(parquet: pa.parquet.ParquetFile, group: int, picture: str) -> np.ndarray:
    """`_missing` of a row group; the file's own count of nulls spares reading the pictures."""
    about = parquet.metadata.row_group(group)
    for i in range(about.num_columns):
        leaf = about.column(i)
        if leaf.path_in_schema in (picture, f"{picture}.bytes"):
            known = leaf.statistics
            if known is not None and known.has_null_count and known.null_count == 0:
                return np.zeros(about.num_rows, bool)
    return _missing(parquet.read_row_group(group, columns=[picture])[picture])


class _Columns:
    """What each column of a file is."""

    def __init__(self, file: str, schema: pa.Schema, options: Options) -> None:
        """Raises `DataError` where a column that was asked for is not there."""
        self.file = file
        picture = picture_column(schema, options.image_column)
        if picture is None:
            wanted = f" named {options.image_column}" if options.image_column else ""
            raise DataError(f"{file} has no column of pictures{wanted}: its columns are {', '.join(schema.names)}")
        self.picture = picture
        names = [name for name in schema.names if name != picture]
        self.captions = [
            pick_column(file, names, name, [], "--caption-column captions")
            for name in dict.fromkeys(options.caption_columns)
        ] or [name for usual in CAPTION_COLUMNS for name in names if name.lower() == usual][:1]
        self.split = optional_column(file, names, options.split_column, "split")
        self.lang = optional_column(file, names, options.lang_column, "lang")
        self.kept = [name for name in options.kept if name in names]
        self.classes = _class_names(schema)
        self.label = next((name for name in ("label", "labels", *self.classes) if name in names), None)
        self.key = next((name for name in ("key", "__key__") if name in names), None)
        wanted_names = [*self.captions, self.split, self.lang, self.label, self.key, *self.kept]
        self.read = [name for name in dict.fromkeys(wanted_names) if name is not None]

    def samples(
        self,
        rest: pa.Table,
        missing: np.ndarray,
        place: tuple[int, int, int],
        name: str,
        split: str,
        absent: list[int],
    ) -> Iterator[Sample]:
        """Rows that have a picture, those without counted in `absent`.

        `place` is the row group, the part's first row in it, and that row's number in the file.
        """
        group, start, number = place
        cells = {column: rest[column].to_pylist() for column in self.read}
        absent.append(int(missing.sum()))
        for i in np.flatnonzero(~missing).tolist():
            label = self._label(cells[self.label][i]) if self.label else None
            texts = {column: cells[column][i] for column in self.captions}
            if not texts and label:
                texts = {"label": canonicalize(label)}
            where = f"row {number + i + 1} of {name}"
            yield Sample(
                where,
                f"{name}/{cells[self.key][i] if self.key else number + i}",
                str(Row(self.file, group, start + i, self.picture)),
                texts,
                cells[self.lang][i] or "" if self.lang else "",
                cells[self.split][i] or "" if self.split else split,
                label,
                {column: cells[column][i] for column in self.kept},
            )

    def _label(self, value: Any) -> str | None:
        """A class's name, out of its number where the file has the names."""
        names = self.classes.get(str(self.label), [])
        if isinstance(value, int) and names:
            return str(names[value]) if 0 <= value < len(names) else None
        return None if value is None or isinstance(value, (list, dict)) else str(value)


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of the classes that Hugging Face's metadata gives, by column."""
    try:
        facts = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = facts.get("info", {}).get("features", {})
        found = {name: about.get("names") for name, about in features.items() if about.get("_type") == "ClassLabel"}
    except (ValueError, AttributeError, RecursionError):
        return {}
    return {name: names for name, names in found.items() if isinstance(names, list)}
