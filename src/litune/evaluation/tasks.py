"""The registry of evaluation sets: what each is called, how its classes are named, what was published on it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from litune.errors import ConfigError, DataError, nearest
from litune.evaluation import class_vectors as prompts
from litune.evaluation.published import mismatch, published_shares
from litune.evaluation.result import Result
from litune.pairs.benchmarks import TEST_SPLITS, WNID, EvalSet, Kind, read_set
from litune.prompts import canonicalize, prompted_name

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
        places = [data / name for one in names for name in (one, f"wds_{one}", f"wds_vtab-{one}")] if data else []
        return next((place for place in places if place.exists()), None)

    def read(self, path: Path, *, train: bool = False) -> EvalSet:
        """The set at `path`; its training images, if asked for."""
        splits = ("train", "trainval") if train else self.splits
        found = read_set(path, self.kind, splits=splits, images=self.images, label=self.label)
        return found.in_language(self.lang) if self.kind == "retrieval" and self.lang else found


_TREE = "one folder of images per class, or another layout of docs/evaluation.md"
_IMAGENET = ("imagenet1k", "imagenet", "ILSVRC2012", "imagenet-1k", "imagenet1k-unverified")
_HUB = "clip-benchmark's webdataset shards or the original as class folders"


def _vtab(name: str, get: str, *, names: str | None = None, templates: str | None = None, **more: Any) -> Task:
    return Task(name, get, names=names, templates=templates or name, **more)


_ALL = [
    Task(
        "imagenet1k",
        f"the 50,000 validation images of ILSVRC 2012 in folders of WordNet ids under imagenet1k/val, or {_HUB}",
        names="imagenet1k", folders=_IMAGENET[1:],
    ),
    Task(
        "imagenet-v2", "ImageNetV2 matched-frequency (10,000 images in folders 0 to 999) under imagenet-v2",
        names="imagenet1k", templates="imagenet1k",
        folders=("imagenetv2", "ImageNetV2-matched-frequency", "imagenetv2-matched-frequency-format-val"),
    ),
    Task(
        "imagenet-r", "imagenet-r.tar (30,000 images in 200 folders of WordNet ids) unpacked under imagenet-r",
        names="imagenet1k", templates="imagenet1k", subset="imagenet-r",
    ),
    Task(
        "imagenet-a", "imagenet-a.tar (7,500 images in 200 folders of WordNet ids) unpacked under imagenet-a",
        names="imagenet1k", templates="imagenet1k", subset="imagenet-a",
    ),
    Task(
        "imagenet-sketch", "ImageNet-Sketch (50,889 images in 1,000 folders of WordNet ids) under imagenet-sketch",
        names="imagenet1k", templates="imagenet1k", folders=("imagenet_sketch", "sketch"),
    ),
    Task(
        "objectnet", "ObjectNet unpacked under objectnet: objectnet-1.0/images and mappings, both as they come",
        names="imagenet1k", templates="imagenet1k", truth="objectnet",
    ),
    Task(
        "imagenet-real",
        "the images of imagenet1k, their files called ILSVRC2012_val_00000001 and so on; the labels come with timm",
        names="imagenet1k", templates="imagenet1k", truth="real", folders=_IMAGENET,
    ),
    Task("cifar10", "cifar-10-batches-py (the Python version) under cifar10", folders=("cifar-10-batches-py",)),
    # VTAB, natural
    _vtab("caltech101", f"Caltech 101 under caltech101: {_TREE}", names="caltech101", metric="mean_per_class",
          sorted_names=True, folders=("caltech-101",)),
    _vtab("cifar100", "cifar-100-python (the Python version) under cifar100", folders=("cifar-100-python",)),
    _vtab("dtd", "the Describable Textures dataset under dtd: images and labels as they come, or class folders"),
    _vtab("flowers102", f"Oxford Flowers 102 under flowers102: {_TREE}, the folders called by name or 0 to 101",
          names="flowers", templates="flowers", metric="mean_per_class", folders=("flowers", "oxford_flowers102")),
    _vtab("pets", "Oxford-IIIT Pet under pets: images and annotations as they come, or class folders", names="pets",
          metric="mean_per_class", folders=("oxford-iiit-pet", "oxford_iiit_pet")),
    _vtab("sun397", f"SUN397's test split under sun397: {_TREE}"),
    _vtab("svhn", f"SVHN's test images under svhn: {_TREE}, the folders called 0 to 9", names="svhn"),
    # VTAB, specialized
    _vtab("eurosat", f"EuroSAT (RGB) under eurosat: {_TREE}", names="eurosat", sorted_names=True),
    _vtab("resisc45", f"RESISC45 under resisc45: {_TREE}"),
    _vtab("patch_camelyon", f"PatchCamelyon's test split under patch_camelyon: {_TREE}, the folders called 0 and 1",
          names="pcam", templates="pcam", folders=("pcam",)),
    _vtab("diabetic_retinopathy", f"Diabetic Retinopathy's test split: {_TREE}, the folders called 0 to 4",
          names="diabetic_retinopathy"),
    # VTAB, structured
    _vtab("clevr_count", f"CLEVR's test split by the number of objects: {_TREE}, the folders called 0 (three) to 7",
          names="clevr_count_all", templates="clevr_count_all", folders=("clevr_count_all",)),
    _vtab("clevr_distance", f"CLEVR's test split by the distance of the closest object: {_TREE}, called 0 to 5",
          names="clevr_closest_object_distance", templates="clevr_closest_object_distance",
          folders=("clevr_closest_object_distance",)),
    _vtab("dmlab", f"DMLab's test split under dmlab: {_TREE}, the folders called 0 to 5", names="dmlab"),
    _vtab("kitti_distance", f"KITTI's test split by the distance of the closest vehicle: {_TREE}, called 0 to 3",
          names="kitti_closest_vehicle_distance", templates="kitti_closest_vehicle_distance",
          folders=("kitti_closest_vehicle_distance",)),
    _vtab("dsprites_location", f"dSprites by x position in 16 bins: {_TREE}", templates="dsprites_label_x_position",
          folders=("dsprites_label_x_position",)),
    _vtab("dsprites_orientation", f"dSprites by orientation in 16 bins: {_TREE}",
          templates="dsprites_label_orientation", folders=("dsprites_label_orientation",)),
    _vtab("smallnorb_azimuth", f"SmallNORB by azimuth: {_TREE}", templates="smallnorb_label_azimuth",
          folders=("smallnorb_label_azimuth",)),
    _vtab("smallnorb_elevation", f"SmallNORB by elevation: {_TREE}", templates="smallnorb_label_elevation",
          folders=("smallnorb_label_elevation",)),
    # Retrieval
    Task(
        "coco", "COCO's 2014 images and Karpathy's dataset_coco.json (or coco_test_karpathy.json) under coco",
        kind="retrieval", metric="text_to_image recall@1", splits=("test",), folders=("mscoco_captions", "mscoco"),
    ),
    Task("flickr30k", "Flickr30k's images and dataset_flickr30k.json (or flickr30k_test_karpathy.txt) under flickr30k",
         kind="retrieval", metric="text_to_image recall@1"),
    Task("flickr8k", "Flickr8k's images and dataset_flickr8k.json, captions.csv or captions.txt under flickr8k",
         kind="retrieval", metric="text_to_image recall@1"),
    Task("wit", "a table of images, captions and their languages (column lang) with the images under wit",
         kind="retrieval", metric="text_to_image recall@1"),
    Task("babel-imagenet", "the images of imagenet1k; the names come with the package", names="imagenet1k",
         templates="imagenet1k", folders=_IMAGENET),
]  # fmt: skip

TASKS: dict[str, Task] = {task.name: task for task in _ALL}
GROUPS: dict[str, tuple[str, ...]] = {
    "imagenet": (
        "imagenet1k", "imagenet-v2", "imagenet-r", "imagenet-a", "imagenet-sketch", "objectnet", "imagenet-real",
    ),
    "vtab-natural": ("caltech101", "cifar100", "dtd", "flowers102", "pets", "sun397", "svhn"),
    "vtab-specialized": ("eurosat", "resisc45", "patch_camelyon", "diabetic_retinopathy"),
    "vtab-structured": (
        "clevr_count", "clevr_distance", "dmlab", "kitti_distance", "dsprites_location", "dsprites_orientation",
        "smallnorb_azimuth", "smallnorb_elevation",
    ),
    "retrieval": ("coco", "flickr30k", "flickr8k"),
}  # fmt: skip
GROUPS["vtab"] = GROUPS["vtab-natural"] + GROUPS["vtab-specialized"] + GROUPS["vtab-structured"]


def find_tasks(wanted: Sequence[str], data: Path | None) -> list[Task]:
    """The tasks that are asked for: names, NAME:LANG, groups, YAML files, or `available`: all that are in `data`.

    Raises `ConfigError` for a name that is none or `data` that is no folder, `DataError` for a set that is not there.
    """
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data is {data}, which is no folder: give the one that has the evaluation sets in it")
    found: list[Task] = []
    for word in wanted:
        if word == "available":
            if data is None:
                raise ConfigError("--tasks available looks for sets in --data: give that folder")
            here = [task for task in TASKS.values() if task.find(data) and task.name != "babel-imagenet"]
            if not here:
                raise DataError(
                    f"{data} has no folder with the name of a task, as imagenet1k or coco: see docs/evaluation.md"
                )
            found += here
        elif word.endswith((".yaml", ".yml")):
            found += read_tasks(Path(word))
        elif word in GROUPS:
            found += [TASKS[name] for name in GROUPS[word]]
        else:
            found += _named(word)
    found = list({task.name: task for task in found}.values())
    for task in found:
        if task.find(data) is None:
            if task.path is not None:
                raise DataError(f"the task {task.name} is of {task.path}, which does not exist")
            where = f"not in {data}" if data else "nowhere: give the folder with --data"
            raise DataError(f"the images of {task.name} are {where}; get {task.get}")
    return found


def _named(word: str) -> list[Task]:
    """NAME or NAME:LANG; babel-imagenet without a language is all of its languages."""
    name, _, lang = word.partition(":")
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}: {nearest(name, [*TASKS, *GROUPS, 'available'])}")
    task = TASKS[name]
    if name == "babel-imagenet":
        languages = [lang.upper()] if lang else prompts.babel_languages()
        prompts.babel(languages[0])
        return [replace(task, name=f"{name}:{one}", lang=one) for one in languages]
    _check_lang(task, lang)
    return [replace(task, name=word, lang=lang) if lang else task]


def _check_lang(task: Task, lang: str) -> None:
    if lang and task.kind == "classification" and (not task.imagenet or lang not in prompts.TRANSLATED):
        raise ConfigError(f"{task.name} has no names in {lang!r}: imagenet1k has {', '.join(prompts.TRANSLATED)}")


# A user's own task ---------------------------------------------------------------------------------------------------

YAML_KEYS = {
    "name", "folder", "table", "images", "train", "classes", "templates", "metric", "split", "label", "lang",
    "kind", "task",
}  # fmt: skip


def read_tasks(file: Path) -> list[Task]:
    """The tasks of a YAML file: one mapping, or a list of them. Paths are relative to the file.

    Raises `ConfigError` for what can't be read as a task, naming the nearest known key.
    """
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"there is no file {file}: --tasks takes names of tasks, or a YAML file that is there"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as why:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(why).split())}") from None
    several = content if isinstance(content, list) else [content]
    if not several or not all(isinstance(one, dict) for one in several):
        raise ConfigError(f"{file} must hold a task (name, folder, classes, templates) or a list of tasks")
    found = [_read_task(file, one) for one in several]
    names = [task.name for task in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{file} has several tasks called {twice}: give each a name: of its own")
    return found


def _read_task(file: Path, given: dict[str, Any]) -> Task:
    for key, value in given.items():
        if key not in YAML_KEYS:
            raise ConfigError(f"{file}: a task has no {key!r}: {nearest(str(key), YAML_KEYS)}")
        if value is None:
            raise ConfigError(f"{file}: {key}: is empty: give it a value, or leave it out")
        if key not in ("classes", "templates") and isinstance(value, list | dict):
            raise ConfigError(f"{file}: {key} is {value!r}, it must be one word or path")
    if given.get("task") is not None:  # one of the registry's, elsewhere
        if given["task"] not in TASKS:
            raise ConfigError(f"{file}: there is no task {given['task']!r}: {nearest(str(given['task']), TASKS)}")
        base = TASKS[given["task"]]
    else:
        base = Task(str(given.get("name", file.stem)), f"the images that {file} names")
        if base.name in TASKS:  # figures published for that set would stand beside it
            raise ConfigError(
                f"{file}: {base.name} is a set that litune knows: write task: {base.name}, or name it otherwise"
            )
    name = str(given.get("name", base.name))
    if not name or Path(name).name != name:
        raise ConfigError(f"{file}: the name {name!r} can't be that of a folder: leave out slashes")
    text = {key: str(given[key]) for key in ("folder", "table", "images", "train", "label", "lang") if key in given}
    if ("folder" in text) == ("table" in text):
        raise ConfigError(f"{file}: a task needs folder: FOLDER (class folders, …) or table: FILE, one of both")
    where = file.parent / text.get("folder", text.get("table", ""))
    names, rename = _read_classes(file, given.get("classes"))
    kind = given.get(
        "kind", base.kind if given.get("task") or "folder" in text or names or "label" in text else "retrieval"
    )
    if kind not in ("classification", "retrieval"):
        raise ConfigError(f"{file}: kind is {kind!r}, it must be classification or retrieval")
    templates = given.get("templates")
    templates = (templates,) if isinstance(templates, str) else templates
    if templates is not None and not (isinstance(templates, list | tuple) and templates):
        raise ConfigError(f"{file}: templates is {templates!r}, it must be a list, as in ['a photo of a {{}}.']")
    for one in templates or ():
        if not isinstance(one, str) or one.count("{}") != 1:
            raise ConfigError(f"{file}: the template {one!r} needs exactly one {{}}, as in 'a photo of a {{}}.'")
    figures = ("text_to_image recall@1",) if kind == "retrieval" else ("accuracy", "mean_per_class")
    metric = given.get("metric", base.metric if base.metric in figures else figures[0])
    if metric not in figures:
        raise ConfigError(f"{file}: metric is {metric!r}, of {kind} it must be {' or '.join(figures)}")
    if kind == "classification":
        _check_lang(base, text.get("lang", ""))
    split = given.get("split")
    return replace(
        base,
        name=name,
        kind=kind,
        metric=metric,
        names=names or base.names,
        templates=tuple(templates) if templates else base.templates,
        splits=(str(split),) if split else base.splits,
        lang=text.get("lang", ""),
        path=where,
        train=file.parent / text["train"] if "train" in text else None,
        images=file.parent / text["images"] if "images" in text else None,
        label=text.get("label"),
        rename=rename,
    )


def _read_classes(file: Path, given: Any) -> tuple[tuple[str, ...] | None, dict[str, str]]:
    """A list of class names, or a mapping of the set's own names to those for the prompts."""
    if given is None:
        return None, {}
    names = list(given.values()) if isinstance(given, dict) else given
    if not isinstance(names, list) or not names or any(isinstance(one, dict | list) for one in names):
        raise ConfigError(f"{file}: classes must be a list of names, or FOLDER: NAME on a line each")
    for one in [*names, *given]:
        if one is None or isinstance(one, bool):  # YAML takes yes, no, on and off for these
            raise ConfigError(f"{file}: classes has {one!r}, which YAML takes for no text: put the name in quotes")
    written = [prompted_name(str(one)) for one in names]
    if twice := next((one for one in written if written.count(one) > 1), None):
        raise ConfigError(f"{file}: classes has {twice!r} twice: equal names tie, and each of their images is a miss")
    return tuple(map(str, names)), {str(k): str(v) for k, v in given.items()} if isinstance(given, dict) else {}


