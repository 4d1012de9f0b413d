"""Results of several runs, put side by side: every figure with its interval, and paired differences."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from litune.errors import DataError
from litune.evaluation.confusion import confusion
from litune.evaluation.intervals import interval, paired
from litune.evaluation.published import note, published
from litune.evaluation.result import Result

PER_CLASS = "mean_per_class"
MOST_CLASSES = 5000
"""With more classes, confusions are neither counted nor drawn: they would take gigabytes."""


@dataclass(frozen=True)
class Figure:
    """One figure of one run: its value, interval and chance, as shares of one; None where there is no such number."""

    value: float
    low: float | None
    high: float | None
    chance: float | None
    examples: int


@dataclass(frozen=True)
class Entry:
    """One task (in one language) of one run."""

    result: Result
    figures: dict[str, Figure]
    counts: np.ndarray | None
    """The confusion counts [C, C] of a classification."""
    stem: str
    """The stem of its files' names."""


@dataclass(frozen=True)
class Difference:
    """A figure of `run` minus that of `base` on the same examples, with its paired interval."""

    task: str
    figure: str
    run: str
    base: str
    value: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Report:
    """Everything that a written report shows."""

    runs: dict[str, dict[str, Entry]]
    """Run → task (with its language) → entry."""
    differences: list[Difference]
    not_paired: list[str]
    """Tasks whose examples are not the same in all runs."""

    @property
    def tasks(self) -> list[str]:
        """All tasks, in the order of the first run that has them."""
        return list(dict.fromkeys(task for entries in self.runs.values() for task in entries))

    @property
    def all_entries(self) -> Iterable[Entry]:
        """The entries of all runs."""
        return (entry for entries in self.runs.values() for entry in entries.values())

    def entries(self, task: str) -> dict[str, Entry]:
        """Run → entry of one task."""
        return {run: entries[task] for run, entries in self.runs.items() if task in entries}


def collect(runs: dict[str, list[Result]]) -> Report:
    """All figures with their intervals, and the paired differences to the first run."""
    entries: dict[str, dict[str, Entry]] = {}
    stems: set[str] = set()
    for run, results in runs.items():
        entries[run] = {}
        for result in results:
            _check(result)
            stem = _unused(f"{result.task}-{result.lang}-{run}" if result.lang else f"{result.task}-{run}", stems)
            entries[run][title(result)] = Entry(result, figures(result), _counts(result), stem)
    differences, not_paired = compare(entries)
    return Report(entries, differences, not_paired)


def title(result: Result) -> str:
    """A task's name, with its language."""
    return f"{result.task} ({result.lang})" if result.lang else result.task


def _unused(name: str, taken: set[str]) -> str:
    """A name for files, made of plain characters and not taken yet."""
    stem = base = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "task"
    number = 2
    while stem.lower() in taken:
        stem, number = f"{base}-{number}", number + 1
    taken.add(stem.lower())
    return stem


def _check(result: Result) -> None:
    if result.metric not in result.values:
        raise DataError(f"{result.task} has no figure {result.metric!r}, which it is to be measured by")
    for name, outcomes in result.outcomes.items():
        groups = result.groups.get(name, outcomes)
        if len(groups) != len(outcomes):
            raise DataError(f"{result.task}: {name} has {len(outcomes):,} outcomes and {len(groups):,} groups")


def figures(result: Result) -> dict[str, Figure]:
    """Every figure with its interval, where its examples' outcomes are known."""
    by_name = {}
    for name, value in result.values.items():
        outcomes = result.outcomes.get(name)
        low = high = None
        if outcomes is not None:
            low, high = interval(outcomes, result.groups.get(name), per_class(name))
        examples = result.images if outcomes is None else len(outcomes)
        by_name[name] = Figure(value, low, high, result.chance.get(name), examples)
    return by_name


def per_class(figure: str) -> bool:
    """Whether a figure is the mean of its groups' means."""
    return figure.endswith(PER_CLASS)


