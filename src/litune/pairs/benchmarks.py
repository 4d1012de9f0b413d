"""Evaluation sets out of the layouts that people have them in. Nothing is downloaded.

A set is a list of images with, for each, its class or its captions. Pictures stay where they are, in files, tar shards,
Parquet files or arrays, and are read one at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from litune.errors import DataError, nearest
from litune.pairs.address import is_url
from litune.pairs.annotations import read_annotations
from litune.pairs.cifar import Pixels, pixels_in, read_batch, read_pixels
from litune.pairs.columns import class_names, parquet_source, picture_column, picture_paths, read_schema
from litune.pairs.find import find_source
from litune.pairs.pairs import Pairs, class_folders, collect, image_files, read_pairs, select_captions
from litune.pairs.reference import BROKEN, Member, PictureCell, first_line, parse
from litune.pairs.sample import CAPTION_COLUMNS, SPLITS, Damage, Options, Sample, SampleSource, find_split, first_column
from litune.pairs.tables import column_names, image_base, join
from litune.pairs.tars import tar_source
from litune.prompts import read_list

TEST_SPLITS = ("test", "val", "validation", "valid", "dev", "eval")
"""The names under which people keep the images that a figure is taken on, in the order in which they are looked for."""
LABEL_COLUMNS = ("label", "fine_label", "labels", "class", "class_name", "category", "target")
LANG_COLUMNS = ("lang", "language", "langs", "languages")
MAX_DAMAGED = 0.01
"""The share of a set's captions that may be damaged, as elsewhere when nothing is said."""
BESIDE = ("train", *TEST_SPLITS, "mappings", "annotations", "Annotations")
"""Folders in a set's folder that are not the set itself."""
WNID = re.compile(r"^(n\d{8})(?=[_.\-]|$)")

Kind = Literal["classification", "retrieval"]


@dataclass(frozen=True)
class EvalSet:
    """B pairs and, for classification, what they show, in a fixed order.

    `classes` are the set's own names of its classes (folder names, WordNet ids, numbers as text, …), `labels` [B] the
    positions of the images' classes among them; both are empty for retrieval.
    """

    path: Path
    pairs: Pairs
    classes: list[str] = field(default_factory=list)
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    templates: tuple[str, ...] = ()
    """The set's own templates, where its files have some."""

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def layout(self) -> str:
        """What the set was read from, for messages."""
        return self.pairs.source

    @cached_property
    def keys(self) -> list[str]:
        """The images' names."""
        return list(self.pairs.table["key"].to_pylist())

    @cached_property
    def pictures(self) -> list[str]:
        """Where the pictures' bytes are: references (`litune.pairs.reference`)."""
        return list(self.pairs.table["path"].to_pylist())

    @cached_property
    def captions(self) -> list[list[str]]:
        """A list for each image."""
        return list(self.pairs.table["captions"].to_pylist())

    @cached_property
    def langs(self) -> list[list[str]]:
        """The languages of each image's captions; no lists where they are not known."""
        table = self.pairs.table
        return list(table["langs"].to_pylist()) if "langs" in table.column_names else []

    @property
    def languages(self) -> list[str]:
        """The languages of the captions, sorted."""
        if "langs" not in self.pairs.table.column_names:
            return []
        return sorted(filter(None, pc.unique(pc.list_flatten(self.pairs.table["langs"])).to_pylist()))

    def fingerprint(self) -> str:
        """A hash over the images' names and sizes, in order; what they show does not count."""
        digest = hashlib.sha256()
        for key, stamp in zip(self.keys, _stamps(self.pictures), strict=True):
            digest.update(f"{key}\0{stamp}\0".encode())
        return digest.hexdigest()

    def subset(self, rows: Sequence[int] | np.ndarray) -> EvalSet:
        """The images at these rows."""
        rows = np.asarray(rows, np.int64)
        return replace(
            self,
            pairs=replace(self.pairs, table=self.pairs.table.take(pa.array(rows))),
            labels=self.labels[rows] if len(self.labels) else self.labels,
        )

    def in_language(self, lang: str) -> EvalSet:
        """Only the captions in this language, and the images that have some. Raises `DataError` where none has."""
        if lang not in self.languages:
            known = nearest(lang, self.languages) if self.languages else "it has no column of languages"
            raise DataError(f"{self.path} has no captions in {lang!r} ({known})")
        table = select_captions(self.pairs.table, "langs", [lang])
        with_captions = np.flatnonzero(pc.list_value_length(table["captions"]).to_numpy())
        return replace(self, pairs=replace(self.pairs, table=table)).subset(with_captions)