# Which class is which ------------------------------------------------------------------------------------------------


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
        return all(len(one) == 1 for one in self.accepted)


@cache
def imagenet_file(name: str) -> list[str]:
    """The lines of one of timm's files on ImageNet, such as its 1,000 WordNet ids in order."""
    return files("timm").joinpath("data", "_info", name).read_text(encoding="utf-8").split()


def find_truth(task: Task, found: EvalSet) -> Truth:
    """Candidate classes of a task, and which of them are right for each image of the set.

    Classes are told apart by WordNet id, by number, or by canonicalised name. Raises `DataError` where a class of the
    set is none of the task's.
    """
    rows = np.arange(len(found))
    if task.truth == "objectnet":
        return _objectnet(task, found)
    if task.name.startswith("babel-imagenet"):
        numbers, names, _ = prompts.babel(task.lang)
        of_all, _ = match_classes(replace(task, rename={}), found, prompts.class_names("imagenet1k"))
        place = {number: i for i, number in enumerate(numbers)}
        kept = np.flatnonzero(np.isin(of_all[found.labels], numbers))
        if not kept.size:
            raise DataError(f"{found.path} has no image of a class with a name in {task.lang}")
        return Truth(names, kept, [np.array([place[int(of_all[found.labels[row]])]]) for row in kept])
    given = task_names(task)
    if given is None:
        own = [task.rename.get(name, _readable(name)) for name in found.classes]
        return Truth(own, rows, _each(found.labels), "named as in the set")
    names = given
    if task.truth == "real":
        return _real(names, found)
    if task.subset:
        candidates = _subset(task.subset)
        if not all(WNID.match(name) for name in found.classes):
            names = [names[i] for i in candidates]
        else:
            of_all, _ = match_classes(task, found, names)
            place = {number: i for i, number in enumerate(candidates)}
            strange = [name for name, i in zip(found.classes, of_all, strict=True) if int(i) not in place]
            if strange:
                raise DataError(
                    f"{found.path}: {strange[0]} is not one of the {len(candidates)} classes of {task.subset}"
                )
            to = np.array([place[int(i)] for i in of_all])
            return Truth([names[i] for i in candidates], rows, _each(to[found.labels]))
    to, note = match_classes(task, found, names)
    return Truth(names, rows, _each(to[found.labels]), note)


