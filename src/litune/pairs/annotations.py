"""Annotations in one JSON file: COCO's captions and Karpathy's splits (dataset_flickr8k.json)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from litune.errors import DataError
from litune.pairs.address import open_file
from litune.pairs.reference import first_line
from litune.pairs.sample import Damage, Options, Sample, Source, split_of
from litune.pairs.tables import image_base, join

PATTERNS = ("captions_*.json", "dataset_*.json", "annotations/captions_*.json", "annotations/dataset_*.json")


def annotation_files(folder: Path) -> list[str]:
    """Files in a folder that are named as COCO's or Karpathy's are."""
    found = (str(file) for pattern in PATTERNS for file in folder.glob(pattern))
    return sorted(file for file in found if is_annotation(file))


def is_annotation(file: str) -> bool:
    """Whether a file is named as COCO's or Karpathy's are."""
    hub = PurePosixPath(file).match("dataset_info*.json")  # what Hugging Face's datasets say of themselves
    return not hub and any(PurePosixPath(file).match(pattern) for pattern in PATTERNS)


def annotation_source(files: Sequence[str], options: Options) -> Source:
    """The images and captions of such files; several are a split each."""
    kinds: dict[str, int] = {}

    def read() -> Iterator[Sample | Damage]:
        for file in files:
            facts = _load(file)
            kind = "Karpathy's" if _is_karpathy(facts) else "COCO's"
            kinds[kind] = kinds.get(kind, 0) + 1
            if kind == "COCO's":
                yield from _read_coco(
                    file, facts, options, split_of(PurePosixPath(file).stem) if len(files) > 1 else ""
                )
            else:
                yield from _read_karpathy(file, facts, options)

    def about(_: int) -> str:
        return f"{' and '.join(kinds)} captions in {', '.join(PurePosixPath(file).name for file in files)}"

    return Source(about, read(), name=files[0])


def _load(file: str) -> dict[str, Any]:
    try:
        with open_file(file) as opened:
            found = json.loads(opened.read().decode("utf-8-sig"))
    except (ValueError, RecursionError, OSError) as why:
        raise DataError(f"{file} can't be read as JSON: {first_line(why)}") from None
    if not isinstance(found, dict) or not isinstance(found.get("images"), list):
        raise DataError(f"{file} has no list of images: expected COCO's captions, Karpathy's splits, or a list of rows")
    return found


def _is_karpathy(facts: dict[str, Any]) -> bool:
    images = facts["images"]
    return bool(images) and isinstance(images[0], dict) and "sentences" in images[0]


def _read_coco(file: str, facts: dict[str, Any], options: Options, split: str) -> Iterator[Sample | Damage]:
    short = PurePosixPath(file).name
    images: list[Any] = facts["images"]
    captions: dict[Any, list[Any]] = defaultdict(list)
    annotations = facts.get("annotations")
    for i, one in enumerate(annotations if isinstance(annotations, list) else []):
        if isinstance(one, dict) and isinstance(one.get("image_id"), (int, str)) and "caption" in one:
            captions[one["image_id"]].append(one["caption"])
        else:
            yield Damage(f"annotation {i + 1} of {short}", "it has no image_id and caption")
    names = [one["file_name"] for one in images if isinstance(one, dict) and isinstance(one.get("file_name"), str)]
    base = image_base(file, options.images, names) if names else ""
    known: set[Any] = set()
    for i, one in enumerate(images):
        where = f"image {i + 1} of {short}"
        number = one.get("id") if isinstance(one, dict) else None
        if not isinstance(one, dict) or not isinstance(one.get("file_name"), str) or not isinstance(number, (int, str)):
            yield Damage(where, "it has no id and file_name")
            continue
        known.add(number)
        extra = {name: one[name] for name in options.kept if name in one}
        texts = {"caption": captions[number]} if number in captions else {}
        yield Sample(
            f"{where} ({one['file_name']})",
            one["file_name"],
            join(base, one["file_name"]),
            texts,
            "",
            split,
            extra=extra,
        )
    for number in captions.keys() - known:
        yield Damage(f"captions of image {number} in {short}", "there is no such image in the file")


def _read_karpathy(file: str, facts: dict[str, Any], options: Options) -> Iterator[Sample | Damage]:
    rows: list[tuple[str, str, dict[str, Any]]] = []
    for i, one in enumerate(facts["images"]):
        where = f"image {i + 1} of {PurePosixPath(file).name}"
        if not isinstance(one, dict) or not isinstance(one.get("filename"), str):
            yield Damage(where, "it has no filename")
            continue
        folder = one.get("filepath")
        rows.append((where, f"{folder}/{one['filename']}" if isinstance(folder, str) else one["filename"], one))
    base = image_base(file, options.images, [name for _, name, _ in rows]) if rows else ""
    for where, name, one in rows:
        sentences = one.get("sentences")
        raw = [s.get("raw") if isinstance(s, dict) else s for s in sentences] if isinstance(sentences, list) else None
        split = one.get("split")
        extra = {column: one[column] for column in options.kept if column in one}
        yield Sample(f"{where} ({name})", name, join(base, name), {"sentences": raw}, "", split or "", extra=extra)
