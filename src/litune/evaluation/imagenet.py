"""ImageNet's relatives: subsets of its classes, ReaL's labels of its images, ObjectNet's classes among its own."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib.resources import files

import numpy as np

from litune.errors import DataError
from litune.evaluation.class_vectors import class_names
from litune.evaluation.task import Truth
from litune.files import read_text
from litune.pairs.benchmarks import EvalSet


@cache
def imagenet_file(name: str) -> list[str]:
    """The lines of one of timm's files on ImageNet, such as its 1,000 WordNet ids in order."""
    return files("timm").joinpath("data", "_info", name).read_text(encoding="utf-8").split()


def subset(name: str) -> list[int]:
    """The numbers of the classes of imagenet-a or imagenet-r among ImageNet's, by WordNet id."""
    place = {wnid: i for i, wnid in enumerate(imagenet_file("imagenet_synsets.txt"))}
    return [place[wnid] for wnid in sorted(imagenet_file(f"{name.replace('-', '_')}_synsets.txt"))]


def real_truth(names: list[str], images: EvalSet) -> Truth:
    """ReaL's label sets by the number in the file's name; images without labels are dropped."""
    file = images.path / "real.json"
    if file.is_file():
        labels = json.loads(read_text(file))
    else:
        labels = json.loads(files("timm").joinpath("data", "_info", "imagenet_real_labels.json").read_text())
    rows, accepted = [], []
    for row, key in enumerate(images.keys):
        number = re.search(r"ILSVRC2012_val_(\d{8})", key)
        if number is None or not 0 < int(number[1]) <= len(labels):
            raise DataError(
                f"{images.path}: {key} is not called ILSVRC2012_val_ and a number, by which ReaL's labels go"
            )
        if own := labels[int(number[1]) - 1]:
            rows.append(row)
            accepted.append(np.array(sorted(own), np.int64))
    if not rows:
        raise DataError(f"{images.path} has no image with a label of ReaL")
    return Truth(names, np.array(rows), accepted, f"{len(images) - len(rows):,} images without labels dropped")


def objectnet_truth(images: EvalSet) -> Truth:
    """ObjectNet's classes that overlap ImageNet's, by the mappings that come with it; other images are dropped."""
    folders = [images.path / "mappings", images.path, *images.path.glob("*/mappings")]
    folder = next((path for path in folders if (path / "objectnet_to_imagenet_1k.json").is_file()), None)
    if folder is None:
        raise DataError(f"{images.path} has no mappings/objectnet_to_imagenet_1k.json: unpack all of ObjectNet there")
    try:
        called = json.loads(read_text(folder / "folder_to_objectnet_label.json"))
        maps = json.loads(read_text(folder / "objectnet_to_imagenet_1k.json"))
        ours = json.loads(read_text(folder / "pytorch_to_imagenet_2012_id.json"))
        theirs = read_text(folder / "imagenet_to_label_2012_v2").splitlines()
        to_ours = {theirs[line].strip(): int(number) for number, line in ours.items()}
        numbers = {name: sorted({to_ours[number.strip()] for number in many.split(";")}) for name, many in maps.items()}
    except (OSError, ValueError, KeyError, IndexError) as why:
        raise DataError(f"{folder} has not the mappings of ObjectNet ({why!r}): unpack them again") from None
    candidates = sorted({number for many in numbers.values() for number in many})
    place = {number: i for i, number in enumerate(candidates)}
    by_class = [numbers.get(called.get(name, name), []) for name in images.classes]
    rows = np.flatnonzero([bool(by_class[label]) for label in images.labels])
    if not rows.size:
        raise DataError(f"{images.path} has no image of a class that ImageNet has, too")
    accepted = [np.array([place[number] for number in by_class[images.labels[row]]]) for row in rows]
    names = class_names("imagenet1k")
    note = f"{len(numbers)} classes that map to {len(candidates)} of ImageNet's, which are the candidates"
    return Truth([names[i] for i in candidates], rows, accepted, note)
