"""Which class is which: a task's candidate classes, and which of them are right for each image of a set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from litune.errors import DataError, nearest
from litune.evaluation import class_vectors as prompts
from litune.evaluation.imagenet import imagenet_file, objectnet_truth, real_truth, subset
from litune.evaluation.task import Task, Truth
from litune.pairs.benchmarks import WNID, EvalSet
from litune.prompts import canonicalize


def find_truth(task: Task, images: EvalSet) -> Truth:
    """Candidate classes of a task, and which of them are right for each image of the set.

    Classes are told apart by WordNet id, by number, or by canonicalised name. Raises `DataError` where a class of the
    set is none of the task's.
    """
    rows = np.arange(len(images))
    if task.truth == "objectnet":
        return objectnet_truth(images)
    if task.name.startswith("babel-imagenet"):
        numbers, names, _ = prompts.babel(task.lang)
        of_all, _ = match_classes(replace(task, rename={}), images, prompts.class_names("imagenet1k"))
        place = {number: i for i, number in enumerate(numbers)}
        named = np.flatnonzero(np.isin(of_all[images.labels], numbers))
        if not named.size:
            raise DataError(f"{images.path} has no image of a class with a name in {task.lang}")
        return Truth(names, named, [np.array([place[int(of_all[images.labels[row]])]]) for row in named])
    given = task_names(task)
    if given is None:
        own = [task.rename.get(name, _readable(name)) for name in images.classes]
        return Truth(own, rows, _each(images.labels), "named as in the set")
    names = given
    if task.truth == "real":
        return real_truth(names, images)
    if task.subset:
        candidates = subset(task.subset)
        if not all(WNID.match(name) for name in images.classes):
            names = [names[i] for i in candidates]
        else:
            of_all, _ = match_classes(task, images, names)
            place = {number: i for i, number in enumerate(candidates)}
            strange = [name for name, i in zip(images.classes, of_all, strict=True) if int(i) not in place]
            if strange:
                raise DataError(
                    f"{images.path}: {strange[0]} is not one of the {len(candidates)} classes of {task.subset}"
                )
            to = np.array([place[int(i)] for i in of_all])
            return Truth([names[i] for i in candidates], rows, _each(to[images.labels]))
    to, note = match_classes(task, images, names)
    return Truth(names, rows, _each(to[images.labels]), note)


def task_names(task: Task) -> list[str] | None:
    """The class names that a task brings; None where the set's own count."""
    if isinstance(task.names, str):
        return prompts.class_names(task.names, task.lang or "en")
    return list(task.names) if task.names else None


def match_classes(task: Task, images: EvalSet, names: Sequence[str]) -> tuple[np.ndarray, str]:
    """For each of the set's classes the number of the task's, and how they were told apart."""
    if task.imagenet and all(WNID.match(name) for name in images.classes):
        place = {wnid: i for i, wnid in enumerate(imagenet_file("imagenet_synsets.txt"))}
        return _placed(task, images, place, "WordNet id", list(images.classes))
    if all(name.isdecimal() for name in images.classes):
        place = {str(i): i for i in range(len(names))}
        return _placed(task, images, place, "number", [str(int(name)) for name in images.classes])
    own = [canonicalize(task.rename.get(name, name)) for name in images.classes]
    # The hub's names of ImageNet's classes are lists of synonyms, of which the first is the name.
    place = {canonicalize(name): i for i, name in reversed(list(enumerate(names)))}
    if set(own) <= place.keys() and len(set(own)) == len(own):
        return _placed(task, images, place, "name", own)
    numbered = not images.layout.startswith(("class folders", "images named"))
    if numbered or task.sorted_names:
        # The package's order is that of the original set's classes, as these files number them.
        for first in range(1 + (task.names == "caltech101")):  # whose background is often left out
            same = [place[canonical] == i for i, canonical in enumerate(own, first) if canonical in place]
            if len(own) + first == len(names) and sum(same) >= len(same) / 2:  # else it is another order
                return np.arange(first, len(names)), "matched by position"
    strange = next(
        (name for name, canonical in zip(images.classes, own, strict=True) if canonical not in place), images.classes[0]
    )
    if task.rename:
        raise DataError(
            f"{images.path}: classes: of {task.name} has no entry for {strange!r} "
            f"({nearest(strange, task.rename)}): give one for every class of the set, or leave classes: out"
        )
    raise DataError(
        f"{images.path}: the class {strange!r} is none of the {len(names):,} of {task.name} "
        f"({nearest(canonicalize(strange), place)}): name the folders so, by number or, for ImageNet, by WordNet id"
    )


def _placed(task: Task, images: EvalSet, place: dict[str, int], what: str, own: list[str]) -> tuple[np.ndarray, str]:
    strange = next((name for name, canonical in zip(images.classes, own, strict=True) if canonical not in place), None)
    if strange is not None:
        raise DataError(f"{images.path}: the class {strange} is none of the {len(place):,} of {task.name} by {what}")
    return np.array([place[canonical] for canonical in own], np.int64), f"matched by {what}"


def _each(labels: np.ndarray) -> list[np.ndarray]:
    return list(np.asarray(labels, np.int64)[:, None])


def _readable(name: str) -> str:
    return name.replace("_", " ").replace("/", " ").strip()


def task_templates(task: Task, images: EvalSet) -> tuple[str, ...]:
    """The templates of a dataset: the package's, or those in the set's files."""
    if task.name.startswith("babel-imagenet"):
        return prompts.babel(task.lang)[2]
    if task.templates is None and images.templates:
        return images.templates
    if task.path is not None and task.names != "imagenet1k" and task.templates is None:
        return ("a photo of a {}.",)
    key = task.templates if isinstance(task.templates, str) else task.name
    return prompts.dataset_templates(key, task.lang or "en")


def chance(truth: Truth) -> float:
    """The share of images that a random class is right for."""
    return float(np.mean([len(classes) for classes in truth.accepted]) / len(truth.names))
