"""A user's own tasks, written down in YAML."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from litune.errors import ConfigError, nearest
from litune.evaluation.registry import TASKS, check_lang
from litune.evaluation.task import Task
from litune.files import read_text
from litune.prompts import prompted_name, read_list

YAML_KEYS = {
    "name", "folder", "table", "images", "train", "classes", "templates", "metric", "split", "label", "lang",
    "kind", "task",
}  # fmt: skip


def read_tasks(file: Path) -> list[Task]:
    """The tasks of a YAML file: one mapping, or a list of them. Paths are relative to the file.

    Raises `ConfigError` for what can't be read as a task, naming the nearest known key.
    """
    try:
        content = yaml.safe_load(read_text(file))
    except FileNotFoundError:
        raise ConfigError(
            f"there is no file {file}: --tasks takes names of tasks, or a YAML file that is there"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as why:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(why).split())}") from None
    several = content if isinstance(content, list) else [content]
    if not several or not all(isinstance(mapping, dict) for mapping in several):
        raise ConfigError(f"{file} must hold a task (name, folder, classes, templates) or a list of tasks")
    tasks = [_read_task(file, mapping) for mapping in several]
    names = [task.name for task in tasks]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"{file} has several tasks called {twice}: give each a name: of its own")
    return tasks


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
    names, rename = _read_classes(file, _listed(file, given.get("classes")))
    kind = given.get(
        "kind", base.kind if given.get("task") or "folder" in text or names or "label" in text else "retrieval"
    )
    if kind not in ("classification", "retrieval"):
        raise ConfigError(f"{file}: kind is {kind!r}, it must be classification or retrieval")
    templates = _listed(file, given.get("templates"))
    templates = (templates,) if isinstance(templates, str) else templates
    if templates is not None and not (isinstance(templates, list | tuple) and templates):
        raise ConfigError(f"{file}: templates is {templates!r}, it must be a list, as in ['a photo of a {{}}.']")
    for template in templates or ():
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ConfigError(f"{file}: the template {template!r} needs exactly one {{}}, as in 'a photo of a {{}}.'")
    figures = ("text_to_image recall@1",) if kind == "retrieval" else ("accuracy", "mean_per_class")
    metric = given.get("metric", base.metric if base.metric in figures else figures[0])
    if metric not in figures:
        raise ConfigError(f"{file}: metric is {metric!r}, of {kind} it must be {' or '.join(figures)}")
    if kind == "classification":
        check_lang(base, text.get("lang", ""))
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


def _listed(file: Path, given: Any) -> Any:
    """What a task gives, or the lines of the text file (.txt) that it names."""
    return read_list(str(file.parent / given)) if isinstance(given, str) and given.lower().endswith(".txt") else given


def _read_classes(file: Path, given: Any) -> tuple[tuple[str, ...] | None, dict[str, str]]:
    """A list of class names, or a mapping of the set's own names to those for the prompts."""
    if given is None:
        return None, {}
    names = list(given.values()) if isinstance(given, dict) else given
    if not isinstance(names, list) or not names or any(isinstance(name, dict | list) for name in names):
        raise ConfigError(f"{file}: classes must be a list of names, or FOLDER: NAME on a line each")
    for name in [*names, *given]:
        if name is None or isinstance(name, bool):  # YAML takes yes, no, on and off for these
            raise ConfigError(f"{file}: classes has {name!r}, which YAML takes for no text: put the name in quotes")
    written = [prompted_name(str(name)) for name in names]
    if twice := next((name for name in written if written.count(name) > 1), None):
        raise ConfigError(f"{file}: classes has {twice!r} twice: equal names tie, and each of their images is a miss")
    return tuple(map(str, names)), {str(k): str(v) for k, v in given.items()} if isinstance(given, dict) else {}
