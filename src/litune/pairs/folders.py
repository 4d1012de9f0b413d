"""Folders of image files: alone, with a text file beside each, one folder per class, or img2dataset's `files`."""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from litune.errors import DataError
from litune.pairs.address import read_all
from litune.pairs.outputs import is_output
from litune.pairs.reference import first_line
from litune.pairs.sample import (
    MOST_TEXT,
    Damage,
    Options,
    Sample,
    SampleSource,
    captions_in,
    count_passed_over,
    is_picture,
    say_passed_over,
)
from litune.pairs.tars import load_facts, pick_texts

LOOKED_INTO = 1000
"""The most folders that are searched for a hint in an error message."""
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip")

_PART = re.compile(r"\d{5,}")


def image_files(folder: Path) -> list[Path]:
    """The image files directly in `folder`, sorted by name."""
    return sorted(pictures_in(folder))


def _image_files_below(folder: Path) -> list[Path]:
    """The image files in `folder` and in the folders in it, sorted by name; hidden ones are left out."""
    deeper = (p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    return [*image_files(folder), *(file for inside in sorted(deeper) for file in _image_files_below(inside))]


def pictures_in(folder: Path) -> Iterable[Path]:
    """The image files directly in `folder`, in no particular order."""
    return (p for p in folder.iterdir() if is_picture(p.name))


def class_folders(root: Path, out: Path | None = None) -> dict[str, list[Path]]:
    """A class-per-folder tree as {class: its image files}, sorted, without `out` and what else litune writes into it.

    Raises `DataError` where it is none.
    """
    if not root.is_dir():
        raise DataError(f"{root} is not a folder: expected one folder of images per class in it")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    folders = [folder for folder in folders if not is_output(folder, out)]
    classes = {f.name: _image_files_below(f) for f in folders}
    if not any(map(image_files, folders)):
        raise DataError(
            f"{root} has no images, no table of captions and no class folders with images{_not_read(root)}{_hint(root)}"
        )
    empty = [name for name, files in classes.items() if not files]
    if empty:
        folder = root / empty[0]
        raise DataError(f"the class folder {folder} has no images{_not_read(folder)}: remove it or fill it")
    return classes


def _not_read(folder: Path) -> str:
    """Pictures in a folder that are not read, as a clause in brackets; empty where there are none."""
    clause = say_passed_over(count_passed_over(entry.name for entry in folder.iterdir()))
    return f" ({clause})" if clause else ""


def _hint(root: Path) -> str:
    """The end of an error message: where under `root` there is something that litune reads; empty if nowhere."""
    for folder, _, names in itertools.islice(os.walk(root), LOOKED_INTO):
        if packed := [name for name in sorted(names) if name.endswith(PACKED)]:
            return f": {Path(folder, packed[0])} is compressed, unpack it first"
        inside = any(is_picture(name) or name.endswith((".tar", ".parquet", ".arrow")) for name in names)
        if inside and Path(folder) != root:
            one_above = any(map(is_picture, names)) and Path(folder).parent != root
            return f": perhaps you meant {Path(folder).parent if one_above else folder}"
    return ""


def parts_of(folder: Path) -> list[Path]:
    """The folders 00000, 00001, … of img2dataset's `files` output: those with a table or statistics beside them."""
    parts = sorted(p for p in folder.iterdir() if is_part(p.name) and p.is_dir())
    return [p for p in parts if any((folder / name).is_file() for name in beside_part(p.name))]


def is_part(name: str) -> bool:
    """Whether a folder's name looks like one of img2dataset's: 00000."""
    return _PART.fullmatch(name) is not None


def beside_part(name: str) -> tuple[str, str]:
    """The names of the table and the statistics that img2dataset writes beside a folder; either may be missing."""
    return f"{name}.parquet", f"{name}_stats.json"


def files_source(folder: str, parts: Mapping[str, Callable[[], Iterable[str]]], options: Options) -> SampleSource:
    """Images with the text files beside them: in a folder, or in the parts that img2dataset wrote.

    `parts` maps each part to a function that lists its files, called when the part is read; "" is the folder itself.
    """
    captions: set[bool] = set()
    notes, passed_over = Counter[str](), Counter[str]()

    def read() -> Iterator[Sample | Damage]:
        for part, listing in parts.items():
            names = set(listing())
            passed_over.update(count_passed_over(names))
            for name in sorted(filter(is_picture, names)):
                file = f"{folder}/{part}/{name}" if part else f"{folder}/{name}"
                key = f"{part}/{_stem(name)}" if part else name
                for sample in read_file(file, key, names, options, notes):
                    captions.add(isinstance(sample, Sample) and bool(sample.texts))
                    yield sample

    def about(count: int) -> str:
        if "" not in parts:
            return f"{len(parts):,} folder{'s' * (len(parts) > 1)} of img2dataset in {folder}"
        beside = "with captions beside them" if True in captions else "without captions"
        return f"a folder of {count:,} images {beside}"

    takes = ("caption", "split", "lang")
    return SampleSource(about, read(), name=folder, passed_over=passed_over, notes=notes, takes=takes)


def local_files(folder: Path, options: Options) -> SampleSource:
    """`files_source` of a folder on this machine."""
    parts = parts_of(folder)
    listings = {part.name: partial(os.listdir, part) for part in parts} or {"": partial(os.listdir, folder)}
    return files_source(str(folder), listings, options)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def read_file(file: str, key: str, names: set[str], options: Options, notes: Counter[str]) -> Iterator[Sample | Damage]:
    """One picture with the .txt and .json beside it."""
    texts: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    for suffix in ("txt", "json"):
        candidates = (f"{_stem(file)}.{spelling}" for spelling in (suffix, suffix.upper()))
        beside = next((path for path in candidates if path.rpartition("/")[2] in names), None)
        if beside is None:
            continue
        try:
            data = read_all(beside, MOST_TEXT)
        except (OSError, DataError) as why:
            yield Damage(key, f"its .{suffix} can't be read ({first_line(why)}): the image is kept without it")
            continue
        if suffix == "txt":
            texts["txt"] = captions_in(data, notes)
        elif isinstance(parsed := load_facts(data), Damage):
            yield Damage(key, f"{parsed.reason}: the image is kept without it")
        else:
            metadata = parsed
    yield Sample(
        key,
        key,
        file,
        pick_texts(texts, metadata, options),
        metadata.get(options.lang_column) or "",
        metadata.get(options.split_column) or "",
        extra={name: metadata[name] for name in options.kept if name in metadata},
    )
