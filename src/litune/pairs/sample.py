"""What every source yields: samples, or damage for input that can't be used."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from litune.errors import DataError, nearest
from litune.progress import track

PACKAGES = {".heic": "pillow_heif", ".heif": "pillow_heif", ".hif": "pillow_heif", ".jxl": "pillow_jxl"}
"""The modules of the extra `pictures` that read formats which Pillow alone does not."""
IMAGE_SUFFIXES = frozenset(
    [
        *(suffix for suffix, module in PACKAGES.items() if find_spec(module)),
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
NOT_READ = re.compile(
    r"(heic|heif|hif|jxl|jxr|jxs|cr2|cr3|crw|nef|arw|dng|raf|orf|rw2|pef|srw|svgz?|psd|xcf|eps|ai|ico|exr|hdr|dcm|fits?|"
    r"pcx|sgi|wmf|emf|(jpe?g|jpe|png|webp|gif|tiff?|bmp)\W?\w*)"
)
"""Suffixes of pictures that are not read, and of renamed ones: IMG_1.HEIC, photo.jpg_large, photo.jpg!thumb."""
CAPTION_COLUMNS = [
    "caption",
    "captions",
    "text",
    "texts",
    "txt",
    "title",
    "sentence",
    "sentences",
    "description",
    "comment",
]
LABEL_COLUMNS = ("label", "labels")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
OWN = ("key", "path", "captions", "langs", "fields", "split", "label")
SHOWN_FROM = 20
MOST_TEXT = 16 << 20
"""The most bytes of a caption, or of a sample's metadata file."""


@dataclass(frozen=True)
class Damage:
    """One input that can't be used: its name and the reason."""

    key: str
    reason: str
    whole_file: bool = False
    """Whether the input is a file of many samples."""


@dataclass(frozen=True)
class Options:
    """How to read a source, as the user asked; see `EmbedConfig`."""

    images: Path | str | None = None
    image_column: str | None = None
    caption_columns: Sequence[str] = ()
    split_column: str = "split"
    lang_column: str = "lang"
    keep: Sequence[str] = ()
    label_column: str | None = None
    """The column of classes beside pictures in a column; None for the first that is usual."""
    out: Path | None = None
    """What the command writes: never read where a folder's table is looked for."""
    without_picture: bool = False
    """Whether a row without a picture is a sample as well, damaged when its picture is read."""

    @property
    def several_fields(self) -> bool:
        """Whether captions are kept as separate text fields."""
        return len(dict.fromkeys(self.caption_columns)) > 1

    @property
    def kept(self) -> list[str]:
        """Further columns that go into the store: those asked for and, always, an image's URL."""
        return [name for name in dict.fromkeys([*self.keep, "url"]) if name not in OWN]


@dataclass(slots=True)
class Sample:
    """An image with its captions and metadata, not yet checked."""

    where: str
    """Its position in the source, for messages."""
    key: Any
    path: str
    """The image's reference, or its name in the folder that `SampleSource.base` finds."""
    texts: dict[str, Any]
    """The content of each text field: a string, a list of strings or, in a damaged file, anything else."""
    lang: Any = ""
    """The captions' language: a string, a list with one per caption, or a dict of lists by text field."""
    split: Any = ""
    label: Any = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class SampleSource:
    """The samples of one source, which can be read once, and how to describe it."""

    about: Callable[[int], str]
    """A one-line description, given the number of images."""
    samples: Iterator[Sample | Damage]
    name: str
    files: int = 1
    passed_over: Counter[str] = field(default_factory=Counter)
    """Pictures beside the samples that are not read, by suffix; complete once the samples are read."""
    base: Callable[[Sequence[str]], str] | None = None
    """For tables: finds the images' folder from their names. Rows that name the same image are merged."""


def is_picture(name: str) -> bool:
    """Whether a file's name is that of a picture."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")


def count_passed_over(names: Iterable[str]) -> Counter[str]:
    """Of files of these names, those that are pictures which are not read, by their suffix."""
    suffixes = (
        PurePosixPath(name).suffix.lower() for name in names if not name.startswith(".") and not is_picture(name)
    )
    return Counter(suffix for suffix in suffixes if NOT_READ.fullmatch(suffix[1:]))


def say_passed_over(passed_over: Counter[str]) -> str:
    """Pictures that were passed over as a clause, by kind, the most frequent first; empty where there are none.

    >>> say_passed_over(Counter({".svg": 2}))
    'passed over 2 files that are not read: 2 .svg'
    """
    if not passed_over:
        return ""
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in passed_over.most_common())
    packages = {suffix.lstrip(".").upper() for suffix in passed_over if suffix in PACKAGES}
    remedy = f" ({', '.join(sorted(packages))}: pip install 'litune[pictures]')" if packages else ""
    return f"passed over {passed_over.total():,} files that are not read: {kinds}{remedy}"


def pick_column(where: str, names: Sequence[str], wanted: str | None, usual: Sequence[str], what: str) -> str:
    """The wanted column, else the first of the usual ones. Raises `DataError` where there is none.

    `what` is the option that names the column followed by what the column holds.
    """
    option, _, held = what.partition(" ")
    if wanted is not None:
        if wanted not in names:
            raise DataError(f"{where} has no column {wanted!r} ({nearest(wanted, names)})")
        return wanted
    lower = {name.lower(): name for name in reversed(names)}
    for name in usual:
        if name in lower:
            return lower[name]
    raise DataError(f"{where} has no column of {held} that litune knows: name one of {', '.join(names)} with {option}")


def optional_column(where: str, names: Sequence[str], wanted: str, usual: str) -> str | None:
    """The column of splits or languages; None if there is none and none was asked for."""
    if wanted in names:
        return wanted
    if wanted != usual:
        raise DataError(f"{where} has no column {wanted!r} for --{usual}-column ({nearest(wanted, names)})")
    return next((name for name in names if name.lower() == usual), None)


def split_of(name: str) -> str:
    """The split in a file's name, empty if there is none: train-00000-of-00002.parquet, val2017, cc3m-test-{0..3}.tar.

    >>> split_of("train-00000-of-00002.parquet"), split_of("captions_val2017.json"), split_of("00000.tar")
    ('train', 'val', '')
    """
    for word in re.findall("[a-z]+", name.lower()):
        if word in SPLITS:
            return SPLITS[word]
    return ""


def each(files: Sequence[str], unit: str) -> Iterator[str]:
    """The files one by one, with a progress bar if there are many."""
    if len(files) < SHOWN_FROM:
        yield from files
        return
    with track("reading", unit, len(files)) as task:
        for file in files:
            yield file
            task.advance(1)


def decode_text(data: bytes) -> str | None:
    """UTF-8 bytes as text, without a byte-order mark; None if they are not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
