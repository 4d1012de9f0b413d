"""Evaluation sets out of the layouts that people have them in. Nothing is downloaded.

A set is a list of images with, for each, its class or its captions. Pictures stay where they are, in files, tar shards,
Parquet files or arrays, and are read one at a time.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from litune.errors import DataError, nearest
from litune.pairs.address import is_url
from litune.pairs.cifar import Pixels, pixels_in, read_batch, read_pixels
from litune.pairs.pairs import class_folders, image_files, read_pairs
from litune.pairs.reference import Member, PictureCell, parse
from litune.pairs.sample import CAPTION_COLUMNS, IMAGE_SUFFIXES
from litune.pairs.tables import IMAGE_COLUMNS

TEST_SPLITS = ("test", "val", "validation", "valid")
"""The names under which people keep the images that a figure is taken on, in the order in which they are looked for."""
LABEL_COLUMNS = ("label", "fine_label", "labels", "class", "class_name", "category", "target")
LANG_COLUMNS = ("lang", "language", "langs", "languages")
BESIDE = ("train", *TEST_SPLITS, "mappings", "annotations", "Annotations")
"""Folders in a set's folder that are not the set itself."""
WNID = re.compile(r"^(n\d{8})(?=[_.\-]|$)")

Kind = Literal["classification", "retrieval"]


@dataclass(frozen=True)
class EvalSet:
    """B images and what they show, in a fixed order.

    `classes` are the set's own names of its classes (folder names, WordNet ids, numbers as text, …), `labels` [B] the
    positions of the images' classes among them; both are empty for retrieval. `captions` and `langs` have a list for
    each image.
    """

    path: Path
    layout: str
    keys: list[str]
    pictures: list[str]
    """Where the pictures' bytes are: references (`litune.pairs.reference`)."""
    classes: list[str] = field(default_factory=list)
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    captions: list[list[str]] = field(default_factory=list)
    langs: list[list[str]] = field(default_factory=list)
    templates: tuple[str, ...] = ()
    """The set's own templates, where its files have some."""

    def __len__(self) -> int:
        return len(self.keys)

    def fingerprint(self) -> str:
        """A hash over the images' names and sizes, in order; what they show does not count."""
        digest = hashlib.sha256()
        for key, stamp in zip(self.keys, _stamps(self.pictures), strict=True):
            digest.update(f"{key}\0{stamp}\0".encode())
        return digest.hexdigest()

    def subset(self, rows: Sequence[int] | np.ndarray) -> EvalSet:
        """The images at these rows."""
        rows = [int(row) for row in rows]

        def take(values: Sequence[Any]) -> list[Any]:
            return [values[row] for row in rows] if values else []

        return replace(
            self,
            keys=take(self.keys),
            pictures=take(self.pictures),
            labels=self.labels[rows] if len(self.labels) else self.labels,
            captions=take(self.captions),
            langs=take(self.langs),
        )

    def in_language(self, lang: str) -> EvalSet:
        """Only the captions in this language, and the images that have some. Raises `DataError` where none has."""
        kept = [[c for c, one in zip(*pair, strict=True) if one == lang] for pair in self._with_langs()]
        if not any(kept):
            known = nearest(lang, self.languages) if self.languages else "it has no column of languages"
            raise DataError(f"{self.path} has no captions in {lang!r} ({known})")
        found = replace(self, captions=kept, langs=[[lang] * len(one) for one in kept])
        return found.subset([row for row, one in enumerate(kept) if one])

    @property
    def languages(self) -> list[str]:
        """The languages of the captions, sorted."""
        return sorted({one for langs in self.langs for one in langs if one})

    def _with_langs(self) -> list[tuple[list[str], list[str]]]:
        langs = self.langs or [[""] * len(one) for one in self.captions]
        return list(zip(self.captions, langs, strict=True))


def _stamps(references: Sequence[str]) -> Iterator[str]:
    """For each picture what a fingerprint takes for its content, without reading it; elsewhere, that is its address."""
    sizes = cache(_file_state)
    for reference in references:
        place = parse(reference)
        if isinstance(place, Member):
            yield str(place.size)
        elif isinstance(place, PictureCell):
            yield f"{sizes(place.file)}-{place.group}-{place.row}"
        elif isinstance(place, Pixels):
            yield hashlib.sha256(read_pixels(place)).hexdigest()[:16]
        elif is_url(place):
            yield place
        else:
            yield _file_size(place)


