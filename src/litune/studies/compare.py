"""A file of settings → a table: every row tuned with every seed, evaluated, mean and spread side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from litune.config import CompareConfig, EvalConfig, TuneConfig, command, to_json
from litune.errors import LituneError, OutputExistsError, RunError, StoreError
from litune.evaluation.evaluate import evaluate
from litune.files import holds_nothing, read_json, sweep_temporaries, write_json, write_text
from litune.model.run_folder import CONFIG, MANIFEST
from litune.progress import say
from litune.store.store import FeatureStore
from litune.studies.plan import DIRECTIONS, RETRIEVAL, ZERO_SHOT, Plan, Run, describe, read_plan
from litune.tuning.output import both_sides
from litune.tuning.tune import tune

TABLE, RESULTS = "table.md", "results.json"
FACTS = ("seconds", "steps", "pairs_seen", "tuned_parameters")  # from a run's manifest, where it has them
COUNTS = ("images", "captions", "classes")


@command(CompareConfig)
def compare(config: CompareConfig) -> dict[str, Any]:
    """Tune and evaluate every run that the file asks for; returns what DIR/results.json has.

    Finished runs are reused. A run that fails is listed in the results' `failed`, and the others go on. Before any
    run begins, raises `ConfigError` for a file that is wrong, `StoreError` for pairs that can't be evaluated,
    `RunError` where a run of other settings is in the way, `OutputExistsError` where something else is.
    """
    plan = read_plan(config.file, config.out)
    check_output(plan, config)
    check_stores(plan)
    records = {run.tune.out: record(run) for run in plan.runs if is_done(run)}
    results = write_results(config.out, plan, records)
    for number, run in enumerate(plan.runs, 1):
        what = f"run {number} of {len(plan.runs)}, {run.row}, seed {run.tune.seed}"
        if run.tune.out in records:
            say(f"{what}: reused from {run.tune.out}")
            continue
        say(what)
        try:
            finish(run, config.overwrite)
            records[run.tune.out] = record(run)
        except (LituneError, torch.OutOfMemoryError) as why:
            records[run.tune.out] = identity(run) | {"failed": " ".join(str(why).split())}
            say(f"{what}: failed: {why}")
        results = write_results(config.out, plan, records)
    return results


def check_output(plan: Plan, config: CompareConfig) -> None:
    """Raise where the output is not a comparison, or holds runs of other settings that may not be overwritten."""
    out = config.out
    if out.is_file() or (out.is_dir() and not holds_nothing(out) and not (out / TABLE).exists()):
        raise OutputExistsError(f"{out} is there and holds no comparison of litune: choose another --out")
    for run in plan.runs:
        changed = changed_at(run.tune)
        if changed and not config.overwrite:
            raise RunError(
                f"{run.tune.out} holds a run of {run.row!r} with other settings ({'; '.join(changed)}): give the same, "
                "choose another --out or name for the row, or give --overwrite to tune it again"
            )
    sweep_temporaries(out)


def changed_at(config: TuneConfig) -> list[str]:
    """The settings in which an existing run at the output differs, old and new; none where there is no run."""
    if not (config.out / CONFIG).exists():
        return []
    return both_sides(read_json(config.out / CONFIG, RunError), to_json(config))


def check_stores(plan: Plan) -> None:
    """Raise `StoreError` for missing evaluation pairs: better now than after tuning."""
    checked = set()
    for run in plan.runs:
        asked = run.evaluations[RETRIEVAL]
        key = (asked.store, asked.split, asked.lang)
        if asked.store is not None and key not in checked:
            try:
                FeatureStore(asked.store).select(asked.split, asked.lang)
            except StoreError as why:
                raise StoreError(f"row {run.row!r} can't be evaluated: {why}") from None
            checked.add(key)


def finish(run: Run, overwrite: bool) -> None:
    """Tune and evaluate what is not done yet; each evaluation is written as soon as it is done."""
    if not is_tuned(run.tune):
        tune.run(replace(run.tune, overwrite=overwrite))
    done = evaluated(run)
    for name, asked in run.evaluations.items():
        if name not in done:
            figures = evaluate.run(asked)[RETRIEVAL if name == RETRIEVAL else "zero_shot"]
            done[name] = {"settings": measured_by(asked), "figures": figures}
            write_json(run.tune.out / RESULTS, done)


def is_tuned(config: TuneConfig) -> bool:
    """Whether the output holds a finished run of the same settings."""
    return (config.out / MANIFEST).exists() and not changed_at(config)


def is_done(run: Run) -> bool:
    """Whether the run is tuned and evaluated as asked."""
    return is_tuned(run.tune) and evaluated(run).keys() == run.evaluations.keys()


def evaluated(run: Run) -> dict[str, Any]:
    """The run's saved evaluations that have the same settings."""
    file = run.tune.out / RESULTS
    before = read_json(file, RunError) if file.exists() else {}
    wanted = {name: measured_by(asked) for name, asked in run.evaluations.items()}
    return {name: before[name] for name in wanted if before.get(name, {}).get("settings") == wanted[name]}


