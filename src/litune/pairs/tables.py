"""Tables of image paths and captions: CSV, TSV, JSON Lines, Parquet, and Flickr's lists."""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet

from litune.errors import DataError
from litune.pairs.address import folder_of, folders_in, is_file, is_url, open_file
from litune.pairs.reference import BROKEN, file_of, first_line
from litune.pairs.sample import (
    CAPTION_COLUMNS,
    LABEL_COLUMNS,
    MOST_TEXT,
    Damage,
    Options,
    Sample,
    SampleSource,
    is_picture,
    optional_column,
    pick_column,
)
from litune.prompts import canonicalize

TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".token"})
IMAGE_COLUMNS = [
    "image",
    "image_path",
    "file_name",
    "filename",
    "filepath",
    "file",
    "path",
    "img",
    "image_file",
    "image_name",
]
DELIMITERS: dict[str, Literal[0, 3]] = {
    ",": csv.QUOTE_MINIMAL,
    "\t": csv.QUOTE_NONE,
    "|": csv.QUOTE_NONE,
    ";": csv.QUOTE_MINIMAL,
}
"""Quoting by delimiter: captions between tabs or bars are not quoted, so a lone quote in them is text."""
ROWS = 10_000
ASKED_ELSEWHERE = 5
"""How many images are looked up to find their folder where each lookup is a request."""

Line = tuple[str, dict[str, Any]] | Damage
"""A row's position (for messages) and its cells by column; or why it can't be read."""

csv.field_size_limit(MOST_TEXT)


def table_source(files: Sequence[str], options: Options) -> SampleSource:
    """The pairs in one table, or in several of the same kind."""
    first = PurePosixPath(files[0])
    lines = (line for file in files for line in read_lines(file))
    name = files[0] if len(files) == 1 else f"{folder_of(files[0])} ({len(files)} tables)"

    def about(_: int) -> str:
        return f"the table {first.name}" if len(files) == 1 else f"{len(files):,} tables in {folder_of(files[0])}"

    return SampleSource(
        about,
        _samples(files[0], lines, options),
        name=name,
        base=lambda paths: image_base(files[0], options.images, paths),
    )


def _samples(file: str, lines: Iterator[Line], options: Options) -> Iterator[Sample | Damage]:
    names: list[str] | None = None
    empty = True
    for line in lines:
        empty = False
        if isinstance(line, Damage):
            yield line
            continue
        where, cells = line
        if names is None or not cells.keys() <= set(names):
            # Each row of a JSON Lines file may bring new columns.
            names = [*dict.fromkeys([*(names or []), *cells])]
            image, captions, split, lang = _columns(file, names, cells, options)
            label = _label_column(names, options)
        path = cells.get(image)
        if not isinstance(path, str) or not path.strip():
            yield Damage(where, f"the image path is {path!r}, expected a path")
            continue
        key = cells.get("key")
        class_name = cells.get(label) if label else None
        texts = {name: _listed(cells.get(name)) for name in captions}
        if not texts and class_name not in (None, ""):
            texts = {"label": canonicalize(str(class_name))}
        yield Sample(
            f"{where} ({path})",
            key if isinstance(key, str) and key else path,
            path,
            texts,
            _languages(cells, lang, captions),
            cells.get(split) or "" if split else "",
            None if isinstance(class_name, (list, dict)) else class_name,
            extra={name: cells[name] for name in options.kept if name in cells and name not in captions},
        )
    if empty:
        raise DataError(f"{file} has no rows: expected one per caption, with columns such as image and caption")


def _listed(cell: Any) -> Any:
    """A cell as it is, or the list if it is a JSON list of strings, or an empty one."""
    if cell == "[]":
        return []
    if isinstance(cell, str) and cell.startswith('["') and cell.endswith('"]'):
        with suppress(ValueError, RecursionError):
            texts = json.loads(cell)
            return texts if all(isinstance(text, str) for text in texts) else cell
    return cell


def _languages(cells: dict[str, Any], lang: str | None, captions: Sequence[str]) -> Any:
    """A row's languages, by text field where the fields have columns of their own: lang_title beside title."""
    own = {name: cells[f"lang_{name}"] for name in captions if f"lang_{name}" in cells}
    return {name: languages or "" for name, languages in own.items()} or (cells.get(lang) or "" if lang else "")