def _file_size(path: str) -> str:
    try:
        return str(Path(path).stat().st_size)
    except OSError:
        return "missing"


def _file_state(path: str) -> str:
    state = Path(path).stat()
    return f"{state.st_size}-{state.st_mtime_ns}"


def read_set(
    path: Path, kind: Kind, *, splits: Sequence[str] = TEST_SPLITS, images: Path | None = None, label: str | None = None
) -> EvalSet:
    """The evaluation set at `path`, of the first of `splits` that it has; all of it, where it has no splits.

    Layouts: class folders; a flat folder of nXXXXXXXX_name.jpg; CIFAR's Python batches; the folders of DTD and Oxford
    Pets; CLIP_benchmark's webdataset shards; Parquet as the Hugging Face hub serves it; COCO and Karpathy JSON; lines
    of image,caption; tables (.csv, .tsv, .jsonl). Raises `DataError` where it is none of them, or damaged.
    """
    if not path.exists():
        raise DataError(f"there is no evaluation set at {path}")
    source = _Source(path, kind, tuple(splits), images, label)
    for reader in READERS:
        found = reader(source)
        if found is not None:
            return _checked(found, kind)
    raise DataError(
        f"{path} has no {'images with captions' if kind == 'retrieval' else 'classes'} in a layout that litune reads, "
        f"for the split {' or '.join(splits)}: see docs/evaluation.md"
    )


def _checked(found: EvalSet, kind: Kind) -> EvalSet:
    if not len(found):
        raise DataError(f"{found.path} has no images ({found.layout})")
    if len(set(found.keys)) < len(found.keys):
        twice = Counter(found.keys).most_common(1)[0][0]
        raise DataError(f"{found.path} has the image {twice} more than once ({found.layout})")
    if kind == "classification" and len(found.labels) != len(found):
        raise DataError(f"{found.path} says no classes of its images ({found.layout})")
    if kind == "retrieval":
        without = [row for row, captions in enumerate(found.captions) if not captions]
        if not found.captions or len(without) == len(found):
            raise DataError(f"{found.path} has no captions of its images ({found.layout})")
        if without:
            found = found.subset(np.setdiff1d(np.arange(len(found)), without))
    return found


@dataclass(frozen=True)
class _Source:
    """What a reader is asked for."""

    path: Path
    kind: Kind
    splits: tuple[str, ...]
    images: Path | None = None
    label: str | None = None

    def split_of(self, names: Sequence[str] | set[str]) -> str | None:
        """The first of the splits asked for that is among these names."""
        return next((split for split in self.splits if split in names), None)


# Webdataset shards ---------------------------------------------------------------------------------------------------


def _read_shards(source: _Source) -> EvalSet | None:
    """CLIP_benchmark's folders: SPLIT/nshards.txt, SPLIT/0.tar … with .jpg and .cls or .txt, classnames.txt."""
    folders = [source.path / split for split in source.splits] + [source.path]
    folder = next((one for one in folders if (one / "nshards.txt").is_file()), None)
    if folder is None:
        return None
    root = source.path
    if _lines(root / "dataset_type.txt") == ["multilabel"]:
        raise DataError(f"{root} has several classes per image (multilabel): litune evaluates sets with one")
    count = "".join(_lines(folder / "nshards.txt"))
    if not count.isdecimal():
        raise DataError(f"{folder / 'nshards.txt'} is {count!r}, expected the number of shards")
    keys, pictures, texts = [], [], []
    for number in range(int(count)):
        shard = folder / f"{number}.tar"
        for name, picture, text in _read_shard(shard, "txt" if source.kind == "retrieval" else "cls"):
            keys.append(f"{shard.name}/{name}")
            pictures.append(picture)
            texts.append(text)
    layout = f"{int(count):,} webdataset shards in {folder}"
    if source.kind == "retrieval":
        captions = [[line.strip() for line in text.splitlines() if line.strip()] for text in texts]
        return EvalSet(root, layout, keys, pictures, captions=captions)
    templates = tuple(t.replace("{c}", "{}") for t in _lines(root / "zeroshot_classification_templates.txt"))
    classes, labels = _numbered(root, [text.strip() for text in texts], _lines(root / "classnames.txt"))
    return EvalSet(root, layout, keys, pictures, classes, labels, templates=templates)