def pairs_of(
    source: str,
    keys: Sequence[str],
    pictures: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    langs: Sequence[Sequence[str]] = (),
) -> Pairs:
    """Pairs out of B names, references and, where there are some, captions with their languages."""
    lists = pa.list_(pa.string())
    columns = {"key": pa.array(keys, pa.string()), "path": pa.array(pictures, pa.string())}
    columns["captions"] = pa.array([[]] * len(keys) if captions is None else captions, lists)
    return Pairs(pa.table(columns | ({"langs": pa.array(langs, lists)} if langs else {})), source)


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
    of image,caption; tables (.csv, .tsv, .jsonl); and what else `read_pairs` reads, if it has classes or captions.
    Raises `DataError` where it is none of them, or damaged.
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
        with_captions = np.flatnonzero(pc.list_value_length(found.pairs.table["captions"]).to_numpy())
        if not len(with_captions):
            raise DataError(f"{found.path} has no captions of its images ({found.layout})")
        if len(with_captions) < len(found):
            found = found.subset(with_captions)
    return found


@dataclass(frozen=True)
class _Source:
    """What a reader is asked for."""

    path: Path
    kind: Kind
    splits: tuple[str, ...]
    images: Path | None = None
    label: str | None = None

    @property
    def spellings(self) -> list[str]:
        """The splits asked for, each followed by its other names."""
        others = ([name for name in SPLITS if SPLITS[name] == SPLITS.get(split)] for split in self.splits)
        spelled = ([split, *names] for split, names in zip(self.splits, others, strict=True))
        return list(dict.fromkeys(itertools.chain.from_iterable(spelled)))

    def split_of(self, names: Sequence[str] | set[str]) -> str | None:
        """The first of the splits asked for that is among these names."""
        return next((name for split in self.splits if (name := find_split(split, names)) is not None), None)

    def options(self, **settings: Any) -> Options:
        """How the readers of all pairs are asked to read the set."""
        return Options(images=self.images, **settings)

    def described(self, samples: Sequence[Sample], layout: str) -> EvalSet:
        """The set of images with captions. Raises `DataError` where more than a few captions are damaged."""
        for sample in samples:
            sample.texts = {name: cell for name, cell in sample.texts.items() if cell not in (None, "", [])}
        source = SampleSource(lambda _: layout, iter(samples), str(self.path))
        return EvalSet(self.path, collect(source, self.options(), MAX_DAMAGED))

    def labelled(self, keys: Sequence[str], pictures: Sequence[str], labels: Sequence[str], layout: str) -> EvalSet:
        """The set of images with the names of their classes, which are sorted."""
        classes = sorted(set(labels))
        return EvalSet(self.path, pairs_of(layout, keys, pictures), classes, _positions(labels, classes))