def _label_column(names: Sequence[str], options: Options) -> str | None:
    """The column of classes; None where there is none."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[usual] for usual in (options.label_column, *LABEL_COLUMNS) if usual in lower), None)


def _columns(
    file: str, names: list[str], cells: dict[str, Any], options: Options
) -> tuple[str, list[str], str | None, str | None]:
    """The columns of image paths, captions, splits and languages; no captions where nothing in a row can be one."""
    if options.image_column is None and "url" in names and not {name.lower() for name in names} & set(IMAGE_COLUMNS):
        raise DataError(f"{file} is a list of URLs: fetch the images with litune data fetch, then embed what it wrote")
    image = pick_column(file, names, options.image_column, IMAGE_COLUMNS, "--image-column image paths")
    split = optional_column(file, names, options.split_column, "split")
    lang = optional_column(file, names, options.lang_column, "lang")
    usual = {name.lower() for name in names} & set(CAPTION_COLUMNS)
    known = {image, split, lang, "key", _label_column(names, options), *options.kept}
    others = (cells.get(name) for name in names if name not in known)
    if not (options.caption_columns or usual or any(map(_may_be_text, others))):
        return image, [], split, lang
    captions = [
        pick_column(file, names, wanted, CAPTION_COLUMNS, "--caption-column captions")
        for wanted in dict.fromkeys(options.caption_columns) or [None]
    ]
    return image, captions, split, lang


def _may_be_text(cell: Any) -> bool:
    """Whether a column may hold texts, as far as its first cell tells: not where that is a number."""
    if isinstance(cell, str):
        return not re.fullmatch(r"\s*[-+]?[\d.,]+([eE][-+]?\d+)?\s*", cell)
    return not isinstance(cell, (bool, int, float))


def column_names(file: str) -> list[str]:
    """The columns of a table's first row; none where there is no row, or the file is no table."""
    try:
        return next((list(line[1]) for line in read_lines(file) if not isinstance(line, Damage)), [])
    except DataError:
        return []


def read_lines(file: str) -> Iterator[Line]:
    """The rows of a table, one by one. Raises `DataError` where the file is not a table."""
    suffix = PurePosixPath(file).suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _read_parquet(file)
            return
        with open_file(file) as opened:
            if not opened.read(1):
                raise DataError(f"{file} is empty: expected a table of image paths and captions")
            opened.seek(0)
            if suffix in (".jsonl", ".ndjson"):
                yield from _read_jsonl(file, opened)
            elif suffix == ".json":
                yield from _read_json(file, opened)
            else:
                yield from _read_csv(file, opened, suffix)
    except (*BROKEN, csv.Error) as why:
        raise DataError(f"{file} can't be read as a table: {first_line(why)}") from None


def _read_parquet(file: str) -> Iterator[Line]:
    name, row = PurePosixPath(file).name, 0
    with open_file(file) as opened, pa.parquet.ParquetFile(opened) as parquet:
        wanted = [field.name for field in parquet.schema_arrow if not pa.types.is_nested(field.type) or _list(field)]
        for batch in parquet.iter_batches(ROWS, columns=wanted):
            batch.validate(full=True)
            columns = {column: batch.column(column).to_pylist() for column in wanted}
            for i in range(batch.num_rows):
                row += 1
                yield f"row {row} of {name}", {column: values[i] for column, values in columns.items()}


def _list(field: pa.Field) -> bool:
    return bool(pa.types.is_list(field.type) or pa.types.is_large_list(field.type))


def _read_jsonl(file: str, opened: Any) -> Iterator[Line]:
    name = PurePosixPath(file).name
    for number, data in enumerate(opened, 1):
        if not data.strip():
            continue
        where = f"row {number} of {name}"
        try:
            row = json.loads(data.decode("utf-8-sig"))
        except UnicodeDecodeError as why:
            yield Damage(where, f"the line is not UTF-8 ({why.reason} at byte {why.start})")
        except (ValueError, RecursionError) as why:
            yield Damage(where, f"the line is not JSON: {first_line(why)}")
        else:
            if isinstance(row, dict):
                yield where, row
            else:
                yield Damage(where, f"the line holds a {type(row).__name__}, expected a JSON object")


def _read_json(file: str, opened: Any) -> Iterator[Line]:
    """A list of objects, whole in memory."""
    try:
        rows = json.loads(opened.read().decode("utf-8-sig"))
    except (ValueError, RecursionError) as why:
        raise DataError(f"{file} can't be read as JSON: {first_line(why)}") from None
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        where = f"row {number} of {PurePosixPath(file).name}"
        if isinstance(row, dict):
            yield where, row
        else:
            yield Damage(where, f"it is a {type(row).__name__}, expected a JSON object")