def _read_shard(shard: Path, label: str) -> list[tuple[str, str, str]]:
    """The pictures of a tar file with what is beside each under the same name."""
    pictures: dict[str, str] = {}
    texts: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                name, _, extension = member.name.partition(".")
                if f".{extension.lower()}" in IMAGE_SUFFIXES:
                    pictures[name] = str(Member(str(shard), member.offset_data, member.size, member.name))
                elif extension == label and (content := tar.extractfile(member)) is not None:
                    texts[name] = content.read().decode("utf-8")
    except FileNotFoundError:
        raise DataError(f"{shard} is missing: nshards.txt beside it says that it is there") from None
    except (tarfile.TarError, UnicodeDecodeError) as why:
        raise DataError(f"{shard} is damaged ({why}): fetch it again") from None
    without = pictures.keys() - texts.keys()
    if without:
        raise DataError(f"{shard}: {min(without)} has no .{label} beside its picture")
    return [(name, picture, texts[name]) for name, picture in pictures.items()]


def _lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty; none where it is not there."""
    if not file.is_file():
        return []
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def _numbered(where: Path, labels: Sequence[Any], names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Classes and labels out of numbers, with the classes' names where they are known; or out of names."""
    values = [str(label) for label in labels]
    if not all(value.isdecimal() for value in values):
        classes = sorted(set(values))
        place = {name: i for i, name in enumerate(classes)}
        return classes, np.array([place[value] for value in values], np.int64)
    numbers = np.array([int(value) for value in values], np.int64)
    if not names:
        found = np.unique(numbers)
        return [str(number) for number in found], np.searchsorted(found, numbers)
    if numbers.max(initial=0) >= len(names):
        raise DataError(f"{where} has the class {numbers.max()}, but names of {len(names):,} classes")
    return list(names), numbers


# CIFAR's batches -----------------------------------------------------------------------------------------------------


def _read_cifar(source: _Source) -> EvalSet | None:
    """The folders cifar-10-batches-py and cifar-100-python, or the one that holds them."""
    places = [source.path, source.path / "cifar-10-batches-py", source.path / "cifar-100-python"]
    folder = next((p for p in places if (p / "batches.meta").is_file() or (p / "meta").is_file()), None)
    if folder is None:
        return None
    hundred = (folder / "meta").is_file()
    train = source.splits[0] == "train"
    names = {(True, True): ["train"], (True, False): ["test"], (False, False): ["test_batch"]}
    files = names.get((hundred, train), [f"data_batch_{i}" for i in range(1, 6)])
    meta = read_batch(folder / ("meta" if hundred else "batches.meta"))
    keys, pictures, labels = [], [], []
    for name in files:
        batch = read_batch(folder / name)
        own = batch.get("fine_labels" if hundred else "labels")
        data = pixels_in(folder / name, batch)
        if own is None or len(own) != len(data):
            raise DataError(f"{folder / name} has {len(data):,} images but not as many labels")
        keys += [f"{name}/{row:05d}" for row in range(len(data))]
        pictures += [str(Pixels(str(folder / name), row)) for row in range(len(data))]
        labels += own
    classes = [
        one.decode() if isinstance(one, bytes) else one
        for one in meta["fine_label_names" if hundred else "label_names"]
    ]
    return EvalSet(source.path, f"CIFAR's batches in {folder}", keys, pictures, classes, np.array(labels, np.int64))


# Parquet -------------------------------------------------------------------------------------------------------------


