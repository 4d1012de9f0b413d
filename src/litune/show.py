"""What each command prints of its results."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

from litune.config import (
    ClassifyConfig,
    CompareConfig,
    DedupConfig,
    EvalConfig,
    ExportConfig,
    FilterConfig,
    InspectConfig,
    OverviewConfig,
    ProbeConfig,
    SearchConfig,
)


def show_eval(config: EvalConfig, results: dict[str, Any]) -> None:
    """Print the figures beside chance, with what they mean; exits with 1 where a task failed, after naming it."""
    runs = results.get("runs", {"": results})
    for name, figures in runs.items():
        if name:
            print(f"\n{name}")
        show_run(figures)
    if config.json:
        print(f"written to {config.json}")
    if config.out:
        print(f"reports in {config.out}")
    if failed := {task["task"]: task["reason"] for figures in runs.values() for task in figures.get("failed", ())}:
        for task, reason in failed.items():
            print(f"litune: failed: {task}: {reason}", file=sys.stderr)
        sys.exit(1)


def show_run(results: dict[str, Any]) -> None:
    """Print the figures of one run."""
    if figures := results.get("retrieval"):
        print(f"retrieval: {figures['images']:,} images, {figures['captions']:,} captions")
        ks = list(figures["text_to_image"])
        print(f"{'':16}" + "".join(f"{k:>12}" for k in ks))
        _show_all_languages(figures)
        corrected = figures.get("hubs_corrected")
        if corrected:
            print("the same with hubs corrected")
            _show_all_languages(corrected)
        print((corrected or figures)["definition"])
    if figures := results.get("zero_shot"):
        print(
            f"zero-shot: {figures['images']:,} images, {figures['classes']:,} classes, templates {figures['templates']}"
        )
        for name in ("accuracy", "mean_per_class", "top5", "chance"):
            if name in figures:
                ends = f"   {_ends(figures['interval'][name])}" if name in figures["interval"] else ""
                print(f"{name:16}{figures[name]:>11.1%}{ends}")
        print(figures["definition"])
    if rows := results.get("tasks"):
        show_tasks(rows, results["means"])


def _show_all_languages(figures: dict[str, Any]) -> None:
    """Print the recalls of all captions, then those of each language."""
    show_recalls(figures)
    for lang, of_lang in figures.get("by_lang", {}).items():
        print(f"{lang}: {of_lang['images']:,} images, {of_lang['captions']:,} captions")
        show_recalls(of_lang, "  ")


def show_recalls(figures: dict[str, Any], indent: str = "") -> None:
    """Print both ways' recalls, each with its interval and chance."""
    for way, name in (("text_to_image", "text → image"), ("image_to_text", "image → text")):
        interval, chance = figures["interval"][way], figures["chance"][way]
        print(f"{indent + name:16}" + "".join(f"{value:>11.1%} " for value in figures[way].values()))
        print(f"{indent + '  95% interval':16}" + "".join(f"{_ends(interval[k]):>11} " for k in figures[way]))
        print(f"{indent + '  chance':16}" + "".join(f"{chance[k]:>11.1%} " for k in figures[way]))


def show_tasks(rows: Sequence[dict[str, Any]], means: dict[str, Any]) -> None:
    """Print each task's figures, what was published, and each definition once."""
    for result in rows:
        asked = result["protocol"]
        about = f"{asked['captions']:,} captions" if "captions" in asked else f"{asked['classes']:,} classes"
        prompts = f", templates: {asked['templates']} ({asked['template_set']})" if "templates" in asked else ""
        languages = f" in {', '.join(asked['languages'])}" if asked.get("languages") else ""
        print(f"{result['name']}: {result['images']:,} images, {about}{languages}{prompts}")
        for figure, value in result["values"].items():
            ends = f"   {_ends(result['interval'][figure])}" if figure in result["interval"] else ""
            chance = f"   chance {result['chance'][figure]:.1%}" if figure in result["chance"] else ""
            print(f"  {figure:26}{value:>7.1%}{ends}{chance}")
        if fitted := result["extras"].get("calibration"):
            error, after = fitted["ece_before"], fitted["ece_after"]
            print(f"  {'calibration error':26}{error:>7.1%}   {after:.1%} at a fitted temperature")
        for system, row in result["extras"].get("published", {}).items():
            print(f"    published: {system}: " + ", ".join(f"{figure} {value:.1%}" for figure, value in row.items()))
        if note := result["extras"].get("published_note"):
            print(f"    {note}")
        for probe in ("ridge", "linear", "knn"):
            if learned := result["extras"].get(probe):
                about = f"{_ends(learned['interval'])}   chance {learned['chance']:.1%}"
                images = f"{learned['train_images']:,} images"
                print(f"  {probe + ' probe':26}{learned['accuracy']:>7.1%}   {about}   from {images}")
        if unchecked := result["extras"].get("unchecked"):
            print(f"  {unchecked}")
        if looked := result["extras"].get("contamination"):
            print("  " + (looked["warning"] or f"no copy among the {looked['tuned_images']:,} images it was tuned on"))
    for group, mean in means.items():
        print(
            f"{group}: {mean['mean']:.1%} over {mean['sets']} sets",
            *(f"{k} {v:.1%}" for k, v in mean["published"].items()),
        )
        if mean["note"]:
            print(f"    {mean['note']}")
    for definition in dict.fromkeys(result["definition"] for result in rows):
        print(definition)