def task_names(task: Task) -> list[str] | None:
    """The class names that a task brings; None where the set's own count."""
    if isinstance(task.names, str):
        return prompts.class_names(task.names, task.lang or "en")
    return list(task.names) if task.names else None


def match_classes(task: Task, found: EvalSet, names: Sequence[str]) -> tuple[np.ndarray, str]:
    """For each of the set's classes the number of the task's, and how they were told apart."""
    if task.imagenet and all(WNID.match(name) for name in found.classes):
        place = {wnid: i for i, wnid in enumerate(imagenet_file("imagenet_synsets.txt"))}
        return _placed(task, found, place, "WordNet id", list(found.classes))
    if all(name.isdecimal() for name in found.classes):
        place = {str(i): i for i in range(len(names))}
        return _placed(task, found, place, "number", [str(int(name)) for name in found.classes])
    own = [canonicalize(task.rename.get(name, name)) for name in found.classes]
    # The hub's names of ImageNet's classes are lists of synonyms, of which the first is the name.
    place = {canonicalize(name): i for i, name in reversed(list(enumerate(names)))}
    if set(own) <= place.keys() and len(set(own)) == len(own):
        return _placed(task, found, place, "name", own)
    numbered = not found.layout.startswith(("class folders", "images named"))
    if numbered or task.sorted_names:
        # The package's order is that of the original set's classes, as these files number them.
        for first in range(1 + (task.names == "caltech101")):  # whose background is often left out
            same = [place[one] == i for i, one in enumerate(own, first) if one in place]
            if len(own) + first == len(names) and sum(same) >= len(same) / 2:  # else it is another order
                return np.arange(first, len(names)), "matched by position"
    strange = next((name for name, one in zip(found.classes, own, strict=True) if one not in place), found.classes[0])
    if task.rename:
        raise DataError(
            f"{found.path}: classes: of {task.name} has no entry for {strange!r} "
            f"({nearest(strange, task.rename)}): give one for every class of the set, or leave classes: out"
        )
    raise DataError(
        f"{found.path}: the class {strange!r} is none of the {len(names):,} of {task.name} "
        f"({nearest(canonicalize(strange), place)}): name the folders so, by number or, for ImageNet, by WordNet id"
    )