def _read_parquet(source: _Source) -> EvalSet | None:
    """Parquet files as the hub serves them: an image column of bytes, a label whose names are in the schema."""
    files = _parquet_files(source)
    if not files:
        return None
    schema = pa.parquet.read_schema(files[0])
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    column = _image_column(files[0], schema, features)
    if column is None or pa.types.is_string(schema.field(column).type):
        return None  # a table of paths
    named = [name for name, one in features.items() if isinstance(one, dict) and one.get("_type") == "ClassLabel"]
    wanted = (source.label,) if source.label else (*LABEL_COLUMNS, *named)
    text = source.kind == "retrieval"
    label = next((one for one in (CAPTION_COLUMNS if text else wanted) if one in schema.names), None)
    if label is None:
        what = f"captions ({', '.join(CAPTION_COLUMNS)})" if text else "classes"
        raise DataError(f"{files[0]} has no column of {what} among {', '.join(schema.names)}")
    lang = next((one for one in LANG_COLUMNS if one in schema.names), None)
    split = "split" if "split" in schema.names else None
    keys: list[str] = []
    pictures: list[str] = []
    labels: list[Any] = []
    langs: list[Any] = []
    found_splits: list[Any] = []
    for file in files:
        try:
            whole = pa.parquet.ParquetFile(file)
            columns = [one for one in (label, lang, split) if one] + _path_columns(schema, column)
            table = whole.read(columns=columns)
            counts = [whole.metadata.row_group(g).num_rows for g in range(whole.num_row_groups)]
        except (pa.ArrowInvalid, OSError) as why:
            raise DataError(f"{file} is damaged ({str(why).splitlines()[0]}): fetch it again") from None
        cells = [str(PictureCell(str(file), g, row, column)) for g, count in enumerate(counts) for row in range(count)]
        paths = _image_paths(table, column)
        pictures += cells
        keys += [f"{file.stem}/{row:06d}" + (f"/{path}" if path else "") for row, path in enumerate(paths)]
        labels += table[label].to_pylist()
        langs += table[lang].to_pylist() if lang else []
        found_splits += table[split].to_pylist() if split else []
    layout = f"{len(files):,} Parquet files"
    if text:
        captions = [one if isinstance(one, list) else [one] for one in labels]
        spread = [
            one if isinstance(one, list) else [one or ""] * len(c) for one, c in zip(langs, captions, strict=bool(lang))
        ]
        found = EvalSet(source.path, layout, keys, pictures, captions=captions, langs=spread)
    else:
        names = features.get(label, {}).get("names", [])
        classes, numbers = _numbered(files[0], labels, names)
        found = EvalSet(source.path, layout, keys, pictures, classes, numbers)
    chosen = source.split_of(set(found_splits))
    return found.subset([row for row, one in enumerate(found_splits) if one == chosen]) if chosen else found


def _parquet_files(source: _Source) -> list[Path]:
    """The Parquet files of the split asked for, as the hub names them; else all of them."""
    if source.path.is_file():
        return [source.path] if source.path.suffix == ".parquet" else []
    here = [*source.path.glob("*.parquet"), *source.path.glob("data/*.parquet")]
    for split in source.splits:
        found = [f for f in here if f.name.startswith((f"{split}-", f"{split}.", f"{split}_"))]
        found += source.path.glob(f"{split}/*.parquet")
        if found:
            return sorted(found)
    others = [f for f in here if f.name.startswith(("train-", "test-", "val"))]
    return sorted(set(here) - set(others))


def _image_column(file: Path, schema: pa.Schema, features: dict[str, Any]) -> str | None:
    marked = [name for name, one in features.items() if isinstance(one, dict) and one.get("_type") == "Image"]
    structs = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    usual = [name for name in (*IMAGE_COLUMNS, "jpg", "png") if name in schema.names]
    return next(iter([*marked, *structs, *usual]), None)


def _path_columns(schema: pa.Schema, column: str) -> list[str]:
    kind = schema.field(column).type
    if pa.types.is_struct(kind):
        return [f"{column}.path"] if kind.get_field_index("path") >= 0 else []
    return []


def _image_paths(table: pa.Table, column: str) -> list[str]:
    if column not in table.column_names:
        return [""] * table.num_rows
    return [str(one.get("path") or "") if one else "" for one in table[column].to_pylist()]


# JSON and lines of captions ------------------------------------------------------------------------------------------


def _read_karpathy(source: _Source) -> EvalSet | None:
    """Karpathy's dataset_coco.json (images with sentences and a split), or COCO's own form (images, annotations)."""
    if source.kind != "retrieval":
        return None
    file = _json_file(source)
    if file is None:
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        images = content["images"]
        if "annotations" in content:
            rows = {one["id"]: (str(one["file_name"]), list[str]()) for one in images}
            for one in content["annotations"]:
                rows[one["image_id"]][1].append(one["caption"])
            found = list(rows.values())
        else:
            chosen = source.split_of({one["split"] for one in images})
            if chosen is None:
                raise DataError(f"{file} has no images of the split {' or '.join(source.splits)}")
            found = [
                (str(Path(one.get("filepath", "")) / one["filename"]), [s["raw"] for s in one["sentences"]])
                for one in images
                if one["split"] == chosen
            ]
    except (ValueError, KeyError, TypeError) as why:
        raise DataError(f"{file} is not COCO's or Karpathy's JSON ({type(why).__name__}: {why})") from None
    return _with_files(source, f"the captions in {file.name}", found)


