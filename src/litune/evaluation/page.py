"""The report as one HTML page: figures with their intervals, hits and misses; it needs nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from litune import pages
from litune.evaluation.confusion import class_rows
from litune.evaluation.figures import (
    Entry,
    Report,
    headlines,
    notes,
    percent,
    points,
    published_percent,
    warning,
    words,
)
from litune.evaluation.intervals import DEFINITION as INTERVALS
from litune.evaluation.published import SYSTEMS, note
from litune.evaluation.result import Result

SHOWN, QUERIES = 6, 4
"""Pictures of hits and of misses, captions of each."""

NOTES = (
    "All figures are in percent. A bar around a dot is the 95% interval; the dotted line is what chance would reach; a "
    "diamond is a published figure, of other models and mostly of far larger data.",
    f"Intervals: {INTERVALS}",
    "The same figures are in results.json (as shares of one) and report.md, beside this page.",
)


def write_page(file: Path, report: Report) -> None:
    """Write the page to `file`; confusion pictures are read from its folder."""
    runs = list(report.runs)
    places = {task: f"task-{number}" for number, task in enumerate(report.tasks, 1)}
    pages.write_page(
        file,
        "report.html",
        title=" and ".join(runs) if len(runs) < 4 else f"{len(runs)} runs",
        lede=_lede(report),
        report=report,
        runs=runs,
        warnings=_warnings(report),
        summary=_summary(report, places),
        tasks=[_task(report, task, place, file.parent) for task, place in places.items()],
        notes=NOTES,
        number=_number,
        percent=percent,
        points=points,
        words=words,
    )


def _lede(report: Report) -> str:
    images = {(e.result.task, e.result.images) for e in report.all_entries}
    total, tasks, runs = sum(count for _, count in images), len(report.tasks), len(report.runs)
    each = "each figure with its 95% interval and beside chance"
    who = "One run" if runs == 1 else f"{runs} runs"
    return f"{who} on {tasks} {'task' if tasks == 1 else 'tasks'} and {total:,} images, {each}."


def _warnings(report: Report) -> dict[tuple[str, str], list[str]]:
    """The runs that each task's warnings are about, by task and text."""
    warnings: dict[tuple[str, str], list[str]] = {}
    for task in report.tasks:
        for run, entry in report.entries(task).items():
            if text := warning(entry):
                warnings.setdefault((task, text), []).append(run)
    return warnings


def _summary(report: Report, places: dict[str, str]) -> dict[str, Any]:
    """The headline figures of each task; no rows where the only task's own section says it all."""
    columns = headlines(report)
    if len(columns) < 2 and len(report.runs) < 2:
        return {"rows": []}
    published = {column: published_percent(report, *column) for column in columns}
    rows = []
    for task, figure in columns:
        entries = report.entries(task)
        figures = [entries[run].figures.get(figure) if run in entries else None for run in report.runs]
        first = next(iter(entries.values())).figures.get(figure)
        rows.append(
            {
                "task": task,
                "place": places[task],
                "figure": figure,
                "figures": figures,
                "chance": None if first is None else first.chance,
                "published": published[task, figure],
            }
        )
    systems = [system for system in SYSTEMS if any(system in values for values in published.values())]
    return {"rows": rows, "systems": systems, "notes": notes(report)}


def _task(report: Report, task: str, place: str, folder: Path) -> dict[str, Any]:
    """What the page shows of a task: its figures of all runs, their hits and misses, what stands behind them."""
    entries = report.entries(task)
    result = next(iter(entries.values())).result
    figures = list(dict.fromkeys(name for entry in entries.values() for name in entry.figures))
    figures.sort(key=lambda name: name != result.metric)
    return {
        "name": task,
        "place": place,
        "about": ". ".join(filter(None, (_counts(result), _capital(note(result))))),
        "charts": [_chart(report, task, figure, entries) for figure in figures],
        "examples": {run: _examples(entry.result) for run, entry in entries.items()},
        "details": {run: _details(entry, folder) for run, entry in entries.items()},
        "definition": result.definition,
    }


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _counts(result: Result) -> str:
    counts = [f"{result.images:,} images"]
    if result.kind == "retrieval":
        counts.append(f"{len(result.captions):,} captions")
    else:
        counts.append(f"{len(result.class_names):,} classes")
    return " · ".join(counts)


def _chart(report: Report, task: str, figure: str, entries: dict[str, Entry]) -> dict[str, Any]:
    figures = {run: entry.figures[figure] for run, entry in entries.items() if figure in entry.figures}
    return {
        "title": words(figure),
        "figures": figures,
        "chance": next(iter(figures.values())).chance,
        "published": published_percent(report, task, figure),
    }