def _placed(task: Task, found: EvalSet, place: dict[str, int], what: str, own: list[str]) -> tuple[np.ndarray, str]:
    strange = next((name for name, one in zip(found.classes, own, strict=True) if one not in place), None)
    if strange is not None:
        raise DataError(f"{found.path}: the class {strange} is none of the {len(place):,} of {task.name} by {what}")
    return np.array([place[one] for one in own], np.int64), f"matched by {what}"


def _each(labels: np.ndarray) -> list[np.ndarray]:
    return list(np.asarray(labels, np.int64)[:, None])


def _subset(name: str) -> list[int]:
    place = {wnid: i for i, wnid in enumerate(imagenet_file("imagenet_synsets.txt"))}
    return [place[wnid] for wnid in sorted(imagenet_file(f"{name.replace('-', '_')}_synsets.txt"))]


def _readable(name: str) -> str:
    return name.replace("_", " ").replace("/", " ").strip()


def _real(names: list[str], found: EvalSet) -> Truth:
    """ReaL's label sets by the number in the file's name; images without labels are dropped."""
    file = found.path / "real.json"
    if file.is_file():
        labels = json.loads(file.read_text(encoding="utf-8"))
    else:
        labels = json.loads(files("timm").joinpath("data", "_info", "imagenet_real_labels.json").read_text())
    rows, accepted = [], []
    for row, key in enumerate(found.keys):
        number = re.search(r"ILSVRC2012_val_(\d{8})", key)
        if number is None or not 0 < int(number[1]) <= len(labels):
            raise DataError(
                f"{found.path}: {key} is not called ILSVRC2012_val_ and a number, by which ReaL's labels go"
            )
        if own := labels[int(number[1]) - 1]:
            rows.append(row)
            accepted.append(np.array(sorted(own), np.int64))
    if not rows:
        raise DataError(f"{found.path} has no image with a label of ReaL")
    return Truth(names, np.array(rows), accepted, f"{len(found) - len(rows):,} images without labels dropped")


