"""A task: an evaluation set, how its classes are named, which figure is its headline; and what is right in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from litune.pairs.benchmarks import TEST_SPLITS, EvalSet, Kind, read_set

Metric = Literal["accuracy", "mean_per_class", "text_to_image recall@1"]


@dataclass(frozen=True)
class Task:
    """An evaluation set of the registry, or one that the user wrote down."""

    name: str
    get: str
    """What to get and where to put it, in one line."""
    kind: Kind = "classification"
    metric: Metric = "accuracy"
    names: str | tuple[str, ...] | None = None
    """The class names, or where the package has them; None: the set's own."""
    templates: str | tuple[str, ...] | None = None
    """The templates, or where the package has them, if not under the task's name."""
    subset: Literal["", "imagenet-a", "imagenet-r"] = ""
    """Only these of ImageNet's classes are candidates."""
    truth: Literal["own", "real", "objectnet"] = "own"
    """Which classes count as right: the image's own, ReaL's label set, or those that ObjectNet's class maps to."""
    sorted_names: bool = False
    """Whether the class names are in the order of the set's sorted folders, which are called otherwise."""
    folders: tuple[str, ...] = ()
    """Other names of the folder in --data."""
    splits: tuple[str, ...] = TEST_SPLITS
    lang: str = ""
    # A user's own
    path: Path | None = None
    train: Path | None = None
    images: Path | None = None
    label: str | None = None
    rename: dict[str, str] = field(default_factory=dict)
    """The set's own name of a class → the name for the prompts."""

    @property
    def imagenet(self) -> bool:
        """Whether its classes are ImageNet's, so that WordNet ids say which is which."""
        return self.names == "imagenet1k"

    def find(self, data: Path | None) -> Path | None:
        """Where the set is; None where it is not there."""
        if self.path is not None:
            return self.path if self.path.exists() else None
        names = [self.name.partition(":")[0], *self.folders]
        places = [data / f"{before}{name}" for name in names for before in ("", "wds_", "wds_vtab-")] if data else []
        return next((place for place in places if place.exists()), None)

    def read(self, path: Path, *, train: bool = False) -> EvalSet:
        """The set at `path`; its training images, if asked for."""
        splits = ("train", "trainval") if train else self.splits
        images = read_set(path, self.kind, splits=splits, images=self.images, label=self.label)
        return images.in_language(self.lang) if self.kind == "retrieval" and self.lang else images


@dataclass(frozen=True)
class Truth:
    """What is right for each of B images, among C candidate classes.

    `accepted` [B] has the classes that count as right; `rows` [B] are the images of the set that have some.
    """

    names: list[str]
    rows: np.ndarray
    accepted: list[np.ndarray]
    note: str = ""

    @property
    def single(self) -> bool:
        """Whether every image has one class."""
        return all(len(classes) == 1 for classes in self.accepted)
