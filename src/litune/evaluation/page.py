"""The report as one HTML page: figures with their intervals, hits and misses; it needs nothing from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from litune.errors import DataError
from litune.evaluation.confusion import class_rows
from litune.evaluation.figures import (
    Difference,
    Entry,
    Figure,
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
from litune.files import write_text
from litune.image.pictures import open_rgb
from litune.pairs.reference import read_bytes

SHOWN, QUERIES, CLASSES = 6, 4, 12
"""Pictures of hits and of misses, captions of each, lines of the table of classes."""
PIXELS = 160
COLORS = 5

NOTES = (
    "All figures are in percent. A bar around a dot is the 95% interval; the dotted line is what chance would reach; a "
    "diamond is a published figure, of other models and mostly of far larger data.",
    f"Intervals: {INTERVALS}",
    "The same figures are in results.json (as shares of one) and report.md, beside this page.",
)


def write_page(file: Path, report: Report) -> None:
    """Write the page to `file`; confusion pictures are read from its folder."""
    tasks, runs = report.tasks, list(report.runs)
    place = {task: f"task-{number}" for number, task in enumerate(tasks, 1)}
    thumbnails = Thumbnails()
    text = Template(_asset("report.html")).substitute(
        title=escape(" and ".join(runs) if len(runs) < 4 else f"{len(runs)} runs"),
        style=_asset("report.css"),
        lede=escape(_lede(report)),
        nav="<ul>" + "".join(f'<li><a href="#{place[task]}">{escape(task)}</a></li>' for task in tasks) + "</ul>",
        warnings=_warnings(report),
        summary=_summary(report, place),
        differences=_differences(report),
        tasks="\n".join(_task(report, task, place[task], file.parent, thumbnails) for task in tasks),
        notes="".join(f"<p>{escape(note)}</p>" for note in NOTES),
    )
    write_text(file, text)


def _asset(name: str) -> str:
    return resources.files("litune.evaluation").joinpath(name).read_text(encoding="utf-8")


def _lede(report: Report) -> str:
    images = {(e.result.task, e.result.images) for e in report.all_entries}
    total, tasks, runs = sum(count for _, count in images), len(report.tasks), len(report.runs)
    each = "each figure with its 95% interval and beside chance"
    who = "One run" if runs == 1 else f"{runs} runs"
    return f"{who} on {tasks} {'task' if tasks == 1 else 'tasks'} and {total:,} images, {each}."


def _warnings(report: Report) -> str:
    whose: dict[tuple[str, str], list[str]] = {}
    for task in report.tasks:
        for run, entry in report.entries(task).items():
            if warning(entry):
                whose.setdefault((task, warning(entry)), []).append(run)
    found = [
        f"<li><strong>{escape(task)}, {escape(', '.join(runs))}:</strong> {escape(text)}</li>"
        for (task, text), runs in whose.items()
    ]
    return f'<ul class="warning" aria-label="Warnings">{"".join(found)}</ul>' if found else ""


# Summary and comparisons


def table(caption: str, head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], name: str) -> str:
    """A table of HTML cells in a region that scrolls by keyboard; each row is its class and its cells."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = []
    for kind, (first, *others) in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        body.append(f'<tr{f" class={kind!r}" if kind else ""}><th scope="row">{first}</th>{cells}</tr>')
    region = f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(name)}">'
    return (
        f"{region}<table><caption><span>{caption}</span></caption>"
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _summary(report: Report, place: dict[str, str]) -> str:
    columns = headlines(report)
    if len(columns) < 2 and len(report.runs) < 2:
        return ""  # the task's own section says it all
    beside = {column: published_percent(report, *column) for column in columns}
    systems = [s for s in SYSTEMS if any(s in values for values in beside.values())]
    head = ["", *(_key(report, run) + escape(run) for run in report.runs), "chance", *map(escape, systems)]
    rows = []
    for task, figure in columns:
        entries = report.entries(task)
        cells = [f'<a href="#{place[task]}">{escape(task)}</a><br><span class="soft">{escape(words(figure))}</span>']
        for run in report.runs:
            one = entries[run].figures.get(figure) if run in entries else None
            cells.append(_value(one) if one else "")
        first = next(iter(entries.values())).figures.get(figure)
        cells.append("" if first is None or first.chance is None else f"{100 * first.chance:.1f}")
        cells += [f"{beside[task, figure][s]:.1f}" if s in beside[task, figure] else "" for s in systems]
        rows.append(("", cells))
    about = "The headline figure of each task" + (", beside what others have printed" if systems else "")
    said = "".join(f"<p class=soft>{escape(task)}: {escape(one)}.</p>" for task, one in notes(report))
    return f"<section><h2>At a glance</h2>{table(about, head, rows, 'Summary')}{said}</section>"


def _color(report: Report, run: str) -> str:
    return f"--color: var(--run-{list(report.runs).index(run) % COLORS + 1})"


def _key(report: Report, run: str) -> str:
    return f'<span class="key" style="{_color(report, run)}"></span>' if len(report.runs) > 1 else ""


def _value(one: Figure) -> str:
    value, _, bounds = percent(one).partition(" (")
    return f"<b>{value}</b>" + (f" <small>{bounds.rstrip(')')}</small>" if bounds else "")


def _differences(report: Report) -> str:
    if not report.differences and not report.not_paired:
        return ""
    rows = [("", _difference_row(one)) for one in report.differences]
    head = ["task", "figure", "run", "points", "95% interval", ""]
    about = "Both runs on the same images and captions, resampled together: how hard they are cancels out"
    parts = ["<section><h2>Runs compared, example by example</h2>"]
    if rows:
        parts.append(table(about, head, rows, "Differences between runs"))
    if report.not_paired:
        names = escape(", ".join(report.not_paired))
        parts.append(f'<p class="soft">Not compared, because the examples are not the same: {names}.</p>')
    return "".join(parts) + "</section>"


def _difference_row(one: Difference) -> list[str]:
    verdict = '<span class="clear">clear</span>' if one.clear else '<span class="soft">can’t be told apart</span>'
    who = f"{escape(one.run)} − {escape(one.base)}"
    bounds = f"{points(one.low)} to {points(one.high)}"
    return [escape(one.task), escape(words(one.figure)), who, f"<b>{points(one.value)}</b>", bounds, verdict]


# One task


def _task(report: Report, task: str, place: str, folder: Path, thumbnails: Thumbnails) -> str:
    entries = report.entries(task)
    result = next(iter(entries.values())).result
    figures = list(dict.fromkeys(name for entry in entries.values() for name in entry.figures))
    figures.sort(key=lambda name: name != result.metric)
    parts = [
        f'<section aria-labelledby="{place}"><h2 id="{place}">{escape(task)}</h2>',
        f'<p class="about">{escape(". ".join(filter(None, (_counts(result), _capital(note(result))))))}</p>',
        *(_chart(report, task, figure, entries) for figure in figures),
    ]
    for run, entry in entries.items():
        parts.append(_examples(entry, thumbnails, f" by {run}" if len(report.runs) > 1 else ""))
    for run, entry in entries.items():
        parts += _more(entry, f" · {run}" if len(report.runs) > 1 else "", folder)
    parts.append(_details("What these figures are", f"<p>{escape(result.definition)}</p>"))
    return "\n".join(parts) + "</section>"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _counts(result: Result) -> str:
    counts = [f"{result.images:,} images"]
    if result.kind == "retrieval":
        counts.append(f"{len(result.captions):,} captions")
    else:
        counts.append(f"{len(result.class_names):,} classes")
    return " · ".join(counts)


def _chart(report: Report, task: str, figure: str, entries: dict[str, Entry]) -> str:
    """One line per run and per published system: dot, interval, chance, and the figure in words."""
    chance = next(entry.figures[figure].chance for entry in entries.values() if figure in entry.figures)
    mark = "" if chance is None else f'<i class="chance" style="left:{100 * chance:.2f}%"></i>'
    lines = []
    for run, entry in entries.items():
        if figure not in entry.figures:
            continue
        one = entry.figures[figure]
        bar = ""
        if one.low is not None and one.high is not None:
            bar = f'<i class="range" style="left:{100 * one.low:.2f}%;width:{100 * (one.high - one.low):.2f}%"></i>'
        dot = f'<i class="dot" style="left:{100 * one.value:.2f}%"></i>'
        lines.append(
            f'<li style="{_color(report, run)}"><span class="who">{escape(run)}</span><span class="track" '
            f'aria-hidden="true">{mark}{bar}{dot}</span><span class="value">{_value(one)}</span></li>'
        )
    for system, value in published_percent(report, task, figure).items():
        lines.append(
            f'<li class="printed"><span class="who">{escape(system)}</span><span class="track" aria-hidden="true">'
            f'{mark}<i class="mark" style="left:{value:.2f}%"></i></span><span class="value">{value:.1f}</span></li>'
        )
    beside = "" if chance is None else f' <span class="soft">· chance {100 * chance:.1f}</span>'
    return f"<h3>{escape(words(figure))}{beside}</h3><ul class=chart>{''.join(lines)}</ul>"


def _details(title: str, content: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{content}</details>" if content else ""


def _more(entry: Entry, whose: str, folder: Path) -> list[str]:
    """What stands behind the figures, folded away."""
    result, extras = entry.result, entry.result.extras
    probes = {name: one for name, one in extras.items() if isinstance(one, dict) and "train_images" in one}
    shown = ("calibration", "contamination", "unchecked", "published", "published_note", *probes)
    other = {name: value for name, value in extras.items() if name not in shown}
    return [
        _details(f"What is taken for what{whose}", _confusion(entry, folder)),
        _details(f"Can its confidence be believed?{whose}", _calibration(extras.get("calibration"))),
        _details(f"What the image features alone tell{whose}", _probes(probes)),
        _details(f"Were these images tuned on?{whose}", _contamination(extras.get("contamination"))),
        _details(f"How it was measured{whose}", _facts(result.protocol | other)),
    ]


def _facts(values: dict[str, Any]) -> str:
    lines = []
    for name, value in values.items():
        if value is None or value in ("", [], {}):
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else _number(value)
        lines.append(f"<dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(text)}</dd>")
    return f"<dl>{''.join(lines)}</dl>" if lines else ""


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _confusion(entry: Entry, folder: Path) -> str:
    if entry.counts is None:
        return ""
    picture = folder / f"{entry.stem}-confusion.png"
    names = entry.result.class_names
    with Image.open(picture) as image:
        width, height = image.size
    source = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    rows = class_rows(entry.counts, names)
    rows.sort(key=lambda row: (row["accuracy"] == "", row["accuracy"]))
    some = rows[:CLASSES]
    about = f"The {len(some)} classes found least" if len(some) < len(rows) else "Every class, the least found first"
    lines = [
        ("", [escape(str(r["class"])), f"{r['images']:,}", *map(_share, (r["accuracy"], r["precision"])), _taken(r)])
        for r in some
    ]
    head = ["class", "images", "found", "of its predictions right", "most often taken for"]
    alt = f"Confusions of {len(names):,} classes; the same as numbers in {entry.stem}-classes.csv"
    return (
        f'<img class="confusion" src="{source}" width="{width}" height="{height}" alt="{escape(alt)}">'
        f"<p class=soft>All classes: {escape(entry.stem)}-classes.csv and .md, beside this page.</p>"
        + table(about, head, lines, "Classes")
    )


def _share(value: str | int | float) -> str:
    return f"{100 * value:.1f}" if isinstance(value, int | float) else ""


def _taken(row: dict[str, str | int | float]) -> str:
    return f"{escape(str(row['taken_for']))} ({_share(row['taken_for_share'])})" if row["taken_for"] else ""


def _calibration(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    side = found["temperature"]
    judged = "too sure of itself" if side > 1.05 else "not sure enough" if side < 0.95 else "rightly sure"
    head = ["", "calibration error", "temperature"]
    rows = [
        ("", ["as it is", f"{100 * found['ece_before']:.1f}", "1"]),
        ("", ["with one temperature fitted", f"{100 * found['ece_after']:.1f}", f"{side:.3g}"]),
    ]
    about = f"Measured on {found['measured_on']:,} images, fitted on {found['fitted_on']:,} others"
    charts = "".join(
        f"<figure>{_reliability(found[key])}<figcaption>{caption}</figcaption></figure>"
        for key, caption in (("reliability_before", "As it is"), ("reliability_after", "With the temperature fitted"))
        if key in found
    )
    return (
        f"<p>The model is {judged}.</p><div class=pair>{charts}</div>{table(about, head, rows, 'Calibration')}"
        f"<p class=soft>{escape(found['definition'])}</p>"
    )


def _reliability(rows: list[dict[str, float]]) -> str:
    """A square: mean confidence to the right, accuracy upwards; on the diagonal, confidence can be believed."""
    most = max((row["images"] for row in rows), default=1)
    dots = "".join(
        f'<circle cx="{40 + 170 * r["confidence"]:.1f}" cy="{180 - 170 * r["accuracy"]:.1f}" '
        f'r="{3 + 8 * (r["images"] / most) ** 0.5:.1f}" fill="var(--own)" fill-opacity=".75"/>'
        for r in rows
    )
    said = "; ".join(f"{100 * r['confidence']:.0f}% sure, {100 * r['accuracy']:.0f}% right" for r in rows)
    return (
        f'<svg viewBox="0 0 236 215" width="280" role="img" aria-label="{escape(said)}">'
        '<rect x="40" y="10" width="170" height="170" fill="none" stroke="var(--line)"/>'
        '<line x1="40" y1="180" x2="210" y2="10" stroke="var(--soft)" stroke-dasharray="3 4"/>'
        f'{dots}<text x="40" y="195">0</text><text x="190" y="195">100%</text><text x="95" y="211">confidence</text>'
        '<text x="4" y="18">100%</text><text x="28" y="180">0</text>'
        '<text transform="rotate(-90 14 120)" x="14" y="120">right</text></svg>'
    )


def _probes(found: dict[str, dict[str, Any]]) -> str:
    if not found:
        return ""
    rows = []
    for name, one in found.items():
        low, high = one["interval"]
        chosen = ", ".join(f"{key} {_number(one[key])}" for key in ("l2", "k", "temperature", "shots") if key in one)
        value = f"<b>{100 * one['accuracy']:.1f}</b> <small>{100 * low:.1f}–{100 * high:.1f}</small>"
        rows.append(("", [escape(name), value, f"{one['train_images']:,}", f"{one['images']:,}", escape(chosen)]))
    head = ["probe", "accuracy", "images learned from", "measured on", "settings"]
    told = "".join(f"<p class=soft>{escape(one['definition'])}</p>" for one in found.values())
    return table("The locked tower without any text", head, rows, "Probes") + told


def _contamination(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    copies = [(one, "same file") for one in found["exact"]]
    copies += [(one, f"cosine {one['cosine']:.3f}") for one in found["near"]]
    compared = (
        f"{found['images']:,} images were compared with the {found['tuned_images']:,} that were tuned on: "
        f"{found['hashes_compared']:,} by their files, {found['features_compared']:,} by their features."
    )
    if not copies:
        return f"<p>{escape(compared)} None was found there.</p><p class=soft>{escape(found['definition'])}</p>"
    rows = [("", [escape(one["image"]), escape(one["tuned"]), how]) for one, how in copies[:100]]
    about = escape(compared) + (f" The first 100 of {len(copies):,}" if len(copies) > 100 else "")
    return table(about, ["evaluated", "tuned on", "alike by"], rows, "Copies") + (
        f"<p class=soft>{escape(found['definition'])} All pairs are in results.json.</p>"
    )


# Hits and misses


class Thumbnails:
    """Small JPEGs of picture files as data, each made once."""

    def __init__(self) -> None:
        self.known: dict[str, str | None] = {}

    def __call__(self, path: str) -> str | None:
        """The picture as a data: address; None where there is none that can be read."""
        if path not in self.known:
            self.known[path] = _jpeg(path)
        return self.known[path]

    def tag(self, path: str, alt: str) -> str:
        """An image, or a box in its place."""
        source = self(path)
        if source is None:
            return f'<span class="gone" role="img" aria-label="{escape(alt)}">no picture</span>'
        return f'<img src="{source}" alt="{escape(alt)}" width="{PIXELS}" height="{PIXELS}">'


def _jpeg(path: str) -> str | None:
    try:
        picture = open_rgb(read_bytes(path)) if path else None
    except (OSError, DataError):
        return None
    if picture is None:
        return None
    out = io.BytesIO()
    ImageOps.fit(picture, (PIXELS, PIXELS)).save(out, format="JPEG", quality=74, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}"


def _examples(entry: Entry, thumbnails: Thumbnails, whose: str) -> str:
    result = entry.result
    if not any(result.pictures):
        return ""
    shown = _classified if result.kind == "classification" else _retrieved
    return shown(result, thumbnails, whose)


def _classified(result: Result, thumbnails: Thumbnails, whose: str) -> str:
    labels, predicted = result.labels, result.predicted
    if labels is None or predicted is None or not result.class_names:
        return ""
    sure = np.ones(len(labels)) if result.confidence is None else result.confidence
    right = result.outcomes["accuracy"] > 0 if "accuracy" in result.outcomes else labels == predicted
    parts = []
    for title, kind, chosen in ((f"Surest hits{whose}", "hit", right), (f"Surest misses{whose}", "miss", ~right)):
        items = []
        for i in surest(np.flatnonzero(chosen), sure, labels, SHOWN):
            own, taken = result.class_names[labels[i]], result.class_names[predicted[i]]
            known = "" if result.confidence is None else f", {100 * sure[i]:.0f}% sure"
            said = escape(own) if kind == "hit" else f"{escape(own)}<br>taken for <b>{escape(taken)}</b>"
            picture = thumbnails.tag(result.pictures[i], f"{result.keys[i]}: {own}, predicted {taken}{known}")
            items.append(f'<li class="{kind}">{picture}{said}<br><span class="soft">{known.lstrip(", ")}</span></li>')
        if items:
            parts.append(f'<h3>{escape(title)}</h3><ul class="gallery">{"".join(items)}</ul>')
    return "".join(parts)


def surest(rows: np.ndarray, sure: np.ndarray, labels: np.ndarray, most: int) -> list[int]:
    """The rows with the highest confidence, surest first; a class has two only where every class has one."""
    order = rows[np.argsort(-sure[rows], kind="stable")]
    _, first = np.unique(labels[order], return_index=True)
    others = np.setdiff1d(np.arange(len(order)), first)
    found: list[int] = order[np.sort(np.concatenate([np.sort(first), others])[:most])].tolist()
    return found


def _retrieved(result: Result, thumbnails: Thumbnails, whose: str) -> str:
    found, owner = result.found, result.owner
    if found is None or owner is None:
        return ""
    place = (found == owner[:, None]).argmax(1)
    there = (found == owner[:, None]).any(1)
    random = np.random.default_rng(0)
    parts = []
    for title, chosen in (
        (f"Captions whose image was found first{whose}", there & (place == 0)),
        (f"Captions whose image was not among the first five{whose}", ~there),
    ):
        rows = np.flatnonzero(chosen)
        items = [_query(result, int(i), thumbnails.tag) for i in np.sort(random.permutation(rows)[:QUERIES])]
        if items:
            parts.append(f'<h3>{escape(title)}</h3><ul class="queries">{"".join(items)}</ul>')
    return "".join(parts)


def _query(result: Result, i: int, tag: Callable[[str, str], str]) -> str:
    """A caption, the five images found for it, and its own where that is not among them."""
    assert result.found is not None
    assert result.owner is not None
    own = int(result.owner[i])
    shown = []
    for rank, image in enumerate(result.found[i].tolist(), 1):
        right = image == own
        alt = f"number {rank}: {result.keys[image]}" + (", the caption’s own" if right else "")
        shown.append(f'<li class="{"right" if right else ""}">{tag(result.pictures[image], alt)}{rank}</li>')
    if own not in result.found[i]:
        alt = f"its own image: {result.keys[own]}"
        shown.append(f'<li class="right own">{tag(result.pictures[own], alt)}its own</li>')
    return f"<li><q>{escape(result.captions[i])}</q><ol class=strip>{''.join(shown)}</ol></li>"