def _details(entry: Entry, folder: Path) -> dict[str, Any]:
    """What stands behind the figures, folded away."""
    result, extras = entry.result, entry.result.extras
    probes = {name: probe for name, probe in extras.items() if isinstance(probe, dict) and "train_images" in probe}
    own = ("calibration", "contamination", "unchecked", "published", "published_note", *probes)
    other = {name: value for name, value in extras.items() if name not in own}
    return {
        "confusion": _confusion(entry, folder),
        "calibration": extras.get("calibration"),
        "probes": probes,
        "contamination": extras.get("contamination"),
        "protocol": list(_protocol(result.protocol | other)),
    }


def _protocol(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if value is None or value in ("", [], {}):
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else _number(value)
        yield name.replace("_", " "), text


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _confusion(entry: Entry, folder: Path) -> dict[str, Any] | None:
    """The confusion picture, and what becomes of each class, those found least first."""
    if entry.counts is None:
        return None
    picture = folder / f"{entry.stem}-confusion.png"
    with Image.open(picture) as image:
        width, height = image.size
    rows = class_rows(entry.counts, entry.result.class_names)
    rows.sort(key=lambda row: (row["accuracy"] == "", row["accuracy"]))
    return {
        "address": pages.data_address(picture.read_bytes(), "image/png"),
        "width": width,
        "height": height,
        "stem": entry.stem,
        "classes": len(entry.result.class_names),
        "rows": rows,
    }


# Hits and misses


def _examples(result: Result) -> list[dict[str, Any]]:
    if not any(result.pictures):
        return []
    return _classified(result) if result.kind == "classification" else _retrieved(result)


def _classified(result: Result) -> list[dict[str, Any]]:
    """The surest hits and the surest misses."""
    labels, predicted = result.labels, result.predicted
    if labels is None or predicted is None or not result.class_names:
        return []
    confidence = np.ones(len(labels)) if result.confidence is None else result.confidence
    right = result.outcomes["accuracy"] > 0 if "accuracy" in result.outcomes else labels == predicted
    groups = []
    for title, kind, chosen in (("Surest hits", "hit", right), ("Surest misses", "miss", ~right)):
        rows = surest(np.flatnonzero(chosen), confidence, labels, SHOWN)
        if rows:
            groups.append({"title": title, "kind": kind, "pictures": [_prediction(result, i) for i in rows]})
    return groups


def _prediction(result: Result, i: int) -> dict[str, str]:
    assert result.labels is not None
    assert result.predicted is not None
    own, predicted = result.class_names[result.labels[i]], result.class_names[result.predicted[i]]
    confidence = "" if result.confidence is None else f"{100 * result.confidence[i]:.0f}% sure"
    alt = ", ".join(filter(None, (f"{result.keys[i]}: {own}", f"predicted {predicted}", confidence)))
    return {"path": result.pictures[i], "alt": alt, "own": own, "predicted": predicted, "confidence": confidence}


def surest(rows: np.ndarray, sure: np.ndarray, labels: np.ndarray, most: int) -> list[int]:
    """The rows with the highest confidence, surest first; a class has two only where every class has one."""
    order = rows[np.argsort(-sure[rows], kind="stable")]
    _, first = np.unique(labels[order], return_index=True)
    others = np.setdiff1d(np.arange(len(order)), first)
    chosen: list[int] = order[np.sort(np.concatenate([np.sort(first), others])[:most])].tolist()
    return chosen


def _retrieved(result: Result) -> list[dict[str, Any]]:
    """Some captions whose image was found first, and some for which it was not found."""
    if result.best_images is None or result.owner is None:
        return []
    own = result.best_images == result.owner[:, None]
    random = np.random.default_rng(0)
    groups = []
    for title, chosen in (
        ("Captions whose image was found first", own.any(1) & (own.argmax(1) == 0)),
        ("Captions whose image was not among the first five", ~own.any(1)),
    ):
        rows = np.sort(random.permutation(np.flatnonzero(chosen))[:QUERIES]).tolist()
        if rows:
            groups.append({"title": title, "queries": [_query(result, i) for i in rows]})
    return groups


def _query(result: Result, i: int) -> dict[str, Any]:
    """A caption, the five images found for it, and its own where that is not among them."""
    assert result.best_images is not None
    assert result.owner is not None
    own, ranked = int(result.owner[i]), result.best_images[i].tolist()
    images = []
    for rank, image in enumerate(ranked, 1):
        alt = f"number {rank}: {result.keys[image]}" + (", the caption’s own" if image == own else "")
        kind = "right" if image == own else ""
        images.append({"path": result.pictures[image], "alt": alt, "kind": kind, "label": str(rank)})
    if own not in ranked:
        alt = f"its own image: {result.keys[own]}"
        images.append({"path": result.pictures[own], "alt": alt, "kind": "right own", "label": "its own"})
    return {"caption": result.captions[i], "images": images}
