"""Which tasks are asked for, by name, group, language or file; and the means over groups of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from litune.errors import ConfigError, DataError, nearest
from litune.evaluation import class_vectors as prompts
from litune.evaluation.published import mismatch, published_shares
from litune.evaluation.registry import GROUPS, TASKS, check_lang
from litune.evaluation.result import Result
from litune.evaluation.task import Task
from litune.evaluation.task_files import read_tasks


def find_tasks(wanted: Sequence[str], data: Path | None) -> list[Task]:
    """The tasks that are asked for: names, NAME:LANG, groups, YAML files, or `available`: all that are in `data`.

    Raises `ConfigError` for a name that is none or `data` that is no folder, `DataError` for a set that is not there.
    """
    if data is not None and not data.is_dir():
        raise ConfigError(f"--data is {data}, which is no folder: give the one that has the evaluation sets in it")
    tasks: list[Task] = []
    for word in wanted:
        if word == "available":
            if data is None:
                raise ConfigError("--tasks available looks for sets in --data: give that folder")
            here = [task for task in TASKS.values() if task.find(data) and task.name != "babel-imagenet"]
            if not here:
                raise DataError(
                    f"{data} has no folder with the name of a task, as imagenet1k or coco: see docs/evaluation.md"
                )
            tasks += here
        elif word.endswith((".yaml", ".yml")):
            tasks += read_tasks(Path(word))
        elif word in GROUPS:
            tasks += [TASKS[name] for name in GROUPS[word]]
        else:
            tasks += _named(word)
    tasks = list({task.name: task for task in tasks}.values())
    for task in tasks:
        if task.find(data) is None:
            if task.path is not None:
                raise DataError(f"the task {task.name} is of {task.path}, which does not exist")
            where = f"not in {data}" if data else "nowhere: give the folder with --data"
            raise DataError(f"the images of {task.name} are {where}; get {task.get}")
    return tasks


def _named(word: str) -> list[Task]:
    """NAME or NAME:LANG; babel-imagenet without a language is all of its languages."""
    name, _, lang = word.partition(":")
    if name not in TASKS:
        raise ConfigError(f"there is no task {name!r}: {nearest(name, [*TASKS, *GROUPS, 'available'])}")
    task = TASKS[name]
    if name == "babel-imagenet":
        languages = [lang.upper()] if lang else prompts.babel_languages()
        prompts.babel(languages[0])
        return [replace(task, name=f"{name}:{code}", lang=code) for code in languages]
    check_lang(task, lang)
    return [replace(task, name=word, lang=lang) if lang else task]


def group_means(results: Sequence[Result]) -> dict[str, Any]:
    """The mean accuracy over each group of VTAB whose sets all are among the results, with the published ones."""
    values = {result.task: result.values["accuracy"] for result in results if "accuracy" in result.values}
    means: dict[str, Any] = {}
    for group, names in GROUPS.items():
        if group.startswith("vtab") and all(name in values for name in names):
            mean = float(np.mean([values[name] for name in names]))
            reference = {system: row["accuracy"] for system, row in published_shares(group).items()}
            differing = [result.task for result in results if reference and result.task in names and mismatch(result)]
            note = f"not comparable with what was published: other images or prompts of {', '.join(differing)}"
            means[group] = {
                "mean": mean, "sets": len(names), "published": reference, "note": note if differing else "",
            }  # fmt: skip
    return means