def measured_by(asked: EvalConfig) -> dict[str, Any]:
    """The settings that an evaluation's figures depend on."""
    return {name: value for name, value in to_json(asked).items() if name not in ("run", "json")}


def identity(run: Run) -> dict[str, Any]:
    """The seed and the folder of a run."""
    return {"seed": run.tune.seed, "folder": run.tune.out.name}


def record(run: Run) -> dict[str, Any]:
    """A finished run as the results hold it; figures and chance are shares of one, by metric."""
    figures: dict[str, float] = {}
    chance: dict[str, float] = {}
    counts: dict[str, Any] = {}
    for name, evaluation in evaluated(run).items():
        measured = evaluation["figures"]
        counts[name] = {key: measured[key] for key in (*COUNTS, "split") if key in measured}
        if name == RETRIEVAL:
            for way in DIRECTIONS:
                figures |= {f"{way}.{k}": share for k, share in measured[way].items()}
                chance |= {f"{way}.{k}": share for k, share in measured["chance"][way].items()}
        else:
            figures |= {name: measured["accuracy"], f"{name}.mean_per_class": measured["mean_per_class"]}
            chance |= {name: measured["chance"], f"{name}.mean_per_class": measured["chance"]}
            if "top5" in measured:
                figures[f"{name}.top5"] = measured["top5"]
    manifest = read_json(run.tune.out / MANIFEST, RunError)
    training = {key: manifest[key] for key in FACTS if key in manifest}
    return identity(run) | training | {"figures": figures, "chance": chance, "measured_on": counts}


