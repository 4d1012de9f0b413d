"""Pictures in a column: Parquet as Hugging Face and img2dataset write it, and Arrow folders of `save_to_disk`.

Only the other columns are read here; the pictures are read when they are encoded, one row group at a time.
"""

from __future__ import annotations

import json
from collections import Counter
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
from litune.pairs.reference import BROKEN, PictureCell, absolute, first_line, open_arrow
from litune.pairs.sample import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    IMAGE_SUFFIXES,
    LABEL_COLUMNS,
    Damage,
    Options,
    Sample,
    SampleSource,
    each,
    first_column,
    optional_column,
    pick_column,
    splits_of,
)
from litune.pairs.tars import short_names
from litune.prompts import canonicalize

ROWS = 10_000
PICTURES = [*IMAGE_COLUMNS, "image_bytes", "bytes", *(suffix[1:] for suffix in sorted(IMAGE_SUFFIXES))]


def holds_pictures(file: str) -> bool:
    """Whether a Parquet file has a column of pictures' bytes; False if it can't be read."""
    try:
        return picture_column(read_schema(file), None) is not None
    except BROKEN:
        return False


def read_schema(file: str) -> pa.Schema:
    """The columns of a Parquet file, with what its metadata says of them. Raises one of `BROKEN`."""
    with open_file(file) as opened:
        return pa.parquet.read_schema(opened)


def picture_paths(file: str, column: str) -> list[str]:
    """For each row the path beside its picture's bytes in a column of structs; empty where there is none."""
    with open_file(file) as opened, pa.parquet.ParquetFile(opened) as parquet:
        kind = parquet.schema_arrow.field(column).type
        if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
            return [""] * int(parquet.metadata.num_rows)
        cells = parquet.read(columns=[f"{column}.path"])[column].to_pylist()
    return [str(cell["path"] or "") if cell else "" for cell in cells]


def picture_column(schema: pa.Schema, wanted: str | None) -> str | None:
    """The column with pictures' bytes: binary, or Hugging Face's struct of bytes and path."""
    candidates = [field.name for field in schema if _binary(field.type) or _is_struct(field.type)]
    if wanted is not None:
        return wanted if wanted in candidates else None
    candidates = [name for name in candidates if name.lower() not in CAPTION_COLUMNS]
    usual = [name for usual in PICTURES for name in candidates if name.lower() == usual]
    structs = [name for name in candidates if _is_struct(schema.field(name).type)]
    return next(iter([*usual, *structs, *(candidates if len(candidates) == 1 else [])]), None)


def _binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_struct(kind: pa.DataType) -> bool:
    names = {kind.field(i).name for i in range(kind.num_fields)} if pa.types.is_struct(kind) else set()
    return "bytes" in names and _binary(kind.field("bytes").type)


def parquet_source(files: Sequence[str], options: Options) -> SampleSource:
    """The rows of Parquet files that hold pictures."""
    hub = [_hub_split(file) for file in files]
    return _source(files, options, "Parquet file", hub if all(hub) else splits_of(files))


def arrow_source(folder: Path, options: Options) -> SampleSource:
    """The rows of a folder that Hugging Face's `save_to_disk` wrote, or of one with such a folder per split."""
    parts = {"": folder}
    if (folder / "dataset_dict.json").is_file():
        names = read_json(folder / "dataset_dict.json", DataError).get("splits")
        folders = [part.name for part in sorted(folder.iterdir()) if (part / "state.json").is_file()]
        parts = {name: folder / name for name in (names if isinstance(names, list) else folders) if _is_file_name(name)}
    files = [(str(file), split) for split, part in parts.items() for file in _arrow_files(part)]
    if not files:
        raise DataError(f"{folder} has no .arrow files: save the dataset to disk again")
    return arrow_files([file for file, _ in files], options, [split for _, split in files])


def arrow_files(files: Sequence[str], options: Options, splits: Sequence[str] = ()) -> SampleSource:
    """The rows of Arrow files on this machine."""
    return _source(files, options, "Arrow file", splits or splits_of(files))


def _arrow_files(folder: Path) -> list[Path]:
    """The files listed in a dataset's state.json, whether they exist or not."""
    if not (folder / "state.json").is_file():
        return [folder / "state.json"]  # reported as missing when it is read
    listed = read_json(folder / "state.json", DataError).get("_data_files")
    names = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    return [folder / str(name) for name in names if _is_file_name(name)] or sorted(folder.glob("*.arrow"))


def _is_file_name(name: Any) -> bool:
    """Whether this is a plain file name: no path that could lead out of its folder."""
    return isinstance(name, str) and PurePosixPath(name).name == name


def _hub_split(file: str) -> str:
    """The split at the start of a file's name on the Hugging Face hub (train_all-00000-of-00002.parquet), or ""."""
    name, of, _ = PurePosixPath(file).name.rpartition("-of-")
    return name.rpartition("-")[0] if of else ""