def _read_csv(file: str, opened: Any, suffix: str) -> Iterator[Line]:
    """The rows of a CSV or TSV file, every cell as text: a caption of digits stays a caption."""
    name = PurePosixPath(file).name
    first = opened.readline(MOST_TEXT)
    if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{file} is UTF-16, expected UTF-8: save it as UTF-8")
    head = _decode(first)
    delimiter, names = _header(head, suffix)
    if not names:
        raise DataError(f"{file} is not a table litune reads: expected .csv, .tsv, .jsonl, .parquet or Flickr's lists")
    duplicated = {n for n in names if n and names.count(n) > 1}
    if duplicated:
        raise DataError(f"{file} has the column {min(duplicated)!r} more than once: rename one")
    if names[0] == "image#" or is_picture(_split(head, delimiter)[0]):
        opened.seek(0)  # no header
    rows = csv.reader(
        map(_decode, opened),
        delimiter=delimiter,
        quoting=DELIMITERS[delimiter],
        skipinitialspace=delimiter == "|",
        strict=True,
    )
    number = 0
    while True:
        number += 1
        where = f"row {number} of {name}"
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as why:
            yield Damage(where, f"it can't be read: {why}")
            continue
        if not any(cells):
            continue
        if len(cells) != len(names):
            yield Damage(where, f"it has {len(cells)} cells, the table has {len(names)} columns")
            continue
        if delimiter == "\t":
            cells = [_unquoted(cell) for cell in cells]
        row = dict(zip(names, cells, strict=True))
        if "image#" in row:  # Flickr's lists: photo.jpg#0
            row["image"] = re.sub(r"#\d+$", "", row.pop("image#"))
        if delimiter == "|":
            row = {column: cell.strip() for column, cell in row.items()}
        yield where, row


def _unquoted(cell: str) -> str:
    """A tab-separated cell without the quotes that spreadsheets put around cells that contain quotes."""
    inside = cell[1:-1]
    if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inside.replace('""', ""):
        return inside.replace('""', '"')
    return cell


def _decode(line: bytes) -> str:
    """A line as text. Bytes that are not UTF-8 become lone surrogates, which the check of each cell catches."""
    return line.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")


def _header(line: str, suffix: str) -> tuple[str, list[str]]:
    """The delimiter and the column names from a table's first line; no names if it is not a table.

    A table without a header is recognised by the picture at the start of its first line.
    """
    if re.match(r"[^\t]+#\d+\t", line):
        return "\t", ["image#", "caption"]
    expected = "\t" if suffix == ".tsv" else ","
    for delimiter in sorted(DELIMITERS, key=lambda d: d != expected):
        cells = _split(line, delimiter)
        if len(cells) > 1 and is_picture(cells[0]):
            return delimiter, ["image", "caption"] if len(cells) == 2 else ["image", "number", "caption"][: len(cells)]
        if {cell.lower() for cell in cells} & set(IMAGE_COLUMNS) and len(cells) > 1:
            return delimiter, cells
    cells = _split(line, expected)
    return expected, cells if suffix in (".csv", ".tsv") else []


def _split(line: str, delimiter: str) -> list[str]:
    cells = next(csv.reader([line], delimiter=delimiter, quoting=DELIMITERS[delimiter]), [""])
    cells = [cell.strip() for cell in cells]
    return [_unquoted(cell) for cell in cells] if delimiter == "\t" else cells


def image_base(file: str, images: Path | str | None, keys: Sequence[str]) -> str:
    """The folder that a table's image paths are relative to: the candidate that has most of a sample."""
    most = ASKED_ELSEWHERE if is_url(file) else 200
    sample = [str(key) for key in keys[:: -(-len(keys) // most)]]
    if images is not None:
        if not is_url(images) and not Path(images).is_dir():
            raise DataError(f"--images {images} is not a folder")
        return str(images)
    here = folder_of(file)
    above = folder_of(here)
    try:
        candidates = [here, join(here, PurePosixPath(file).stem), *_folders_in(here)]
        if PurePosixPath(here).name == "annotations":
            candidates += [folder for folder in _folders_in(above) if folder != here]
        candidates.append(above)
        hits = {base: sum(exists(base, key) for key in sample) for base in candidates}
        if not any(hits.values()) and not is_url(here):
            candidates = [deeper for folder in candidates[:-1] for deeper in _folders_in(folder)] or candidates
            hits = {base: sum(exists(base, key) for key in sample) for base in candidates}
    except OSError as why:
        raise DataError(first_line(why)) from None
    best = max(candidates, key=lambda base: hits[base])
    if hits[best] == 0:
        raise DataError(
            f"none of the images that {file} names was found (the first: {sample[0]}) in {here} or the folders "
            "in it: name their folder with --images"
        )
    return best


def _folders_in(folder: str) -> list[str]:
    try:
        return folders_in(folder)
    except OSError:  # not every web server lists folders
        return []


def exists(base: str, key: str) -> bool:
    """Whether the file that holds an image exists."""
    return is_url(key) or is_file(file_of(join(base, key)))  # an image's own URL is only requested when it is read


def join(base: str, key: str) -> str:
    """An image's reference: the name in a table, relative to a folder unless it is absolute or a URL."""
    if is_url(key) or key.startswith("/"):
        return key
    return f"{base}/{key}" if is_url(base) else str(Path(base) / key)