def write_results(out: Path, plan: Plan, records: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """Write the table and the results of the runs in `records`, by folder; returns the results."""
    results = summarize(plan, records)
    write_text(out / TABLE, markdown(results))
    write_json(out / RESULTS, results)
    return results


def summarize(plan: Plan, records: dict[Path, dict[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation of every row over its seeds, with the runs that they come from."""
    same = agreed([row.settings for row in plan.rows], everywhere=True)
    rows: list[dict[str, Any]] = []
    for row in plan.rows:
        runs = [records[run.tune.out] for run in plan.runs if run.row == row.name and run.tune.out in records]
        values: dict[str, list[float]] = {}
        for run in runs:
            for metric, share in run.get("figures", {}).items():
                values.setdefault(metric, []).append(share)
        rows.append(
            {
                "name": row.name,
                "settings": {key: value for key, value in row.settings.items() if key not in same},
                "mean": {metric: fmean(shares) for metric, shares in values.items()},
                "sd": {metric: stdev(shares) for metric, shares in values.items() if len(shares) > 1},
                "runs": runs,
            }
        )
    finished = [record for record in records.values() if "figures" in record]
    return {
        "title": plan.title,
        "seeds": list(plan.seeds),
        "metrics": list(plan.metrics),
        "same_settings": same,
        "rows": rows,
        "chance": agreed([record["chance"] for record in finished]),
        "measured_on": agreed([record["measured_on"] for record in finished]),
        "failed": [
            {"row": row["name"], "seed": run["seed"], "reason": run["failed"]}
            for row in rows
            for run in row["runs"]
            if "failed" in run
        ],
    }


def agreed(tables: list[dict[str, Any]], everywhere: bool = False) -> dict[str, Any]:
    """The entries that are equal in every table that has them; with `everywhere`, only those that all tables have."""
    common = {}
    for key in dict.fromkeys(key for table in tables for key in table):
        values = [table[key] for table in tables if key in table]
        if all(value == values[0] for value in values) and not (everywhere and len(values) < len(tables)):
            common[key] = values[0]
    return common


def markdown(results: dict[str, Any]) -> str:
    """The results as a Markdown table, in percent, with what holds for all rows below it."""
    metrics, seeds = results["metrics"], results["seeds"]
    best = {metric: best_mean(results["rows"], metric) for metric in metrics}
    lines = [["", *map(heading, metrics)]]
    for row in results["rows"]:
        done = sum("figures" in run for run in row["runs"])
        name = row["name"] + (f" ({done} of {len(seeds)} seeds)" if 0 < done < len(seeds) else "")
        if done:
            cells = [cell(row["mean"].get(m), row["sd"].get(m), best[m]) for m in metrics]
        else:
            reason = next((textwrap.shorten(f"failed: {r['failed']}", 60, placeholder=" …") for r in row["runs"]), "")
            cells = [reason or "not run yet", *[""] * (len(metrics) - 1)]
        lines.append([name, *cells])
    if results["chance"]:
        lines.append(["chance", *(cell(results["chance"].get(m), None, None) for m in metrics)])
    title = [f"## {results['title']}"] if results["title"] else []
    return "\n\n".join([*title, grid(lines), caption(results)]) + "\n"


def best_mean(rows: list[dict[str, Any]], metric: str) -> float | None:
    """The highest mean, in percent as shown; None where there is nothing to compare."""
    means = [percent(row["mean"][metric]) for row in rows if metric in row["mean"]]
    return max(means) if len(means) > 1 else None


def heading(metric: str) -> str:
    """A metric's name as in papers.

    >>> heading("text_to_image.recall@10"), heading("zero_shot.pets.mean_per_class")
    ('T→I R@10', 'pets (mean per class)')
    """
    if metric.startswith(ZERO_SHOT):
        name = metric.removeprefix(ZERO_SHOT)
        for end, words in ((".mean_per_class", " (mean per class)"), (".top5", " (top 5)")):
            name = name.removesuffix(end) + words if name.endswith(end) else name
        return name
    return metric.replace("text_to_image.recall", "T→I R").replace("image_to_text.recall", "I→T R")


def percent(share: float) -> float:
    """A share of one in percent, with the one decimal that is shown."""
    return round(100 * share, 1)


def cell(mean: float | None, sd: float | None, best: float | None) -> str:
    """Mean and spread in percent, bold where the mean is shown as the best.

    >>> cell(0.1234, 0.005, 12.3), cell(0.1, None, 12.3)
    ('**12.3 ± 0.5**', '10.0')
    """
    if mean is None:
        return ""
    text = f"{percent(mean):.1f}" + (f" ± {percent(sd):.1f}" if sd is not None else "")
    return f"**{text}**" if percent(mean) == best else text


def grid(lines: list[list[str]]) -> str:
    """Lines of cells, the first of them the headings, as a Markdown table whose columns are aligned."""
    lines = [[text.replace("|", "\\|") for text in line] for line in lines]
    widths = [max(4, *map(len, column)) for column in zip(*lines, strict=True)]
    rules = [":" + "-" * (width - 1) if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]

    def draw(line: Iterable[str]) -> str:
        pairs = enumerate(zip(line, widths, strict=True))
        return "| " + " | ".join(text.rjust(w) if i else text.ljust(w) for i, (text, w) in pairs) + " |"

    return "\n".join(map(draw, [lines[0], rules, *lines[1:]]))


def caption(results: dict[str, Any]) -> str:
    """The notes below the table: seeds, selections, settings that all rows share, and failures."""
    seeds = results["seeds"]
    spread = f"mean ± sample standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else "one seed"
    parts = [f"In percent, {spread} ({', '.join(map(str, seeds))}); the best of a column in bold."]
    names = dict.fromkeys(name for row in results["rows"] for run in row["runs"] for name in run.get("measured_on", {}))
    if names:
        parts.append(f"Measured on {'; '.join(selection(name, results['measured_on'].get(name)) for name in names)}.")
    if results["same_settings"]:
        parts.append(f"All rows: {describe(results['same_settings'])}.")
    parts += [f"Failed: {failure['row']}, seed {failure['seed']}: {failure['reason']}" for failure in results["failed"]]
    return "\n\n".join(parts)


def selection(name: str, counts: dict[str, Any] | None) -> str:
    """What an evaluation was measured on; `counts` is None where that differs between rows.

    >>> selection("retrieval", {"images": 1000, "captions": 5000, "split": "val"})
    'retrieval (val): 1,000 images, 5,000 captions'
    """
    name = name.removeprefix(ZERO_SHOT)
    if counts is None:
        return f"{name}: not the same for all rows, so that their figures can't be compared"
    split = f" ({counts['split']})" if counts.get("split") else ""
    return f"{name}{split}: " + ", ".join(f"{counts[key]:,} {key}" for key in COUNTS if key in counts)
