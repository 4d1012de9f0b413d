"""Sources: image-text pairs out of the files people have."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from litune.data.names import canonicalize
from litune.errors import DataError, nearest

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".avif",
        ".ppm",
        ".pgm",
        ".pbm",
        ".tga",
        ".jp2",
    ]
)
TABLE_SUFFIXES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"})
IMAGE_COLUMNS = ["image", "image_path", "file_name", "filename", "filepath", "file", "path", "img", "image_file"]
CAPTION_COLUMNS = ["caption", "captions", "text", "texts", "title", "sentence", "sentences", "description"]


@dataclass(frozen=True)
class Damage:
    """One input that can't be used: its name, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Pairs:
    """Images with their captions, in a fixed order.

    `table` has one row per image: `key` (the image's path as the source names it), `path` (the file),
    `captions` (a list, possibly empty), and, where the source has them, `langs` and `fields` (one per caption: its
    language, and the column that it is from), `split` and `label` (the class).
    """

    table: pa.Table
    source: str
    damaged: tuple[Damage, ...] = ()

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def captions(self) -> int:
        """The number of captions of all images."""
        return int(pc.sum(pc.list_value_length(self.table["captions"])).as_py() or 0)

    def fingerprint(self) -> str:
        """A hash over keys, captions, languages, splits and labels, in order."""
        digest = hashlib.sha256()
        for name in self.table.column_names:
            if name == "path":
                continue
            digest.update(name.encode())
            for chunk in self.table[name].chunks:
                # Values and offsets by themselves: an Arrow buffer may hold more than the chunk's slice.
                flat = pc.list_flatten(chunk) if pa.types.is_list(chunk.type) else chunk
                digest.update("\0".join("" if v is None else v for v in flat.to_pylist()).encode())
                if pa.types.is_list(chunk.type):
                    digest.update(pc.list_value_length(chunk).to_numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def read_pairs(
    source: Path,
    *,
    images: Path | None = None,
    image_column: str | None = None,
    caption_columns: Sequence[str] = (),
    split_column: str = "split",
    lang_column: str = "lang",
    split: Sequence[str] = (),
    lang: Sequence[str] = (),
    max_damaged: float = 0.01,
) -> Pairs:
    """The pairs at `source`: a table, a folder with one, a tree of class folders, or a folder of images.

    Raises `DataError` where there is nothing to read, a column is missing, or more than the share
    `max_damaged` of the captions is empty or not a string.
    """
    if not source.exists():
        raise DataError(f"{source} does not exist: give a folder of images or a table of captions")
    table_file = source if source.is_file() else _find_table(source)
    if table_file is not None:
        pairs = _from_table(table_file, images, image_column, caption_columns, split_column, lang_column, max_damaged)
    elif any(_image_files(source)):
        pairs = _from_files(source)
    else:
        pairs = _from_classes(source)
    return _select(pairs, split, lang)


def image_files(folder: Path) -> list[Path]:
    """The image files directly in `folder`, sorted by name."""
    return sorted(_image_files(folder))


def class_folders(root: Path) -> dict[str, list[Path]]:
    """A class-per-folder tree as {class: its image files}, sorted. Raises `DataError` where it is none."""
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: expected one folder of images per class in it")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    classes = {f.name: image_files(f) for f in folders}
    if not any(classes.values()):
        nested = [f.name for f in folders if any(g.is_dir() and any(_image_files(g)) for g in f.iterdir())]
        hint = f": perhaps you meant {root / nested[0]}" if nested else ""
        raise DataError(f"{root} has no images, no table of captions and no class folders with images{hint}")
    empty = [name for name, files in classes.items() if not files]
    if empty:
        raise DataError(f"the class folder {root / empty[0]} has no images: remove it or fill it")
    return classes


def _image_files(folder: Path) -> Iterable[Path]:
    return (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def _find_table(folder: Path) -> Path | None:
    """The one table of captions in `folder`, or beside it under the folder's name."""
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() in TABLE_SUFFIXES and p.is_file())
    if len(tables) > 1:
        names = ", ".join(t.name for t in tables)
        raise DataError(f"{folder} has several tables ({names}): give the one to read, and --images {folder}")
    if tables:
        return tables[0]
    whole = folder.absolute()
    beside = [t for s in sorted(TABLE_SUFFIXES) if (t := whole.parent / f"{whole.name}{s}").is_file()]
    return beside[0] if beside else None


def _from_files(folder: Path) -> Pairs:
    files = image_files(folder)
    table = pa.table(
        {
            "key": [f.name for f in files],
            "path": [str(f) for f in files],
            "captions": pa.array([[] for _ in files], pa.list_(pa.string())),
        }
    )
    return Pairs(table, f"a folder of {len(files):,} images without captions")


def _from_classes(root: Path) -> Pairs:
    classes = class_folders(root)
    rows = [(name, file) for name, files in classes.items() for file in files]
    table = pa.table(
        {
            "key": [f"{name}/{file.name}" for name, file in rows],
            "path": [str(file) for _, file in rows],
            "captions": pa.array([[canonicalize(name)] for name, _ in rows], pa.list_(pa.string())),
            "label": [name for name, _ in rows],
        }
    )
    return Pairs(table, f"a tree of {len(classes):,} class folders")


def _from_table(
    file: Path,
    images: Path | None,
    image_column: str | None,
    caption_columns: Sequence[str],
    split_column: str,
    lang_column: str,
    max_damaged: float,
) -> Pairs:
    columns = _read_table(file)
    names = list(columns)
    image_name = _column(file, names, image_column, IMAGE_COLUMNS, "image paths", "--image-column")
    caption_names = [
        _column(file, names, wanted, CAPTION_COLUMNS, "captions", "--caption-column")
        for wanted in dict.fromkeys(caption_columns) or [None]
    ]
    split_name = _optional(file, names, split_column, "split", "--split-column")
    lang_name = _optional(file, names, lang_column, "lang", "--lang-column")
    rows = len(columns[image_name])
    if rows == 0:
        raise DataError(f"{file} has no rows: expected one per caption, with columns {', '.join(names)}")

    flat = _flatten(file, columns, image_name, caption_names, split_name, lang_name)
    limit = max_damaged * max(rows, len(flat.image))
    if len(flat.damaged) > limit:
        worst = flat.damaged[0]
        raise DataError(
            f"{len(flat.damaged):,} of {max(rows, len(flat.image)):,} captions in {file} can't be used "
            f"(at most {max_damaged:.1%} may): {worst.key}: {worst.reason}; mend them or raise --max-damaged"
        )
    grouped = _group(file, flat, split_name, lang_name, several=len(caption_names) > 1)
    base = _image_base(file, images, grouped["key"])
    paths = [str(base / key) for key in grouped["key"].to_pylist()]
    table = pa.table({"key": grouped.pop("key"), "path": pa.array(paths, pa.string()), **grouped})
    return Pairs(table, f"the table {file.name}, images in {base}", tuple(flat.damaged))


def _read_table(file: Path) -> dict[str, Sequence[Any]]:
    """The table's columns as sequences of Python values."""
    suffix = file.suffix.lower()
    if suffix not in TABLE_SUFFIXES:
        raise DataError(f"{file} is not a table litune reads: expected .csv, .tsv, .jsonl or .parquet")
    try:
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty: expected a table of image paths and captions")
        if suffix == ".parquet":
            table = pa.parquet.read_table(file)
            return {name: table[name].to_pylist() for name in table.column_names}
        if suffix in (".jsonl", ".ndjson"):
            return _read_jsonl(file)
        return _read_csv(file, "," if suffix == ".csv" else "\t")
    except UnicodeDecodeError as why:
        raise DataError(f"{file} is not UTF-8 ({why.reason} at byte {why.start}): save it as UTF-8") from None
    except pa.ArrowInvalid as why:
        raise DataError(f"{file} can't be read as a table: {str(why).splitlines()[0]}") from None


def _read_csv(file: Path, delimiter: str) -> dict[str, Sequence[Any]]:
    # Every column as text: a caption of digits stays a caption.
    with open(file, encoding="utf-8-sig", newline="") as lines:
        quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
        names = next(csv.reader(lines, delimiter=delimiter, quoting=quoting), [])
    duplicated = {n for n in names if names.count(n) > 1}
    if duplicated:
        raise DataError(f"{file} has the column {min(duplicated)!r} more than once: rename one")
    table = pa.csv.read_csv(
        file,
        parse_options=pa.csv.ParseOptions(
            delimiter=delimiter,
            # Tab-separated files of captions are written without quoting: a caption may hold a lone quote.
            quote_char='"' if delimiter == "," else False,
            newlines_in_values=delimiter == ",",
        ),
        convert_options=pa.csv.ConvertOptions(
            column_types={name: pa.string() for name in names}, strings_can_be_null=False
        ),
    )
    return {name: table[name].to_pylist() for name in table.column_names}


def _read_jsonl(file: Path) -> dict[str, Sequence[Any]]:
    rows: list[dict[str, Any]] = []
    with open(file, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as why:
                raise DataError(f"{file} line {number} is not JSON: {why.msg}") from None
            if not isinstance(row, dict):
                raise DataError(f"{file} line {number} holds a {type(row).__name__}, expected a JSON object")
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names} or {"image": [], "caption": []}


def _column(file: Path, names: list[str], wanted: str | None, usual: list[str], what: str, option: str) -> str:
    if wanted is not None:
        if wanted not in names:
            raise DataError(f"{file} has no column {wanted!r} ({nearest(wanted, names)})")
        return wanted
    for name in usual:
        if name in names:
            return name
    raise DataError(f"{file} has no column of {what} that litune knows: name one of {', '.join(names)} with {option}")


def _optional(file: Path, names: list[str], wanted: str, usual: str, option: str) -> str | None:
    if wanted in names:
        return wanted
    if wanted != usual:
        raise DataError(f"{file} has no column {wanted!r} for {option} ({nearest(wanted, names)})")
    return None


@dataclass
class _Flat:
    """One entry per usable caption, in the table's order."""

    image: list[str]
    caption: list[str]
    split: list[str]
    lang: list[str]
    field: list[str]
    damaged: list[Damage]


def _flatten(
    file: Path,
    columns: dict[str, Sequence[Any]],
    image_name: str,
    caption_names: Sequence[str],
    split_name: str | None,
    lang_name: str | None,
) -> _Flat:
    flat = _Flat([], [], [], [], [], [])
    splits = columns[split_name] if split_name else None
    langs = columns[lang_name] if lang_name else None
    for row, image in enumerate(columns[image_name]):
        where = f"row {row + 1} of {file.name}"
        if not isinstance(image, str) or not image.strip():
            flat.damaged.append(Damage(where, f"the image path is {image!r}, expected a path"))
            continue
        where += f" ({image})"
        cells = {name: columns[name][row] for name in caption_names}
        if len(cells) > 1:
            # Of several text fields an image may lack some, not all.
            cells = {name: cell for name, cell in cells.items() if cell not in (None, "", [])}
            if not cells:
                flat.damaged.append(Damage(where, f"{', '.join(caption_names)} are all empty"))
        for name, cell in cells.items():
            captions = cell if isinstance(cell, list) else [cell]
            lang = langs[row] if langs else ""
            if isinstance(lang, list) and len(lang) != len(captions):
                flat.damaged.append(Damage(where, f"{len(captions)} captions but {len(lang)} languages"))
                continue
            if not captions:
                flat.damaged.append(Damage(where, "the list of captions is empty"))
            for i, caption in enumerate(captions):
                if not isinstance(caption, str):
                    flat.damaged.append(Damage(where, f"the caption is {caption!r}, expected a string"))
                elif not caption.strip():
                    flat.damaged.append(Damage(where, "the caption is empty"))
                else:
                    flat.image.append(image)
                    flat.caption.append(caption.strip())
                    flat.split.append(str(splits[row] or "") if splits else "")
                    flat.lang.append(str((lang[i] if isinstance(lang, list) else lang) or ""))
                    flat.field.append(name)
    if not flat.image:
        raise DataError(f"{file} has no usable caption: {flat.damaged[0].key}: {flat.damaged[0].reason}")
    return flat


def _group(
    file: Path, flat: _Flat, split_name: str | None, lang_name: str | None, *, several: bool
) -> dict[str, pa.Array]:
    """One row per image, in order of first appearance; its captions in the table's order."""
    encoded = pa.array(flat.image, pa.string()).dictionary_encode()
    codes = encoded.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    counts = np.bincount(codes)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    first = order[offsets.to_numpy()[:-1]]

    def lists(values: Sequence[str | None]) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values, pa.string()).take(pa.array(order)))

    grouped: dict[str, pa.Array] = {"key": encoded.dictionary, "captions": lists(flat.caption)}
    if lang_name:
        grouped["langs"] = lists(flat.lang)
    if several:
        grouped["fields"] = lists(flat.field)
    if split_name:
        splits = np.array(flat.split, dtype=object)
        mixed = np.flatnonzero(splits != splits[first][codes])
        if mixed.size:
            row = int(mixed[0])
            image, one, two = flat.image[row], splits[first][codes[row]], splits[row]
            raise DataError(f"{file}: the image {image} is in the splits {one!r} and {two!r}: keep it in one")
        grouped["split"] = pa.array(splits[first].tolist(), pa.string())
    return grouped


