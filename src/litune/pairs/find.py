"""Recognises what kind of pairs an address holds (tars, Parquet, tables, folders, stores) and opens it as a source."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from litune.errors import DataError
from litune.files import encoding_of
from litune.pairs.address import expand, files_under, is_file, is_pattern, is_url, local, open_file
from litune.pairs.annotations import annotation_files, annotation_source, is_annotation
from litune.pairs.columns import arrow_files, arrow_source, holds_pictures, parquet_source
from litune.pairs.folders import (
    beside_part,
    class_folders,
    files_source,
    is_part,
    local_files,
    parts_of,
    pictures_in,
)
from litune.pairs.outputs import DROPPED, is_marked
from litune.pairs.reference import first_line
from litune.pairs.sample import SPLITS, Options, SampleSource, is_picture, splits_of
from litune.pairs.stores import is_store, store_source
from litune.pairs.tables import TABLE_SUFFIXES, column_names, table_source, tables_source
from litune.pairs.tars import tar_source
from litune.pairs.trees import has_classes, has_splits, tables_in, tree_source, tree_splits, walk

NOT_HERE = "has Arrow data, which is read on this machine alone: copy it, or write it as Parquet"
PAIRS_SUFFIXES = (*TABLE_SUFFIXES, ".tar", ".arrow", ".json", ".txt")
_ROWS = re.compile(r"\s*\[\s*\{")
MOST_LISTS = 10
"""A folder with more .json files than this has one beside each image, not a table."""
MISSING = "give a folder of images, a table of captions, webdataset shards or Parquet files"


def holds_pairs(address: str) -> bool:
    """Whether an address is that of pairs, and not that of one picture: a folder, shards, a table."""
    path = PurePosixPath(address)
    if "::" in address:
        return False  # a picture in a file of many
    if path.suffix.lower() in PAIRS_SUFFIXES:
        return True
    return not is_picture(path.name) and not is_file(address) if is_url(address) else Path(local(address)).is_dir()


def find_source(address: str, options: Options) -> SampleSource:
    """The source at an address: a path, a URL or a pattern. Raises `DataError` where no known kind is there."""
    address = local(address)
    try:
        # A folder may be called "photos [2020]".
        if is_pattern(address) and not Path(address).exists() and not (is_url(address) and is_file(address)):
            return _from_files(expand(address), options)
        if is_url(address) and not is_file(address):
            return _from_elsewhere(address, options)
    except OSError as why:
        raise DataError(first_line(why)) from None
    if is_url(address):
        return _from_files([address], options)
    path = Path(address)
    if not path.exists():
        raise DataError(f"{address} does not exist: {MISSING}")
    return _from_folder(path, options) if path.is_dir() else _from_files([address], options)


def _from_elsewhere(folder: str, options: Options) -> SampleSource:
    """The source in a remote folder, chosen by the names of all files under it."""
    folder = folder.rstrip("/")
    below = len(folder) + 1
    paths = [file for file in files_under(folder) if not any(p.startswith(".") for p in file[below:].split("/"))]
    if not paths:
        raise DataError(f"nothing was found at {folder}: check the address (a web server must list a folder's files)")
    names: dict[str, list[str]] = {}  # by folder, from here
    for path in paths:
        inside, _, name = path.removeprefix(f"{folder}/").rpartition("/")
        names.setdefault(inside, []).append(name)
    # What litune wrote is passed over.
    outputs = tuple(f"{inside}/" for inside, own in names.items() if inside and is_marked({*own}))
    names = {inside: own for inside, own in names.items() if not f"{inside}/".startswith(outputs)}
    paths = [path for path in paths if not path[below:].startswith(outputs)]
    if {"dataset_dict.json", "state.json"} & set(names.get("", [])):
        raise DataError(f"{folder} {NOT_HERE}")
    if "img_emb" in names and "metadata" in names:
        raise DataError(f"{folder} is a feature store, which is read on this machine alone: copy it here first")
    here = {f"{folder}/{name}" for name in names.get("", [])}
    lists = {file for file in here if file.endswith(".json")}
    parts = [part for part in sorted(names) if is_part(part) and set(beside_part(part)) & set(names.get("", []))]
    if parts:
        return files_source(folder, {part: names[part].copy for part in parts}, options)
    of_kinds: tuple[Callable[[str], bool], ...] = (
        lambda file: file.lower().endswith(".tar"),
        lambda file: file.lower().endswith(".parquet"),
        is_annotation,
        lambda file: file in here and file.lower().endswith((*TABLE_SUFFIXES, ".token.txt", "/captions.txt")),
        lambda file: file in lists and len(lists) <= MOST_LISTS and _kind(file) == "table",
    )
    for of_kind in of_kinds:
        if matches := [file for file in paths if of_kind(file)]:
            return _from_files(matches, options)
    if tables := tables_in(names):
        return tables_source(folder, tables, tree_splits(tables), options)
    if has_classes(names):
        return tree_source(folder, names, options)
    if any(map(is_picture, names.get("", []))):
        return files_source(folder, {"": names[""].copy}, options)
    raise DataError(f"{folder} has no shards, no table of captions and no images in it: {MISSING}")


def _from_files(files: Sequence[str], options: Options) -> SampleSource:
    """Files of one kind, given by name."""
    kinds = {_kind(file): file for file in files}
    if len(kinds) > 1:
        first, other = list(kinds.values())[:2]
        raise DataError(f"{first} and {other} are files of different kinds: give one kind at a time")
    kind = next(iter(kinds))
    if kind == "tar":
        return tar_source(files, options)
    if kind == "parquet" and any(holds_pictures(file) for file in files):
        return parquet_source(files, options)
    if kind == "arrow":
        return arrow_files(files, options)
    if kind == "json":
        return annotation_source(files, options)
    if len(files) > 1 and kind != "parquet":
        raise DataError(f"{files[0]} and {files[1]} are two tables: give the one to read")
    return table_source(files, options)


def _kind(file: str) -> str:
    """The kind of a file: by the suffix that shards and Parquet files keep even if damaged, else by its first bytes."""
    suffix = PurePosixPath(file).suffix.lower()
    if suffix == ".arrow" and is_url(file):
        raise DataError(f"{file} {NOT_HERE}")
    if suffix in (".tar", ".parquet", ".arrow"):
        return suffix[1:]
    try:
        with open_file(file) as opened:
            head = opened.read(512)
    except FileNotFoundError:
        raise DataError(f"{file} does not exist: {MISSING}") from None
    except OSError as why:
        raise DataError(f"{file} can't be read: {why.strerror or first_line(why)}") from None
    if head[257:262] == b"ustar":
        return "tar"
    if head.startswith(b"PAR1"):
        return "parquet"
    if suffix == ".json":
        return "table" if _ROWS.match(head.decode(encoding_of(head), "replace")) else "json"
    for magic, kind in ((b"\x1f\x8b", "gzip"), (b"PK\x03\x04", "zip"), (b"\x28\xb5\x2f\xfd", "zstd")):
        if head.startswith(magic):
            raise DataError(f"{file} is compressed with {kind}: unpack it first")
    return "table"


def _from_folder(folder: Path, options: Options) -> SampleSource:
    """The source in a local folder; the most specific signs are checked first."""
    if (source := _packed_in(folder, options)) is not None:
        source.notes["images beside them left out"] = sum(1 for _ in pictures_in(folder))
        return source
    if parts_of(folder):
        return local_files(folder, options)
    if annotations := annotation_files(folder):
        source = _from_files(annotations, options)
    elif len(tables := _find_tables(folder, options)) > 1:
        names = [table.name for table in tables]
        source = tables_source(str(folder), names, splits_of(names), options)
    elif tables:
        source = table_source([str(tables[0])], options)
    else:
        return _from_tree(folder, options)
    source.within = folder
    return source


def _packed_in(folder: Path, options: Options) -> SampleSource | None:
    """The shards, the saved dataset, the store, or the Parquet or Arrow files with pictures in a local folder."""
    if tars := sorted(folder.glob("*.tar")) or sorted(folder.glob("*/*.tar")):
        beside = [file for file in sorted(folder.glob("*.parquet")) if not file.with_suffix(".tar").is_file()]
        if beside and holds_pictures(str(beside[0])):
            raise DataError(f"{tars[0]} and {beside[0]} are files of different kinds: give one kind at a time")
        return tar_source([str(file) for file in tars], options)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return arrow_source(folder, options)
    if is_store(folder):
        return store_source(folder, options)
    if arrows := sorted(folder.glob("*.arrow")):
        return arrow_files([str(file) for file in arrows], options)
    parquets = [str(file) for file in _parquet_files(folder)]
    if any(holds_pictures(file) for file in parquets[:2]):
        return parquet_source(parquets, options)
    return None


def _from_tree(folder: Path, options: Options) -> SampleSource:
    """The source in a folder of pictures, with folders in it or without."""
    tree = walk(folder, options.out)
    if tables := tables_in(tree):
        source = tables_source(str(folder), tables, tree_splits(tables), options)
        source.within = folder
        return source
    if not has_classes(tree) and any(pictures_in(folder)):
        return local_files(folder, options)
    if not has_classes(tree) or not (has_splits(tree) or any(map(is_picture, tree[""]))):
        class_folders(folder, options.out)  # says what is missing
    return tree_source(str(folder), tree, options)


def _parquet_files(folder: Path) -> list[Path]:
    """The Parquet files in a folder, in its `data/`, or in its folders of splits."""
    splits = (file for file in sorted(folder.glob("*/*.parquet")) if file.parent.name.lower() in SPLITS)
    return sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet")) or list(splits)


def _find_tables(folder: Path, options: Options) -> list[Path]:
    """The table of captions in `folder`, or beside it under the folder's name; several, where each is of a split."""
    tables = sorted(p for p in folder.iterdir() if (p.suffix.lower() in TABLE_SUFFIXES or _is_list(p)) and p.is_file())
    written = None if options.out is None else options.out.resolve()
    tables = [table for table in tables if table.resolve() != written and not {*column_names(str(table))} >= DROPPED]
    if not tables:
        lists = list(itertools.islice(folder.glob("*.json"), MOST_LISTS + 1))
        tables = sorted(p for p in lists if len(lists) <= MOST_LISTS and p.is_file() and _kind(str(p)) == "table")
    if len(tables) > 1 and not all(splits_of([t.name for t in tables])):
        names = ", ".join(t.name for t in tables)
        raise DataError(f"{folder} has several tables ({names}): give the one to read, and --images {folder}")
    if tables:
        return tables
    whole = folder.absolute()
    beside = [t for s in sorted(TABLE_SUFFIXES) if (t := whole.parent / f"{whole.name}{s}").is_file()]
    return beside[:1]


def _is_list(file: Path) -> bool:
    """Whether a file is named as Flickr's lists of captions are: Flickr8k.token.txt, captions.txt."""
    return file.name.endswith(".token.txt") or file.name == "captions.txt"