def _ends(interval: Sequence[float]) -> str:
    """An interval of shares, in percent."""
    low, high = interval
    return f"{100 * low:.1f}–{100 * high:.1f}"


def show_compare(config: CompareConfig, results: dict[str, Any]) -> None:
    """Print the table; exits with 1 where a run failed, after naming it."""
    print((config.out / "table.md").read_text(encoding="utf-8"))
    print(f"written to {config.out}: table.md, results.json and the run folders")
    for run in results["failed"]:
        print(f"litune: failed: {run['row']}, seed {run['seed']}: {run['reason']}", file=sys.stderr)
    if results["failed"]:
        sys.exit(1)


def show_classified(config: ClassifyConfig, results: Sequence[Any]) -> None:
    """Print each image's labels, the most probable first."""
    for result in results:
        print(result.image)
        for label, probability in result.probabilities.items():
            print(f"  {probability:>6.1%}  {label}")


def show_inspected(config: InspectConfig | OverviewConfig, facts: dict[str, Any], indent: str = "") -> None:
    """Print what is known, one line per fact."""
    for name, value in facts.items():
        label = f"{indent}{name.replace('_', ' ')}"
        if value == {}:
            continue
        if isinstance(value, dict):
            print(label)
            show_inspected(config, value, indent + "  ")
        elif value is not None and value != []:
            several = value if isinstance(value, list) else [value]
            print(f"{label:43} " + ", ".join(f"{v:,}" if type(v) is int else _short(v) for v in several))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show_probe(config: ProbeConfig, results: dict[str, Any]) -> None:
    """Print the table, best first, with what it means."""
    print(importlib.import_module("litune.studies.probe").table(results))


def show_found(config: SearchConfig, results: Sequence[Any]) -> None:
    """Print scores, paths and first captions, or captions alone, best first."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for match in results:
        print(importlib.import_module("litune.index.search").line(match, width))


def show_export(config: ExportConfig, about: dict[str, Any]) -> None:
    """Print what the export could not take over, and what 8-bit integers cost."""
    for note in about.get("notes", []):
        print(note)
    if int8 := about.get("int8"):
        sizes = int8["bytes"]
        print(f"text.int8.onnx: {sizes['text.int8.onnx'] / 1e6:.1f} MB instead of {sizes['text.onnx'] / 1e6:.1f} MB")
        if "recall" not in int8:
            more = "; give --store for recall@k" if config.to == "onnx" else ""
            print(f"cosines with the float32 features: least {int8['cosine']['least']:.4f}{more}")
        else:
            before, after = int8["recall"]["float32"], int8["recall"]["int8"]
            for way, name in (("text_to_image", "text → image"), ("image_to_text", "image → text")):
                print(f"{name:16}" + "  ".join(f"{k} {before[way][k]:.1%} → {after[way][k]:.1%}" for k in before[way]))


def show_filtered(config: FilterConfig, figures: dict[str, Any]) -> None:
    """Print what each rule dropped, with an example."""
    print(f"{'rule':28}{'tested':>12}{'images':>12}{'captions':>12}  dropped, as")
    for rule in figures["rules"]:
        counts = rule["tested"], rule["dropped_images"], rule["dropped_captions"]
        example: dict[str, str] = next(iter(rule["examples"]), {})
        print(
            f"{rule['rule']:28}" + "".join(f"{n:>12,}" for n in counts),
            "",
            example.get("caption", example.get("key", "")),
        )
    print(f"{'kept':28}{'':12}{figures['kept_images']:>12,}{figures['kept_captions']:>12,}")


def show_dedup(config: DedupConfig, figures: dict[str, Any]) -> None:
    """Print what was removed, and why."""
    print(f"{'duplicates':40}{'equal bytes':>14}{'by pixels':>14}")
    for name, counts in figures["removed"].items():
        where = "within the pairs" if name == "pairs" else f"of {name}"
        print(f"{where:40}{counts['exact']:>14,}{counts['near']:>14,}")
    print(f"{figures['damaged']:,} damaged; {figures['kept']:,} of {figures['images']:,} images kept")


SHOW: dict[type[Any], Callable[[Any, Any], None]] = {
    EvalConfig: show_eval,
    CompareConfig: show_compare,
    ClassifyConfig: show_classified,
    SearchConfig: show_found,
    InspectConfig: show_inspected,
    ProbeConfig: show_probe,
    ExportConfig: show_export,
    OverviewConfig: show_inspected,
    FilterConfig: show_filtered,
    DedupConfig: show_dedup,
}