def _source(files: Sequence[str], options: Options, kind: str, splits: Sequence[str]) -> SampleSource:
    folder = folder_of(files[0])
    splits = splits if all(splits) else [""] * len(files)
    absent: list[int] = []
    notes = Counter[str]()

    def read() -> Iterator[Sample | Damage]:
        for file, name, split in zip(each(files, "files"), short_names(files), splits, strict=True):
            empty, before = True, len(absent)
            for sample in _read_file(absolute(file), name, split, options, absent):
                empty = False
                yield sample
            notes[f"file without rows ({name})"] = int(empty and len(absent) == before)

    def about(_: int) -> str:
        without = f", {sum(absent):,} rows without a picture left out" if sum(absent) else ""
        return f"{len(files):,} {kind}{'s' * (len(files) > 1)} with pictures in {folder}{without}"

    takes = ("image", "caption", "split", "lang")
    return SampleSource(about, read(), name=folder, files=len(files), notes=notes, takes=takes)


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
            columns = _Columns(file, table.schema, options)
            rest = table.select(columns.read)
            for start in range(0, len(table), ROWS):
                missing = _without_picture(table[columns.picture].slice(start, ROWS))
                yield from columns.samples(rest.slice(start, ROWS), missing, (0, start, start), name, split, absent)
            return
        with open_file(file) as opened, pa.parquet.ParquetFile(opened) as parquet:
            columns = _Columns(file, parquet.schema_arrow, options)
            before = 0
            for group in range(parquet.num_row_groups):
                rest = parquet.read_row_group(group, columns=columns.read)
                rest.validate(full=True)
                missing = _without_picture_in(parquet, group, columns.picture)
                missing &= not options.without_picture
                for start in range(0, len(missing), ROWS):
                    position = (group, start, before + start)
                    missing_part = missing[start : start + ROWS]
                    yield from columns.samples(rest.slice(start, ROWS), missing_part, position, name, split, absent)
                before += len(missing)
    except FileNotFoundError:
        yield Damage(file, "the file does not exist", whole_file=True)
    except BROKEN as why:
        yield Damage(file, f"the file can't be read: {first_line(why)}", whole_file=True)


def _without_picture(pictures: pa.ChunkedArray) -> np.ndarray:
    """Which of N cells have neither bytes nor a path: bool [N]."""
    absent = pc.is_null(pictures)
    if pa.types.is_struct(pictures.type):
        names = [pictures.type.field(i).name for i in range(pictures.type.num_fields)]
        parts = [pc.is_null(pc.struct_field(pictures, name)) for name in ("bytes", "path") if name in names]
        absent = pc.or_(absent, parts[0] if len(parts) == 1 else pc.and_(*parts))
    return np.asarray(absent.to_numpy())


def _without_picture_in(parquet: pa.parquet.ParquetFile, group: int, picture: str) -> np.ndarray:
    """`_without_picture` of a row group; the pictures are not read if the file's statistics say that none is null."""
    row_group = parquet.metadata.row_group(group)
    for i in range(row_group.num_columns):
        leaf = row_group.column(i)
        if leaf.path_in_schema in (picture, f"{picture}.bytes"):
            statistics = leaf.statistics
            if statistics is not None and statistics.has_null_count and statistics.null_count == 0:
                return np.zeros(row_group.num_rows, bool)
    return _without_picture(parquet.read_row_group(group, columns=[picture])[picture])


class _Columns:
    """The columns of a file by their role: pictures, captions, split, language, label, key."""

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
        ] or list(filter(None, [first_column(names, CAPTION_COLUMNS)]))
        self.split = optional_column(file, names, options.split_column, "split")
        self.lang = optional_column(file, names, options.lang_column, "lang")
        self.kept = [name for name in options.kept if name in names]
        self.classes = class_names(schema)
        usual = (*LABEL_COLUMNS, *self.classes) if options.label_column is None else (options.label_column,)
        self.label = first_column(names, usual)
        self.key = first_column(names, ("key", "__key__"))
        wanted_names = [*self.captions, self.split, self.lang, self.label, self.key, *self.kept]
        self.read = [name for name in dict.fromkeys(wanted_names) if name is not None]

    def samples(
        self,
        rest: pa.Table,
        missing: np.ndarray,
        position: tuple[int, int, int],
        name: str,
        split: str,
        absent: list[int],
    ) -> Iterator[Sample]:
        """Samples of the rows with a picture; the number of rows without one is appended to `absent`.

        `position` is the row group, the part's first row in it, and that row's number in the file.
        """
        group, start, number = position
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
                str(PictureCell(self.file, group, start + i, self.picture)),
                texts,
                cells[self.lang][i] or "" if self.lang else "",
                cells[self.split][i] or "" if self.split else split,
                label,
                {column: cells[column][i] for column in self.kept},
            )

    def _label(self, value: Any) -> str | None:
        """The name of a class, looked up by its number if the file has class names."""
        names = self.classes.get(str(self.label), [])
        if isinstance(value, int) and names:
            return str(names[value]) if 0 <= value < len(names) else None
        return None if value is None or isinstance(value, (list, dict)) else str(value)


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The class names in Hugging Face's metadata, in the order of their numbers, by column."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata.get("info", {}).get("features", {})
        classes = {
            name: feature.get("names") for name, feature in features.items() if feature.get("_type") == "ClassLabel"
        }
    except (ValueError, AttributeError, RecursionError):
        return {}
    return {name: names for name, names in classes.items() if isinstance(names, list)}
