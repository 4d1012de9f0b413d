"""Run → numbers: named evaluation sets, retrieval on a store's pairs, zero-shot classification on class folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from litune import distributed
from litune.config import EvalConfig, command
from litune.errors import DataError, LituneError
from litune.evaluation.embedded import Embedded, open_store
from litune.evaluation.extras import tuned_on
from litune.evaluation.intervals import DEFINITION as INTERVALS
from litune.evaluation.plain import heading, plain, plain_classification, plain_retrieval
from litune.evaluation.result import Result
from litune.evaluation.set_classification import classify
from litune.evaluation.set_retrieval import retrieve
from litune.evaluation.subject import Evaluation, Protocol, Subject
from litune.evaluation.suite import run_task
from litune.evaluation.task import Task
from litune.evaluation.tasks import find_tasks, group_means
from litune.files import cache_folder, check_file, write_json
from litune.model.run_folder import load
from litune.pairs.benchmarks import EvalSet, class_tree
from litune.progress import say
from litune.prompts import prompted_name, read_templates
from litune.store.store import MANIFEST, library_versions


@command(EvalConfig)
def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Measure runs; returns (and writes to `config.json`) every figure, each metric's definition, and chance.

    Of several runs the figures are under `runs`, by name. Under torchrun every process calls it alike and encodes its
    part; rank 0 measures and writes. Raises `RunError`, `StoreError` or `DataError` for what can't be read,
    `OutputExistsError` where there are reports already, or the file of `config.json`.
    """
    distributed.start(config.device)
    tasks = find_tasks(config.tasks, config.data)
    distributed.from_main(lambda: _check_outputs(config))
    names = run_names([config.run, *config.others])
    figures: dict[str, dict[str, Any]] = {}
    reported: dict[str, list[Result]] = {}
    failures: list[LituneError] = []
    for name, run in names.items():
        figures[name], reported[name] = measure(config, name, run, tasks, failures)
    if failures and config.classes is None and not any(reported.values()):
        raise failures[0]
    results: dict[str, Any] = figures[next(iter(names))] if len(names) == 1 else {"runs": figures}
    results |= {"interval": INTERVALS, "libraries": library_versions()}
    if distributed.is_main():
        if config.json is not None:
            write_json(config.json, results)
        if config.out is not None:
            from litune.evaluation.report import write_report

            write_report(config.out, reported, overwrite=config.overwrite)
    return results


def _check_outputs(config: EvalConfig) -> None:
    check_file(config.json, "--json", config.overwrite)
    if config.out is not None:
        from litune.evaluation.report import check_output

        check_output(config.out, config.overwrite)


def run_names(runs: Sequence[Path]) -> dict[str, Path]:
    """What each run is called: its folder's name, or its path where two have the same."""
    paths = list(dict.fromkeys(runs))
    short = [path.absolute().name for path in paths]
    return {name if short.count(name) == 1 else str(path): path for name, path in zip(short, paths, strict=True)}


def measure(
    config: EvalConfig, name: str, run: Path, tasks: Sequence[Task], failures: list[LituneError]
) -> tuple[dict[str, Any], list[Result]]:
    """One run's figures, and what a report needs; why tasks failed is added to `failures`."""
    subject = Subject(name, run, load(run, image_tower=config.image_tower, device=config.device))
    figures: dict[str, Any] = {"run": str(run)}
    reported: list[Result] = []
    if config.store is not None:
        figures["retrieval"], reported = evaluate_store(subject, config, config.store)
    if config.classes is not None:
        figures["zero_shot"] = evaluate_classes(subject, config, config.classes)
    if tasks:
        known, unchecked = tuned_on(run) if config.contamination and distributed.is_main() else ([], "")
        bfloat16 = config.text_precision == "bfloat16"
        subject = replace(subject, bfloat16=bfloat16, tuned_on=known, unchecked=unchecked)
        results, failed = evaluate_tasks(subject, config, tasks)
        failures += failed.values()
        figures["failed"] = [{"task": task, "reason": str(why)} for task, why in failed.items()]
        figures["tasks"] = [plain(result) for result in results]
        figures["means"] = group_means(results)
        reported += results
    return figures, reported