def _objectnet(task: Task, found: EvalSet) -> Truth:
    """ObjectNet's classes that overlap ImageNet's, by the mappings that come with it; other images are dropped."""
    folders = [found.path / "mappings", found.path, *found.path.glob("*/mappings")]
    folder = next((one for one in folders if (one / "objectnet_to_imagenet_1k.json").is_file()), None)
    if folder is None:
        raise DataError(f"{found.path} has no mappings/objectnet_to_imagenet_1k.json: unpack all of ObjectNet there")
    try:
        called = json.loads((folder / "folder_to_objectnet_label.json").read_text(encoding="utf-8"))
        maps = json.loads((folder / "objectnet_to_imagenet_1k.json").read_text(encoding="utf-8"))
        ours = json.loads((folder / "pytorch_to_imagenet_2012_id.json").read_text(encoding="utf-8"))
        theirs = (folder / "imagenet_to_label_2012_v2").read_text(encoding="utf-8").splitlines()
        to_ours = {theirs[line].strip(): int(number) for number, line in ours.items()}
        numbers = {name: sorted({to_ours[one.strip()] for one in many.split(";")}) for name, many in maps.items()}
    except (OSError, ValueError, KeyError, IndexError) as why:
        raise DataError(f"{folder} has not the mappings of ObjectNet ({why!r}): unpack them again") from None
    candidates = sorted({one for many in numbers.values() for one in many})
    place = {number: i for i, number in enumerate(candidates)}
    by_class = [numbers.get(called.get(name, name), []) for name in found.classes]
    rows = np.flatnonzero([bool(by_class[label]) for label in found.labels])
    if not rows.size:
        raise DataError(f"{found.path} has no image of a class that ImageNet has, too")
    accepted = [np.array([place[one] for one in by_class[found.labels[row]]]) for row in rows]
    names = prompts.class_names("imagenet1k")
    note = f"{len(numbers)} classes that map to {len(candidates)} of ImageNet's, which are the candidates"
    return Truth([names[i] for i in candidates], rows, accepted, note)