def _image_base(file: Path, images: Path | None, keys: pa.Array) -> Path:
    """The folder that the table's image paths are relative to: the candidate where most of a sample exist."""
    if images is not None:
        if not images.is_dir():
            raise DataError(f"--images {images} is not a folder")
        return images
    here = file.parent
    folders = sorted(p for p in here.iterdir() if p.is_dir() and not p.name.startswith("."))
    candidates = [here, here / file.stem, *folders, here.parent]
    sample = keys[:: max(1, len(keys) // 200)].to_pylist()
    found = {base: sum((base / key).is_file() for key in sample) for base in candidates}
    best = max(candidates, key=lambda base: found[base])
    if found[best] == 0:
        raise DataError(
            f"none of the images that {file} names was found (the first: {sample[0]}) in {here} or the folders "
            "in it: name their folder with --images"
        )
    return best


def _select(pairs: Pairs, split: Sequence[str], lang: Sequence[str]) -> Pairs:
    """Only the images of these splits and the captions in these languages; all where none are named."""
    table = pairs.table
    if split:
        known = _known(table, "split", split, "--split")
        table = table.filter(pc.is_in(table["split"], pa.array(known)))
    if lang:
        if "langs" not in table.column_names:
            raise DataError("--lang was given but the captions have no languages: see --lang-column")
        languages = set(pc.unique(pc.list_flatten(table["langs"])).to_pylist())
        for name in lang:
            if name not in languages:
                raise DataError(f"no caption is in the language {name!r} ({nearest(name, languages)})")
        table = select_captions(table, "langs", lang)
        table = table.filter(pc.greater(pc.list_value_length(table["captions"]), 0))
    if table.num_rows == 0:
        raise DataError("no image is left after --split and --lang: widen them")
    return Pairs(table.combine_chunks(), pairs.source, pairs.damaged)


def _known(table: pa.Table, column: str, wanted: Sequence[str], option: str) -> list[str]:
    if column not in table.column_names:
        raise DataError(f"{option} was given but the pairs have no {column} column: see {option}-column")
    known = set(pc.unique(table[column]).to_pylist())
    for name in wanted:
        if name not in known:
            raise DataError(f"no image is in the {column} {name!r} ({nearest(name, known)})")
    return list(wanted)


def select_captions(table: pa.Table, column: Literal["langs", "fields"], wanted: Sequence[str]) -> pa.Table:
    """The table with only the captions in these languages or of these fields; images may be left without any."""
    table = table.combine_chunks()
    values = pc.list_flatten(table[column]).combine_chunks()
    parents = pc.list_parent_indices(table[column]).combine_chunks().to_numpy()
    keep = pc.is_in(values, pa.array(list(wanted))).to_numpy(zero_copy_only=False)
    counts = np.bincount(parents[keep], minlength=table.num_rows)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    rows = pa.array(np.flatnonzero(keep))
    for name in ("captions", "langs", "fields"):
        if name not in table.column_names:
            continue
        values = pc.list_flatten(table[name]).combine_chunks().take(rows)
        place = table.column_names.index(name)
        table = table.set_column(place, name, pa.ListArray.from_arrays(offsets, values))
    return table