def _json_file(source: _Source) -> Path | None:
    if source.path.is_file():
        return source.path if source.path.suffix == ".json" else None
    named = [f"*_{split}_karpathy.json" for split in source.splits] + ["dataset_*.json", "captions_val*.json"]
    places = (source.path, source.path / "annotations")
    return next((f for pattern in named for place in places for f in sorted(place.glob(pattern))), None)


def _read_lines(source: _Source) -> EvalSet | None:
    """Lines of image,caption under a heading, as Flickr's sets come: NAME_SPLIT_karpathy.txt or captions.txt."""
    if source.kind != "retrieval":
        return None
    named = [f"*_{split}_karpathy.txt" for split in source.splits] + ["captions.txt"]
    if source.path.is_file():
        file = source.path if source.path.suffix == ".txt" else None
    else:
        file = next((f for pattern in named for f in sorted(source.path.glob(pattern))), None)
    if file is None:
        return None
    captions: dict[str, list[str]] = {}
    for line in _lines(file)[1:]:
        image, comma, caption = line.partition(",")
        if not comma:
            raise DataError(f"{file}: {line[:60]!r} is not image,caption")
        captions.setdefault(image.strip(), []).append(caption.strip().strip('"'))
    return _with_files(source, f"the captions in {file.name}", list(captions.items()))


def _with_files(source: _Source, layout: str, found: list[tuple[str, list[str]]]) -> EvalSet:
    """A set of images that are named in a list, in the folder where they are."""
    root = source.path.parent if source.path.is_file() else source.path
    inside = sorted(p for p in root.iterdir() if p.is_dir())
    for base in [source.images] if source.images else [root, *inside, *(p for one in inside for p in one.glob("*/"))]:
        for name in ((lambda key: key), (lambda key: Path(key).name)):
            if found and (base / name(found[0][0])).is_file():
                files = [str(base / name(key)) for key, _ in found]
                return EvalSet(
                    source.path, layout, [k for k, _ in found], files, captions=[[*map(str.strip, c)] for _, c in found]
                )
    first = found[0][0] if found else "none"
    raise DataError(f"{source.path} has {layout}, but no folder in it has their images (the first: {first})")


# Tables --------------------------------------------------------------------------------------------------------------


def _read_table(source: _Source) -> EvalSet | None:
    """A table of image paths with captions or with a class, and its splits and languages if it has them."""
    tables = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
    files = (
        [source.path] if source.path.is_file() else [f for f in sorted(source.path.iterdir()) if f.suffix in tables[:4]]
    )
    usual = LABEL_COLUMNS if source.kind == "classification" else CAPTION_COLUMNS
    files = [f for f in files if f.suffix in tables and {source.label, *usual} & {*_columns(f)}]
    if not files:
        return None
    if len(files) > 1:
        names = ", ".join(f.name for f in files)
        raise DataError(f"{source.path} has several tables ({names}): keep the one to evaluate on")
    columns = _columns(files[0])
    lang = next((one for one in LANG_COLUMNS if one in columns), "lang")
    wanted: tuple[str, ...] = ()
    if source.kind == "classification":
        label = source.label or next((one for one in LABEL_COLUMNS if one in columns), None)
        if label is None:
            return None
        wanted = (label,)
    pairs = read_pairs(files[0], images=source.images, caption_columns=wanted, lang_column=lang)
    table = pairs.table
    if "split" in table.column_names:
        chosen = source.split_of(set(table["split"].to_pylist()))
        if chosen is None:
            raise DataError(f"{files[0]} has no images of the split {' or '.join(source.splits)}")
        table = table.filter(pa.compute.equal(table["split"], chosen))
    keys, captions = table["key"].to_pylist(), table["captions"].to_pylist()
    pictures = table["path"].to_pylist()
    if source.kind == "retrieval":
        langs = table["langs"].to_pylist() if "langs" in table.column_names else []
        return EvalSet(source.path, pairs.source, keys, pictures, captions=captions, langs=langs)
    several = next((key for key, one in zip(keys, captions, strict=True) if len({*one}) > 1), None)
    if several is not None:
        raise DataError(f"{files[0]}: the image {several} has more than one class")
    classes, labels = _numbered(files[0], [one[0] for one in captions], [])
    return EvalSet(source.path, pairs.source, keys, pictures, classes, labels)


