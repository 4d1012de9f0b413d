"""Tables of image paths and captions: CSV, TSV, JSON Lines, Parquet, and Flickr's lists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet

from litune.errors import DataError
from litune.pairs.address import folder_of, folders_in, is_file, is_url, open_file, open_text
from litune.pairs.cells import printed_list
from litune.pairs.delimited import read_delimited
from litune.pairs.reference import BROKEN, file_of, first_line
from litune.pairs.sample import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    URL_COLUMNS,
    Damage,
    Options,
    Sample,
    SampleSource,
    first_column,
    optional_column,
    pick_column,
)
from litune.prompts import canonicalize

TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".token"})
ROWS = 10_000
ASKED_ELSEWHERE = 5
"""How many images are looked up to find their folder where each lookup is a request."""

Line = tuple[str, dict[str, Any]] | Damage
"""A row's position (for messages) and its cells by column; or why it can't be read."""


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


def tables_source(folder: str, files: Sequence[str], splits: Sequence[str], options: Options) -> SampleSource:
    """The pairs in several tables of a folder, named from it: each has its own images, and perhaps its split."""

    def read() -> Iterator[Sample | Damage]:
        for file, split in zip(files, splits, strict=True):
            inside = folder_of(file) if "/" in file else ""
            samples = list(_samples(file, read_lines(f"{folder}/{file}"), options))
            paths = [sample.path for sample in samples if isinstance(sample, Sample)]
            base = image_base(f"{folder}/{file}", options.images, paths) if paths else ""
            for sample in samples:
                if isinstance(sample, Sample):
                    sample.path = join(base, sample.path)
                    sample.key = f"{inside}/{sample.key}" if inside else sample.key
                    sample.split = sample.split or split
                yield sample

    def about(_: int) -> str:
        return f"{len(files):,} tables in {folder}: {', '.join(files[:4])}{', …' * (len(files) > 4)}"

    return SampleSource(about, read(), name=folder, base=lambda _: "")


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
    return printed_list(cell) if isinstance(cell, str) else cell


def _languages(cells: dict[str, Any], lang: str | None, captions: Sequence[str]) -> Any:
    """A row's languages, by text field where the fields have columns of their own: lang_title beside title."""
    own = {name: _listed(cells[f"lang_{name}"]) or "" for name in captions if f"lang_{name}" in cells}
    return own or (_listed(cells.get(lang)) or "" if lang else "")


def _label_column(names: Sequence[str], options: Options) -> str | None:
    """The column of classes; None where there is none."""
    return first_column(names, [*filter(None, [options.label_column]), *LABEL_COLUMNS])


def _columns(
    file: str, names: list[str], cells: dict[str, Any], options: Options
) -> tuple[str, list[str], str | None, str | None]:
    """The columns of image paths, captions, splits and languages; no captions where nothing in a row can be one."""
    if options.image_column is None and first_column(names, URL_COLUMNS) and not first_column(names, IMAGE_COLUMNS):
        raise DataError(f"{file} is a list of URLs: fetch the images with litune data fetch, then embed what it wrote")
    image = pick_column(file, names, options.image_column, IMAGE_COLUMNS, "--image-column image paths")
    split = optional_column(file, names, options.split_column, "split")
    lang = optional_column(file, names, options.lang_column, "lang")
    usual = first_column(names, CAPTION_COLUMNS)
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
        with open_text(file) as opened:
            if suffix in (".jsonl", ".ndjson"):
                yield from _read_jsonl(file, opened)
            elif suffix == ".json":
                yield from _read_json(file, opened)
            else:
                yield from read_delimited(file, opened, suffix)
    except BROKEN as why:
        raise DataError(f"{file} can't be read as a table: {first_line(why)}") from None


def _read_parquet(file: str) -> Iterator[Line]:
    name, row = PurePosixPath(file).name, 0
    with open_file(file) as opened, pa.parquet.ParquetFile(opened) as parquet:
        for batch in parquet.iter_batches(ROWS):
            batch.validate(full=True)
            columns = {column: batch.column(column).to_pylist() for column in batch.schema.names}
            for i in range(batch.num_rows):
                row += 1
                yield f"row {row} of {name}", {column: values[i] for column, values in columns.items()}


def _read_jsonl(file: str, opened: TextIO) -> Iterator[Line]:
    name = PurePosixPath(file).name
    for number, line in enumerate(opened, 1):
        if not line.strip():
            continue
        where = f"row {number} of {name}"
        try:
            line.encode()
            row = json.loads(line)
        except UnicodeEncodeError:
            yield Damage(where, "the line is not UTF-8")
        except (ValueError, RecursionError) as why:
            yield Damage(where, f"the line is not JSON: {first_line(why)}")
        else:
            if isinstance(row, dict):
                yield where, row
            else:
                yield Damage(where, f"the line holds a {type(row).__name__}, expected a JSON object")


def _read_json(file: str, opened: TextIO) -> Iterator[Line]:
    """A list of objects, whole in memory."""
    try:
        rows = json.load(opened)
    except (ValueError, RecursionError) as why:
        raise DataError(f"{file} can't be read as JSON: {first_line(why)}") from None
    for number, row in enumerate(rows if isinstance(rows, list) else [rows], 1):
        where = f"row {number} of {PurePosixPath(file).name}"
        if isinstance(row, dict):
            yield where, row
        else:
            yield Damage(where, f"it is a {type(row).__name__}, expected a JSON object")


def image_base(file: str, images: Path | str | None, keys: Sequence[str]) -> str:
    """The folder that a table's image paths are relative to: the candidate that has most of a sample."""
    most = ASKED_ELSEWHERE if is_url(file) else 200
    sample = [str(key) for key in keys[:: -(-len(keys) // most)]]
    if images is not None:
        return _base_in(file, str(images), sample)
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


def _base_in(file: str, images: str, sample: Sequence[str]) -> str:
    """`images`, or the folder in it that has most of a sample; one elsewhere is not looked into."""
    if is_url(images):
        return images
    if not Path(images).is_dir():
        raise DataError(f"--images {images} is not a folder")
    hits = {base: sum(exists(base, key) for key in sample) for base in [images, *_folders_in(images)]}
    best = max(hits, key=lambda base: hits[base])
    if sample and hits[best] == 0:
        raise DataError(
            f"none of the images that {file} names was found in --images {images} or the folders in it "
            f"(the first: {sample[0]}): name the folder that its paths begin in"
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
