"""What every source yields: samples, or damage for input that can't be used."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from litune.errors import DataError, nearest
from litune.files import decode_text, encoding_of, is_latin
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
URL_COLUMNS = ["url", "image_url", "img_url", "imageurl", "image_link", "link"]
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "validation", "valid", "dev", "eval", "development", "evaluation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""The names that people give to splits, the most usual first, and what litune calls them."""
LABEL_COLUMNS = ("label", "labels")
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
    def given(self) -> dict[str, str]:
        """The options that the user gave, as they are spelled, by what they are about."""
        flags = {
            "images": (f"--images {self.images}", self.images is not None),
            "image": (f"--image-column {self.image_column}", self.image_column is not None),
            "caption": (f"--caption-column {' '.join(self.caption_columns)}", bool(self.caption_columns)),
            "split": (f"--split-column {self.split_column}", self.split_column != "split"),
            "lang": (f"--lang-column {self.lang_column}", self.lang_column != "lang"),
        }
        return {about: flag for about, (flag, given) in flags.items() if given}

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
    within: Path | None = None
    """For a table found in a folder: the folder, all of whose pictures it may name."""
    takes: Sequence[str] = ("images", "image", "caption", "split", "lang")
    """The options, of `Options.given`, that mean something for this kind of source."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was passed over or guessed as the samples were read, with how often, for the line that describes them."""


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
    most_first = sorted(passed_over.items(), key=lambda kind: (-kind[1], kind[0]))
    kinds = ", ".join(f"{count:,} {suffix}" for suffix, count in most_first)
    packages = {suffix.lstrip(".").upper() for suffix in passed_over if suffix in PACKAGES}
    remedy = f" ({', '.join(sorted(packages))}: pip install 'litune[pictures]')" if packages else ""
    return f"passed over {passed_over.total():,} files that are not read: {kinds}{remedy}"


def pick_column(where: str, names: Sequence[str], wanted: str | None, usual: Sequence[str], what: str) -> str:
    """The wanted column, else the first of the usual ones. Raises `DataError` where there is none.

    `what` is the option that names the column followed by what the column holds.
    """
    option, _, held = what.partition(" ")
    column = first_column(names, usual if wanted is None else [wanted])
    if column is None and wanted is not None:
        raise DataError(f"{where} has no column {wanted!r} ({nearest(wanted, names)})")
    if column is not None:
        return column
    raise DataError(f"{where} has no column of {held} that litune knows: name one of {', '.join(names)} with {option}")


def optional_column(where: str, names: Sequence[str], wanted: str, usual: str) -> str | None:
    """The column of splits or languages; None if there is none and none was asked for."""
    column = first_column(names, [wanted])
    if column is None and wanted != usual:
        raise DataError(f"{where} has no column {wanted!r} for --{usual}-column ({nearest(wanted, names)})")
    return column


def first_column(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The first of the wanted columns that there is, spelled so or in another case."""
    lower = {name.lower(): name for name in reversed(names)}
    spelled = (name if name in names else lower.get(name.lower()) for name in wanted)
    return next((name for name in spelled if name is not None), None)


def split_of(name: str) -> str:
    """The split in a file's name, empty if there is none: train-00000-of-00002.parquet, val2017, cc3m-test-{0..3}.tar.

    >>> split_of("train-00000-of-00002.parquet"), split_of("captions_val2017.json"), split_of("00000.tar")
    ('train', 'val', '')
    """
    for word in re.findall("[a-z]+", name.lower()):
        if word in SPLITS:
            return SPLITS[word]
    return ""


def splits_of(files: Sequence[str]) -> list[str]:
    """The splits in the names of files, or of the folders that they are in; empty where not all have one.

    >>> splits_of(["a/train-0.tar", "a/dev-0.tar"]), splits_of(["a/train/0.tar", "a/test/0.tar"])
    (['train', 'val'], ['train', 'test'])
    """
    paths = [PurePosixPath(file) for file in files]
    by_name = [split_of(path.stem) for path in paths]
    by_folder = [SPLITS.get(path.parent.name.lower(), "") for path in paths]
    if all(by_name):
        return by_name
    return by_folder if all(by_folder) and len(set(by_folder)) > 1 else [""] * len(files)


def find_split(wanted: str, known: Collection[str]) -> str | None:
    """The name of a split among those that there are, for one that may be another name of it.

    >>> find_split("val", ["train", "validation"]), find_split("test", ["train", "val"])
    ('validation', None)
    """
    if wanted in known:
        return wanted
    split = SPLITS.get(wanted.lower())
    others = [wanted.lower(), *(name for name in SPLITS if SPLITS[name] == split)]
    lower = {str(name).lower(): name for name in known}
    return next((lower[name] for name in others if name in lower), None)


def each(files: Sequence[str], unit: str) -> Iterator[str]:
    """The files one by one, with a progress bar if there are many."""
    if len(files) < SHOWN_FROM:
        yield from files
        return
    with track("reading", unit, len(files)) as task:
        for file in files:
            yield file
            task.advance(1)


def captions_in(data: bytes, notes: Counter[str]) -> str | list[str] | bytes:
    """The captions in a text file, one on each line; its bytes where it is no text."""
    try:
        text = decode_text(data)
    except UnicodeDecodeError:
        return data
    notes["texts read as Latin-1, not UTF-8"] += is_latin(encoding_of(data))
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    return lines if len(lines) > 1 else text