def _columns(file: Path) -> list[str]:
    if file.suffix == ".parquet":
        return list(pa.parquet.read_schema(file).names)
    with open(file, encoding="utf-8-sig", newline="") as lines:
        if file.suffix in (".jsonl", ".ndjson"):
            try:
                return list(json.loads(lines.readline() or "{}"))
            except (ValueError, TypeError):
                return []
        return next(csv.reader(lines, delimiter="," if file.suffix == ".csv" else "\t"), [])


# Folders -------------------------------------------------------------------------------------------------------------


def _read_listed(source: _Source) -> EvalSet | None:
    """DTD's labels/test1.txt and Oxford Pets' annotations/test.txt, beside a folder of images."""
    if source.kind != "classification" or source.path.is_file():
        return None
    split = "trainval" if source.splits[0] == "train" else "test"
    for root in [source.path, *(p for p in source.path.iterdir() if p.is_dir())]:
        dtd, pets = root / "labels" / "test1.txt", root / "annotations" / f"{split}.txt"
        if dtd.is_file() and (root / "images").is_dir():
            keys = _lines(dtd.with_name(f"{source.splits[0] if source.splits[0] == 'train' else 'test'}1.txt"))
            names = [key.split("/")[0] for key in keys]
            files, what = [str(root / "images" / key) for key in keys], f"DTD's first split in {root}"
        elif pets.is_file() and (root / "images").is_dir():
            keys = [line.split()[0] for line in _lines(pets)]
            names = [key.rpartition("_")[0] for key in keys]
            files, what = [str(root / "images" / f"{key}.jpg") for key in keys], f"Oxford Pets' {split} list in {root}"
        else:
            continue
        classes = sorted(set(names))
        place = {name: i for i, name in enumerate(classes)}
        return EvalSet(source.path, what, keys, files, classes, np.array([place[name] for name in names], np.int64))
    return None


def _read_flat(source: _Source) -> EvalSet | None:
    """A folder of images that begin with their WordNet id: n01440764_tench.jpg."""
    if source.kind != "classification" or source.path.is_file():
        return None
    for folder in _folders(source):
        files = image_files(folder)
        if files and all(WNID.match(file.name) for file in files):
            names = [file.name[:9] for file in files]
            classes = sorted(set(names))
            place = {name: i for i, name in enumerate(classes)}
            labels = np.array([place[name] for name in names], np.int64)
            keys, references = [file.name for file in files], [*map(str, files)]
            return EvalSet(source.path, f"images named by WordNet id in {folder}", keys, references, classes, labels)
    return None


def _read_tree(source: _Source) -> EvalSet | None:
    """One folder of images per class, perhaps under the name of a split or in the one folder that is there."""
    if source.kind != "classification" or source.path.is_file():
        return None
    for folder in _folders(source):
        if any(image_files(one) for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")):
            return class_tree(source.path, folder)
    return None


def class_tree(path: Path, folder: Path) -> EvalSet:
    """The set at `path`, whose images are in one folder per class in `folder`. Raises `DataError` where none are."""
    tree = class_folders(folder)
    files = [file for images in tree.values() for file in images]
    labels = np.repeat(np.arange(len(tree)), [len(images) for images in tree.values()])
    keys = [f"{file.parent.name}/{file.name}" for file in files]
    return EvalSet(path, f"class folders in {folder}", keys, [*map(str, files)], list(tree), labels)


def _folders(source: _Source) -> list[Path]:
    """The folders that may hold the images: that of the split, the set's own, and where only one is in it, that one."""
    found, folder = [], source.path
    for _ in range(4):
        inside = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "_"))]
        found += [folder / split for split in source.splits if folder / split in inside] + [folder]
        left = [p for p in inside if p.name not in BESIDE]
        if len(left) != 1:
            break
        folder = left[0]
    return found


READERS: tuple[Callable[[_Source], EvalSet | None], ...] = (
    _read_shards,
    _read_cifar,
    _read_karpathy,
    _read_lines,
    _read_parquet,
    _read_table,
    _read_listed,
    _read_flat,
    _read_tree,
)
