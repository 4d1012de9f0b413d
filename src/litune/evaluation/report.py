"""Results of one or several runs → a folder: results.json, report.md, report.html, confusion pictures, class tables."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from litune.errors import ConfigError
from litune.evaluation.confusion import class_csv, class_markdown, class_rows, write_confusion
from litune.evaluation.figures import (
    Entry,
    Report,
    collect,
    headlines,
    notes,
    percent,
    points,
    published_percent,
    title,
    warning,
    words,
)
from litune.evaluation.intervals import DEFINITION as INTERVALS
from litune.evaluation.page import write_page
from litune.evaluation.published import SYSTEMS, note, published
from litune.evaluation.result import Result
from litune.files import clear_output, write_json, write_text
from litune.store.store import library_versions

FORMAT = "litune evaluation 1"
RESULTS, TABLE, PAGE = "results.json", "report.md", "report.html"
ACROSS = 6
"""Columns of a Markdown table, at most."""


def write_report(out: Path, runs: dict[str, list[Result]], *, overwrite: bool) -> None:
    """Write the report of these runs' results into the folder `out`, all of it or nothing.

    `runs` is by the name that people see; the first one is what the others are compared with. Raises
    `OutputExistsError` where something is in the way, `ConfigError` where there is nothing to report, `DataError` for
    results whose parts don't fit together.
    """
    if not any(runs.values()):
        raise ConfigError("there are no results to report")
    check_output(out, overwrite)
    report = collect(runs)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    for left in out.parent.glob(f".{out.name}.*.tmp"):  # by a report that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        temporary.mkdir()
        for entry in report.all_entries:
            write_class_files(temporary, entry)
        write_text(temporary / TABLE, markdown(report))
        write_page(temporary / PAGE, report)
        write_json(temporary / RESULTS, plain(report))
        clear_output(out, is_report(out), "report", overwrite)
        if out.exists():
            out.rmdir()  # it is empty
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_output(out: Path, overwrite: bool) -> None:
    """Before the work: raise `OutputExistsError` where something is in the way. An old report stays for now."""
    ours = is_report(out)
    if not (ours and overwrite):
        clear_output(out, ours, "report", overwrite)


def is_report(out: Path) -> bool:
    """Whether the folder holds a report of litune."""
    try:
        return str(json.loads((out / RESULTS).read_text(encoding="utf-8")).get("format", "")).startswith("litune eval")
    except (OSError, ValueError, AttributeError):
        return False


def write_class_files(folder: Path, entry: Entry) -> None:
    """Of a classification: the confusion picture and the table of classes, as CSV and as Markdown."""
    if entry.counts is None:
        return
    names = entry.result.class_names
    rows = class_rows(entry.counts, names)
    write_confusion(folder / f"{entry.stem}-confusion.png", entry.counts, names)
    write_text(folder / f"{entry.stem}-classes.csv", class_csv(rows))
    write_text(folder / f"{entry.stem}-classes.md", class_markdown(rows))


def plain(report: Report) -> dict[str, Any]:
    """Everything but single examples, as plain JSON values; figures are shares of one."""
    return {
        "format": FORMAT,
        "runs": {run: [_plain(entry) for entry in entries.values()] for run, entries in report.runs.items()},
        "differences": [
            {name: getattr(difference, name) for name in ("task", "figure", "run", "base")}
            | {"difference": difference.value, "interval": [difference.low, difference.high], "clear": difference.clear}
            for difference in report.differences
        ],
        "examples_differ": report.not_paired,
        "intervals": INTERVALS,
        "libraries": library_versions(),
    }


def _plain(entry: Entry) -> dict[str, Any]:
    result = entry.result
    shown = {
        name: {"value": figure.value, "chance": figure.chance, "examples": figure.examples}
        | ({} if figure.low is None else {"interval": [figure.low, figure.high]})
        for name, figure in entry.figures.items()
    }
    return {
        "task": result.task,
        "lang": result.lang,
        "kind": result.kind,
        "metric": result.metric,
        "images": result.images,
        "captions": len(result.captions),
        "classes": len(result.class_names),
        "figures": shown,
        "published_percent": published(result.task, result.lang),
        "published_note": note(result),
        "definition": result.definition,
        "protocol": result.protocol,
        "extras": result.extras,
    }


# Markdown


def markdown(report: Report) -> str:
    """The summary with published rows, every figure, differences, and what they mean."""
    columns = headlines(report)
    known = any(published_percent(report, *column) for column in columns)
    parts = ["# Evaluation", "In percent." + (" Below one's own runs, what others have printed." if known else "")]
    parts += [_summary(report, columns[i : i + ACROSS]) for i in range(0, len(columns), ACROSS)]
    parts += [f"{task}: {note}." for task, note in notes(report)]
    if report.differences:
        lines = [["task", "figure", "run", "difference in points", "95% interval", ""]]
        for difference in report.differences:
            lines.append(
                [
                    difference.task,
                    words(difference.figure),
                    f"{difference.run} − {difference.base}",
                    points(difference.value),
                    f"{points(difference.low)} to {points(difference.high)}",
                    "clear" if difference.clear else "can't be told apart",
                ]
            )
        parts += ["## Runs compared, example by example", _grid(lines)]
    if report.not_paired:
        parts.append(f"Not compared, because the examples are not the same: {', '.join(report.not_paired)}.")
    parts += ["## All figures", _grid(_all_figures(report))]
    warnings = [
        f"- {run}, {title(entry.result)}: {warning(entry)}"
        for run, entries in report.runs.items()
        for entry in entries.values()
        if warning(entry)
    ]
    if warnings:
        parts += ["## Warnings", "\n".join(warnings)]
    definitions = dict.fromkeys(entry.result.definition for entry in report.all_entries)
    parts += ["## What the figures mean", *definitions, f"Intervals: {INTERVALS}"]
    return "\n\n".join(parts) + "\n"


def _summary(report: Report, columns: list[tuple[str, str]]) -> str:
    lines = [["", *(f"{task}, {words(figure)}" for task, figure in columns)]]
    for run in report.runs:
        cells = []
        for task, figure in columns:
            entry = report.entries(task).get(run)
            cells.append(percent(entry.figures[figure]) if entry and figure in entry.figures else "")
        lines.append([f"**{run}**", *cells])
    beside = {column: published_percent(report, *column) for column in columns}
    for system in SYSTEMS:
        values = [beside[column].get(system) for column in columns]
        if any(value is not None for value in values):
            lines.append([system, *("" if value is None else f"{value:.1f}" for value in values)])
    firsts = [next(iter(report.entries(task).values())).figures.get(figure) for task, figure in columns]
    lines.append(
        ["chance", *("" if first is None or first.chance is None else f"{100 * first.chance:.1f}" for first in firsts)]
    )
    return _grid(lines)


def _all_figures(report: Report) -> list[list[str]]:
    lines = [["task", "run", "figure", "value (95% interval)", "chance", "examples"]]
    for task in report.tasks:
        for run, entry in report.entries(task).items():
            for name, figure in entry.figures.items():
                chance = "" if figure.chance is None else f"{100 * figure.chance:.1f}"
                lines.append([task, run, words(name), percent(figure), chance, f"{figure.examples:,}"])
            for name in ("ridge", "linear", "knn"):
                if learned := entry.result.extras.get(name):
                    low, high = (100 * end for end in learned["interval"])
                    value = f"{100 * learned['accuracy']:.1f} ({low:.1f}–{high:.1f})"
                    chance = f"{100 * learned['chance']:.1f}"
                    lines.append([task, run, f"{name} probe", value, chance, f"{learned['images']:,}"])
    return lines


def _grid(lines: list[list[str]]) -> str:
    rule = [":--" if i == 0 else "--:" for i in range(len(lines[0]))]
    drawn = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in [lines[0], rule, *lines[1:]]
    ]
    return "\n".join(drawn)