def _positions(labels: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """The positions [B] of the labels among the classes."""
    place = {name: i for i, name in enumerate(classes)}
    return np.array([place[label] for label in labels], np.int64)


# Webdataset shards ---------------------------------------------------------------------------------------------------


def _read_shards(source: _Source) -> EvalSet | None:
    """CLIP_benchmark's folders: SPLIT/nshards.txt, SPLIT/0.tar … with .jpg and .cls or .txt, classnames.txt."""
    folders = [source.path / split for split in source.spellings] + [source.path]
    folder = next((one for one in folders if (one / "nshards.txt").is_file()), None)
    if folder is None:
        return None
    root = source.path
    if _lines(root / "dataset_type.txt") == ["multilabel"]:
        raise DataError(f"{root} has several classes per image (multilabel): litune evaluates sets with one")
    count = "".join(_lines(folder / "nshards.txt"))
    if not count.isdecimal():
        raise DataError(f"{folder / 'nshards.txt'} is {count!r}, expected the number of shards")
    wanted = "txt" if source.kind == "retrieval" else "cls"
    samples = [sample for i in range(int(count)) for sample in _read_shard(source, folder / f"{i}.tar", wanted)]
    layout = f"{int(count):,} webdataset shards in {folder}"
    if source.kind == "retrieval":
        return source.described(samples, layout)
    templates = tuple(t.replace("{c}", "{}") for t in _lines(root / "zeroshot_classification_templates.txt"))
    classes, labels = _numbered(root, [sample.label for sample in samples], _lines(root / "classnames.txt"))
    pairs = pairs_of(layout, [sample.key for sample in samples], [sample.path for sample in samples])
    return EvalSet(root, pairs, classes, labels, templates)


def _read_shard(source: _Source, shard: Path, wanted: str) -> Iterator[Sample]:
    """The pictures of a tar file, each with the class or the captions beside it."""
    if not shard.is_file():
        raise DataError(f"{shard} is missing: nshards.txt beside it says that it is there")
    for sample in tar_source([str(shard)], source.options(caption_columns=["txt"])).samples:
        if isinstance(sample, Damage):
            raise DataError(f"{shard} is damaged ({sample.key}: {sample.reason}): fetch it again")
        name = sample.key.removeprefix(f"{shard.stem}/")
        if not isinstance(sample.texts.get("txt") if wanted == "txt" else sample.label, (str, list)):
            raise DataError(f"{shard}: {name} has no .{wanted} beside its picture, or one that is not UTF-8")
        sample.key = f"{shard.name}/{name}"
        yield sample


def _lines(file: Path) -> list[str]:
    """The lines of a text file that are not empty; none where it is not there."""
    return read_list(str(file)) if file.is_file() else []


def _numbered(where: Path, labels: Sequence[Any], names: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Classes and labels out of numbers, with the classes' names where they are known; or out of names."""
    values = [str(label) for label in labels]
    if not all(value.isdecimal() for value in values):
        classes = sorted(set(values))
        return classes, _positions(values, classes)
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
    pairs = pairs_of(f"CIFAR's batches in {folder}", keys, pictures)
    return EvalSet(source.path, pairs, classes, np.array(labels, np.int64))


# Parquet -------------------------------------------------------------------------------------------------------------


def _read_parquet(source: _Source) -> EvalSet | None:
    """Parquet files as the hub serves them: an image column of bytes, a label whose names are in the schema."""
    files = _parquet_files(source)
    if not files:
        return None
    try:
        schema = read_schema(str(files[0]))
    except BROKEN as why:
        raise DataError(f"{files[0]} is damaged ({first_line(why)}): fetch it again") from None
    picture = picture_column(schema, None)
    if picture is None:
        return None  # a table of paths
    names = class_names(schema)
    text = source.kind == "retrieval"
    usual = CAPTION_COLUMNS if text else (source.label,) if source.label else (*LABEL_COLUMNS, *names)
    column = first_column(schema.names, usual)
    if column is None:
        what = f"captions ({', '.join(CAPTION_COLUMNS)})" if text else "classes"
        raise DataError(f"{files[0]} has no column of {what} among {', '.join(schema.names)}")
    options = source.options(
        image_column=picture,
        lang_column=first_column(schema.names, LANG_COLUMNS) or "lang",
        without_picture=True,
        **({"caption_columns": [column]} if text else {"label_column": column}),
    )
    samples = [sample for file in files for sample in _read_rows(file, picture, options)]
    if first_column(schema.names, ["split"]):
        chosen = source.split_of({sample.split for sample in samples})
        samples = [sample for sample in samples if chosen in (None, sample.split)]
    layout = f"{len(files):,} Parquet files"
    if text:
        return source.described(samples, layout)
    pairs = pairs_of(layout, [sample.key for sample in samples], [sample.path for sample in samples])
    return EvalSet(source.path, pairs, *_named(files[0], [sample.label for sample in samples], names.get(column, [])))


def _read_rows(file: Path, picture: str, options: Options) -> Iterator[Sample]:
    """The rows of a Parquet file, called by its name, their numbers and the names of their pictures."""
    samples = list(parquet_source([str(file)], options).samples)
    for sample in samples:
        if isinstance(sample, Damage):
            raise DataError(f"{file} is damaged ({sample.reason}): fetch it again")
    for row, (sample, path) in enumerate(zip(samples, picture_paths(str(file), picture), strict=True)):
        assert isinstance(sample, Sample)
        sample.key = f"{file.stem}/{row:06d}" + (f"/{path}" if path else "")
        yield sample


def _named(where: Path, labels: Sequence[str | None], classes: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Classes and labels out of names, in the order of `classes` where that is known."""
    known = set(classes) if classes else set(labels) - {None}
    if strange := [row for row, label in enumerate(labels) if label not in known]:
        raise DataError(f"{where} has no class, or one that is none of its {len(known):,}, for image {strange[0] + 1}")
    names = [label for label in labels if label is not None]
    return (list(classes), _positions(names, classes)) if classes else _numbered(where, names, [])


def _parquet_files(source: _Source) -> list[Path]:
    """The Parquet files of the split asked for, as the hub names them; else all of them."""
    if source.path.is_file():
        return [source.path] if source.path.suffix == ".parquet" else []
    here = [*source.path.glob("*.parquet"), *source.path.glob("data/*.parquet")]
    for split in source.spellings:
        found = [f for f in here if f.name.startswith((f"{split}-", f"{split}.", f"{split}_"))]
        found += source.path.glob(f"{split}/*.parquet")
        if found:
            return sorted(found)
    others = [f for f in here if f.name.startswith(("train-", "test-", "val", "dev-", "eval-"))]
    return sorted(set(here) - set(others))


# JSON and lines of captions ------------------------------------------------------------------------------------------


def _read_karpathy(source: _Source) -> EvalSet | None:
    """Karpathy's dataset_coco.json (images with sentences and a split), or COCO's own form (images, annotations)."""
    if source.kind != "retrieval":
        return None
    file = _json_file(source)
    if file is None:
        return None
    _, samples = read_annotations(str(file), source.options())
    images = [sample for sample in samples if isinstance(sample, Sample)]
    if len(images) < len(samples):
        damage = next(sample for sample in samples if isinstance(sample, Damage))
        raise DataError(f"{file} is not COCO's or Karpathy's JSON ({damage.key}: {damage.reason})")
    if splits := {image.split for image in images} - {""}:
        chosen = source.split_of(splits)
        if chosen is None:
            raise DataError(f"{file} has no images of the split {' or '.join(source.splits)}")
        images = [image for image in images if image.split == chosen]
    return _with_files(source, file, images)


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
    images = [Sample(image, image, image, {"caption": texts}) for image, texts in captions.items()]
    return _with_files(source, file, images)


def _with_files(source: _Source, file: Path, images: list[Sample]) -> EvalSet:
    """A set of images that a file names, in the folder where they are, by their paths or their names alone."""
    paths = [image.path for image in images]
    for names in (paths, [PurePosixPath(path).name for path in paths]) if paths else ():
        try:
            base = image_base(str(file), source.images, names)
        except DataError:
            continue
        for image, name in zip(images, names, strict=True):
            image.path = join(base, name)
        return source.described(images, f"the captions in {file.name}")
    first = images[0].path if images else "none"
    raise DataError(
        f"{source.path} has the captions in {file.name}, but no folder in it has their images (the first: {first})"
    )


# Tables --------------------------------------------------------------------------------------------------------------


def _read_table(source: _Source) -> EvalSet | None:
    """A table of image paths with captions or with a class, and its splits and languages if it has them."""
    tables = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
    files = (
        [source.path] if source.path.is_file() else [f for f in sorted(source.path.iterdir()) if f.suffix in tables[:4]]
    )
    usual = LABEL_COLUMNS if source.kind == "classification" else CAPTION_COLUMNS
    wanted_columns = list(filter(None, [source.label, *usual]))
    files = [f for f in files if f.suffix in tables and first_column(column_names(str(f)), wanted_columns)]
    if not files:
        return None
    if len(files) > 1:
        names = ", ".join(f.name for f in files)
        raise DataError(f"{source.path} has several tables ({names}): keep the one to evaluate on")
    columns = column_names(str(files[0]))
    lang = first_column(columns, LANG_COLUMNS) or "lang"
    wanted: tuple[str, ...] = ()
    if source.kind == "classification":
        label = source.label or first_column(columns, LABEL_COLUMNS)
        if label is None:
            return None
        wanted = (label,)
    options = source.options(caption_columns=wanted, lang_column=lang, label_column=next(iter(wanted), None))
    pairs = collect(find_source(str(files[0]), options), options, MAX_DAMAGED)
    table = pairs.table
    if "split" in table.column_names:
        chosen = source.split_of(set(table["split"].to_pylist()))
        if chosen is None:
            raise DataError(f"{files[0]} has no images of the split {' or '.join(source.splits)}")
        table = table.filter(pa.compute.equal(table["split"], chosen))
    pairs = replace(pairs, table=table)
    if source.kind == "retrieval":
        return EvalSet(source.path, pairs)
    keys, labels = table["key"].to_pylist(), table["captions"].to_pylist()
    several = next((key for key, names in zip(keys, labels, strict=True) if len({*names}) > 1), None)
    if several is not None:
        raise DataError(f"{files[0]}: the image {several} has more than one class")
    without_captions = pairs_of(pairs.source, keys, table["path"].to_pylist())
    return EvalSet(source.path, without_captions, *_numbered(files[0], [names[0] for names in labels], []))


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
        return source.labelled(keys, files, names, what)
    return None


def _read_flat(source: _Source) -> EvalSet | None:
    """A folder of images that begin with their WordNet id: n01440764_tench.jpg."""
    if source.kind != "classification" or source.path.is_file():
        return None
    for folder in _folders(source):
        files = image_files(folder)
        if files and all(WNID.match(file.name) for file in files):
            names = [file.name for file in files]
            ids = [name[:9] for name in names]
            return source.labelled(names, [*map(str, files)], ids, f"images named by WordNet id in {folder}")
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
    keys = [file.relative_to(folder).as_posix() for file in files]
    return EvalSet(path, pairs_of(f"class folders in {folder}", keys, [*map(str, files)]), list(tree), labels)


def _folders(source: _Source) -> list[Path]:
    """The folders that may hold the images: that of the split, the set's own, and where only one is in it, that one."""
    found, folder = [], source.path
    for _ in range(4):
        inside = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "_"))]
        found += [folder / split for split in source.spellings if folder / split in inside] + [folder]
        left = [p for p in inside if p.name not in BESIDE]
        if len(left) != 1:
            break
        folder = left[0]
    return found


# What else there is --------------------------------------------------------------------------------------------------


def _read_other(source: _Source) -> EvalSet | None:
    """Any other pairs with classes, or with captions that are no class names: shards, Arrow, texts beside pictures."""
    try:
        pairs = read_pairs(source.path, images=source.images)
    except DataError:
        return None
    table, columns = pairs.table, pairs.table.column_names
    if "split" in columns:
        table = table.filter(pc.equal(table["split"], source.split_of(set(table["split"].to_pylist())) or ""))
    if not len(table) or ("split" not in columns and source.splits[0] == "train"):
        return None  # the images to be tested on are none to learn from
    if source.kind == "retrieval":
        return EvalSet(source.path, replace(pairs, table=table)) if pairs.captions and "label" not in columns else None
    labels = table["label"].to_pylist() if "label" in columns else [""]
    if not all(labels):
        return None
    without_captions = pairs_of(pairs.source, table["key"].to_pylist(), table["path"].to_pylist())
    return EvalSet(source.path, without_captions, *_numbered(source.path, labels, []))


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
    _read_other,
)