def _counts(result: Result) -> np.ndarray | None:
    if result.labels is None or result.predicted is None or not 0 < len(result.class_names) <= MOST_CLASSES:
        return None
    return confusion(result.labels, result.predicted, len(result.class_names))


def compare(runs: dict[str, dict[str, Entry]]) -> tuple[list[Difference], list[str]]:
    """Paired differences of every run's figures to the first run's, and the tasks where examples differ."""
    (base, first), *others = runs.items()
    differences, unequal = [], []
    for run, entries in others:
        for task, entry in entries.items():
            if task not in first:
                continue
            a, b = entry.result, first[task].result
            if not same_examples(a, b):
                unequal.append(task)
                continue
            for figure in a.outcomes.keys() & b.outcomes.keys() & a.values.keys():
                pair = paired(a.outcomes[figure], b.outcomes[figure], a.groups.get(figure), per_class(figure))
                differences.append(Difference(task, figure, run, base, pair["difference"], pair["low"], pair["high"]))
    order = {name: i for entries in runs.values() for entry in entries.values() for i, name in enumerate(entry.figures)}
    differences.sort(key=lambda difference: (list(first).index(difference.task), order.get(difference.figure, 0)))
    return differences, list(dict.fromkeys(unequal))


def same_examples(a: Result, b: Result) -> bool:
    """Whether two results are of the same images and captions, in the same order."""
    if a.keys != b.keys or a.captions != b.captions or a.class_names != b.class_names:
        return False
    both = a.outcomes.keys() & b.outcomes.keys()
    return all(len(a.outcomes[name]) == len(b.outcomes[name]) for name in both)


def warning(entry: Entry) -> str:
    """The warning that evaluation images were tuned on, or ""."""
    return str(entry.result.extras.get("contamination", {}).get("warning", ""))


def headlines(report: Report) -> list[tuple[str, str]]:
    """The columns of the summary: task and figure; recall@1 in both directions for a retrieval."""
    columns = []
    for task in report.tasks:
        entry = next(iter(report.entries(task).values()))
        both = [f for f in ("text_to_image recall@1", "image_to_text recall@1") if f in entry.figures]
        metric = entry.result.metric
        columns += [(task, f) for f in (both if metric in both else [metric])]
    return columns


def published_percent(report: Report, task: str, figure: str) -> dict[str, float]:
    """System → published percent, for a column of the summary."""
    result = next(iter(report.entries(task).values())).result
    systems = published(result.task, result.lang)
    return {system: values[figure] for system, values in systems.items() if figure in values}


def notes(report: Report) -> list[tuple[str, str]]:
    """Task and a caveat on its figures: why published ones don't compare, or that overlap with tuning is unchecked."""
    by_task: dict[str, dict[str, None]] = {}
    for task in report.tasks:
        results = [entry.result for entry in report.entries(task).values()]
        by_task[task] = dict.fromkeys(
            [*map(note, results), *(str(result.extras.get("unchecked", "")) for result in results)]
        )
    return [(task, text) for task, notes in by_task.items() for text in notes if text]


def words(figure: str) -> str:
    """A figure's name for people.

    >>> words("text_to_image recall@5"), words("mean_per_class")
    ('text→image R@5', 'mean per class')
    """
    return figure.replace("_to_", "→").replace(" recall@", " R@").replace("_", " ")


def percent(figure: Figure) -> str:
    """A figure with its interval, in percent.

    >>> percent(Figure(0.5, 0.412, 0.588, 0.1, 100))
    '50.0 (41.2–58.8)'
    """
    value = f"{100 * figure.value:.1f}"
    return (
        value
        if figure.low is None or figure.high is None
        else f"{value} ({100 * figure.low:.1f}–{100 * figure.high:.1f})"
    )


def points(share: float) -> str:
    """A difference of shares in points, signed.

    >>> points(-0.0312)
    '−3.1'
    """
    return f"{100 * share:+.1f}".replace("-", "−")