def evaluate_tasks(
    subject: Subject, config: EvalConfig, tasks: Sequence[Task]
) -> tuple[list[Result], dict[str, LituneError]]:
    """The results of all tasks, and of those that failed, why: the others are measured all the same."""
    protocol, features = _protocol(config), _features(config)
    results: list[Result] = []
    failures: dict[str, LituneError] = {}
    for task in tasks:
        try:
            of_task = run_task(task, subject, protocol, config.data, features)
        except LituneError as why:
            say(f"{task.name} failed: {why}")
            failures[task.name] = why
            continue
        for result in of_task:
            say(f"{subject.name}: {heading(result)}: {result.metric} {result.values[result.metric]:.1%}")
        results += of_task
    return results, failures


def evaluate_store(subject: Subject, config: EvalConfig, store: Path) -> tuple[dict[str, Any], list[Result]]:
    """Recall@k both ways on the pairs of a store; with `config.by_lang`, also of each language by itself."""
    task = Task(store.absolute().name, "", kind="retrieval", metric="text_to_image recall@1", path=store)
    images, embedded = distributed.together(
        lambda: open_store(store, task.kind, subject.path, subject.model, split=config.split, lang=config.lang)
    )
    if config.by_lang and not images.langs:
        raise DataError(f"{store} has no languages, --by-lang asks for them: embed with a lang column")
    langs = images.languages if config.by_lang else []
    results = retrieve(_alone(task, images, subject, config), embedded, ["", *langs])
    damaged = results[0].protocol["damaged"]
    bare = [result for result in results if "hub_correction" not in result.protocol]
    figures = _store_figures(bare, config.by_lang)
    figures |= {"store": str(store), "split": config.split, "lang": list(config.lang), "damaged": damaged}
    if corrected := [result for result in results if "hub_correction" in result.protocol]:
        figures["hubs_corrected"] = _store_figures(corrected, config.by_lang)
    return figures, results


def _store_figures(results: Sequence[Result], by_lang: bool) -> dict[str, Any]:
    """The figures of all captions, which come first, and of each language by itself."""
    figures = plain_retrieval(results[0]) | {"definition": results[0].definition}
    if by_lang:
        figures["by_lang"] = {result.lang: plain_retrieval(result) for result in results[1:]}
    return figures


def evaluate_classes(subject: Subject, config: EvalConfig, folder: Path) -> dict[str, Any]:
    """Zero-shot accuracy on a tree of class folders, or on a feature store made from one."""
    task = Task(folder.absolute().name, "", path=folder)

    def open_images() -> tuple[EvalSet, Embedded | None]:
        if (folder / MANIFEST).exists():
            return open_store(folder, task.kind, subject.path, subject.model)
        return class_tree(folder, folder), None

    images, embedded = distributed.together(open_images)
    evaluation = _alone(task, images, subject, config)
    result = classify(evaluation, embedded)
    return plain_classification(result) | {
        "templates": list(evaluation.protocol.templates),
        "classes_at": str(folder),
        "class_names": [prompted_name(name, config.canonical) for name in images.classes],
        "damaged": result.protocol["damaged"],
        "definition": result.definition,
    }


def _protocol(config: EvalConfig) -> Protocol:
    return Protocol(
        template_set=config.template_set,
        templates=read_templates(config.templates) if config.templates else (),
        canonical=config.canonical,
        calibration=config.calibration,
        shots=config.kshot,
        probes=config.probes,
        contamination=config.contamination,
        by_lang=config.by_lang,
        hub_correction=config.hub_correction,
        max_damaged=config.max_damaged,
    )


def _alone(task: Task, images: EvalSet, subject: Subject, config: EvalConfig) -> Evaluation:
    """The evaluation of --store or --classes: the figures, and nothing beside them."""
    protocol = replace(
        _protocol(config),
        templates=read_templates(config.templates),
        calibration=False,
        shots=0,
        probes=False,
        contamination=False,
    )
    return Evaluation(task, images, subject, protocol, _features(config))


def _features(config: EvalConfig) -> Path:
    return config.features or cache_folder() / "features"