def task_templates(task: Task, found: EvalSet) -> tuple[str, ...]:
    """The templates of a dataset: the package's, or those in the set's files."""
    if task.name.startswith("babel-imagenet"):
        return prompts.babel(task.lang)[2]
    if task.templates is None and found.templates:
        return found.templates
    if task.path is not None and task.names != "imagenet1k" and task.templates is None:
        return ("a photo of a {}.",)
    key = task.templates if isinstance(task.templates, str) else task.name
    return prompts.dataset_templates(key, task.lang or "en")


def chance(truth: Truth) -> float:
    """The share of images that a random class is right for."""
    return float(np.mean([len(one) for one in truth.accepted]) / len(truth.names))


def group_means(results: Sequence[Result]) -> dict[str, Any]:
    """The mean accuracy over each group of VTAB whose sets all are among the results, with the published ones."""
    values = {one.task: one.values["accuracy"] for one in results if "accuracy" in one.values}
    found: dict[str, Any] = {}
    for group, names in GROUPS.items():
        if group.startswith("vtab") and all(name in values for name in names):
            mean = float(np.mean([values[name] for name in names]))
            reference = {system: row["accuracy"] for system, row in published_shares(group).items()}
            differing = [one.task for one in results if reference and one.task in names and mismatch(one)]
            note = f"not comparable with what was published: other images or prompts of {', '.join(differing)}"
            found[group] = {
                "mean": mean, "sets": len(names), "published": reference, "note": note if differing else "",
            }  # fmt: skip
    return found
