"""Annotations in one JSON file: COCO's captions and Karpathy's splits (dataset_flickr8k.json)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from litune.errors import DataError
from litune.pairs.address import open_text
from litune.pairs.reference import first_line
from litune.pairs.sample import Damage, Options, Sample, SampleSource, split_of
from litune.pairs.tables import image_base, join

PATTERNS = ("captions_*.json", "dataset_*.json", "annotations/captions_*.json", "annotations/dataset_*.json")


def annotation_files(folder: Path) -> list[str]:
    """Files in a folder that are named as COCO's or Karpathy's are."""
    matches = (str(file) for pattern in PATTERNS for file in folder.glob(pattern))
    return sorted(file for file in matches if is_annotation(file))


def is_annotation(file: str) -> bool:
    """Whether a file is named as COCO's or Karpathy's are."""
    hub = PurePosixPath(file).match("dataset_info*.json")  # Hugging Face's own description of a dataset
    return not hub and any(PurePosixPath(file).match(pattern) for pattern in PATTERNS)


def annotation_source(files: Sequence[str], options: Options) -> SampleSource:
    """The images and captions of annotation files; each of several files is a split."""
    kinds: dict[str, int] = {}

    def read() -> Iterator[Sample | Damage]:
        for file in files:
            kind, samples = read_annotations(file, options, split_of(PurePosixPath(file).stem) * (len(files) > 1))
            kinds[kind] = kinds.get(kind, 0) + 1
            names = [sample.path for sample in samples if isinstance(sample, Sample)]
            base = image_base(file, options.images, names) if names else ""
            for sample in samples:
                if isinstance(sample, Sample):
                    sample.path = join(base, sample.path)
                yield sample

    def about(_: int) -> str:
        return f"{' and '.join(kinds)} captions in {', '.join(PurePosixPath(file).name for file in files)}"

    return SampleSource(about, read(), name=files[0], takes=("images",))


def read_annotations(file: str, options: Options, split: str = "") -> tuple[str, list[Sample | Damage]]:
    """Whose annotations these are, and each image with its captions; its path is its name in the file.

    COCO's say no split, and get the one that is given. Raises `DataError` where the file is neither.
    """
    content = _load(file)
    if _is_karpathy(content):
        return "Karpathy's", list(_read_karpathy(file, content, options))
    return "COCO's", list(_read_coco(file, content, options, split))


def _load(file: str) -> dict[str, Any]:
    try:
        with open_text(file) as opened:
            content = json.load(opened)
    except (ValueError, RecursionError, OSError) as why:
        raise DataError(f"{file} can't be read as JSON: {first_line(why)}") from None
    if not isinstance(content, dict) or not isinstance(content.get("images"), list):
        raise DataError(f"{file} has no list of images: expected COCO's captions, Karpathy's splits, or a list of rows")
    return content


def _is_karpathy(content: dict[str, Any]) -> bool:
    images = content["images"]
    return bool(images) and isinstance(images[0], dict) and "sentences" in images[0]


def _read_coco(file: str, content: dict[str, Any], options: Options, split: str) -> Iterator[Sample | Damage]:
    short = PurePosixPath(file).name
    images: list[Any] = content["images"]
    captions: dict[Any, list[Any]] = defaultdict(list)
    annotations = content.get("annotations")
    for i, annotation in enumerate(annotations if isinstance(annotations, list) else []):
        if (
            isinstance(annotation, dict)
            and isinstance(annotation.get("image_id"), (int, str))
            and "caption" in annotation
        ):
            captions[annotation["image_id"]].append(annotation["caption"])
        else:
            yield Damage(f"annotation {i + 1} of {short}", "it has no image_id and caption")
    ids: set[Any] = set()
    for i, image in enumerate(images):
        where = f"image {i + 1} of {short}"
        image_id = image.get("id") if isinstance(image, dict) else None
        if (
            not isinstance(image, dict)
            or not isinstance(image.get("file_name"), str)
            or not isinstance(image_id, (int, str))
        ):
            yield Damage(where, "it has no id and file_name")
            continue
        ids.add(image_id)
        extra = {name: image[name] for name in options.kept if name in image}
        texts = {"caption": captions[image_id]} if image_id in captions else {}
        yield Sample(
            f"{where} ({image['file_name']})",
            image["file_name"],
            image["file_name"],
            texts,
            "",
            split,
            extra=extra,
        )
    for image_id in captions.keys() - ids:
        yield Damage(f"captions of image {image_id} in {short}", "there is no such image in the file")


def _read_karpathy(file: str, content: dict[str, Any], options: Options) -> Iterator[Sample | Damage]:
    for i, image in enumerate(content["images"]):
        where = f"image {i + 1} of {PurePosixPath(file).name}"
        if not isinstance(image, dict) or not isinstance(image.get("filename"), str):
            yield Damage(where, "it has no filename")
            continue
        folder = image.get("filepath")
        name = f"{folder}/{image['filename']}" if isinstance(folder, str) and folder else image["filename"]
        sentences = image.get("sentences")
        raw = [s.get("raw") if isinstance(s, dict) else s for s in sentences] if isinstance(sentences, list) else None
        split = image.get("split")
        extra = {column: image[column] for column in options.kept if column in image}
        yield Sample(f"{where} ({name})", name, name, {"sentences": raw}, "", split or "", extra=extra)
