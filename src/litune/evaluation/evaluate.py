"""Run → numbers: named evaluation sets, retrieval on a store's pairs, zero-shot classification on class folders."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from litune import distributed
from litune.config import EvalConfig, TuneConfig, command, from_json
from litune.devices import send
from litune.errors import DataError, LituneError, StoreError
from litune.evaluation import retrieval as retrieval_metrics
from litune.evaluation import zero_shot as zero_shot_metrics
from litune.evaluation.figures import figures
from litune.evaluation.intervals import DEFINITION as INTERVALS
from litune.evaluation.intervals import interval
from litune.evaluation.result import Result
from litune.evaluation.suite import Protocol, Subject, retrieval_result, run_task
from litune.evaluation.tasks import Task, find_tasks, group_means
from litune.files import cache_folder, check_file, read_json, write_json
from litune.image.encoding import encode_images, pick_runtime
from litune.image.registry import differences
from litune.model.lit import LiT, scoring_device
from litune.model.run_folder import CONFIG, check_store, load
from litune.model.run_folder import MANIFEST as RUN_MANIFEST
from litune.pairs.pairs import class_folders
from litune.progress import say, track
from litune.prompts import prompted_name, read_templates
from litune.store.selection import Selection, choose_mixture
from litune.store.store import MANIFEST, FeatureStore, library_versions

CHUNK = 2048  # captions that one rank encodes at a time
BATCH = 32  # images: parts of ranks are whole batches


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
    found: dict[str, dict[str, Any]] = {}
    reported: dict[str, list[Result]] = {}
    failures: list[LituneError] = []
    for name, run in names.items():
        found[name], reported[name] = measure(config, name, run, tasks, failures)
    if failures and config.classes is None and not any(reported.values()):
        raise failures[0]
    results: dict[str, Any] = found[next(iter(names))] if len(names) == 1 else {"runs": found}
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
    model = load(run, image_tower=config.image_tower, device=config.device)
    results: dict[str, Any] = {"run": str(run)}
    reported: list[Result] = []
    if config.store is not None:
        results["retrieval"], more = evaluate_retrieval(model, config, run, FeatureStore(config.store))
        reported += more
    if config.classes is not None:
        results["zero_shot"] = evaluate_classes(model, config, run, config.classes)
    if tasks:
        known, unchecked = tuned_on(run) if config.contamination and distributed.is_main() else ([], "")
        subject = Subject(name, run, model, config.text_precision == "bfloat16", known, unchecked)
        found, failed = evaluate_tasks(subject, config, tasks)
        failures += failed.values()
        results["failed"] = [{"task": task, "reason": str(why)} for task, why in failed.items()]
        results["tasks"] = [plain(one) for one in found]
        results["means"] = group_means(found)
        reported += found
    return results, reported


def evaluate_tasks(
    subject: Subject, config: EvalConfig, tasks: Sequence[Task]
) -> tuple[list[Result], dict[str, LituneError]]:
    """The results of all tasks, and of those that failed, why: the others are measured all the same."""
    protocol = Protocol(
        template_set=config.template_set,
        templates=read_templates(config.templates) if config.templates else (),
        canonical=config.canonical,
        bfloat16=config.text_precision == "bfloat16",
        calibration=config.calibration,
        shots=config.kshot,
        probes=config.probes,
        contamination=config.contamination,
        by_lang=config.by_lang,
        max_damaged=config.max_damaged,
    )
    features = config.features or cache_folder() / "features"
    results: list[Result] = []
    failures: dict[str, LituneError] = {}
    for task in tasks:
        try:
            found = run_task(task, subject, protocol, config.data, features)
        except LituneError as why:
            say(f"{task.name} failed: {why}")
            failures[task.name] = why
            continue
        for one in found:
            say(f"{subject.name}: {heading(one)}: {one.metric} {one.values[one.metric]:.1%}")
        results += found
    return results, failures


def heading(result: Result) -> str:
    """The task, and the language where its name does not say it."""
    return result.task if result.lang in ("", *result.task.split(":")[1:]) else f"{result.task} {result.lang}"


def plain(result: Result) -> dict[str, Any]:
    """The figures of a result as plain JSON values, without the examples."""
    kept = ("task", "kind", "metric", "lang", "values", "chance", "definition", "images", "protocol", "extras")
    return {"name": heading(result)} | {name: getattr(result, name) for name in kept} | {"interval": intervals(result)}


def intervals(result: Result) -> dict[str, list[float]]:
    """The ends of the 95% bootstrap interval of each figure whose examples' outcomes are known."""
    known = figures(result).items()
    return {name: [one.low, one.high] for name, one in known if one.low is not None and one.high is not None}


def tuned_on(run: Path) -> tuple[list[tuple[FeatureStore, np.ndarray]], str]:
    """The stores that a run was tuned on with their rows; or none, and why, where they are not there any more."""
    if not (run / CONFIG).is_file():
        return [], f"{run / CONFIG} is missing"
    try:
        config = from_json(TuneConfig, read_json(run / CONFIG, DataError))
        manifest = read_json(run / RUN_MANIFEST, DataError)
        described = manifest.get("sources", {"": manifest.get("store", {})}).values()
        stores = [_find_store(run, *one) for one in zip(config.stores, described, strict=True)]
        with redirect_stderr(io.StringIO()):  # what is said of the choice was said before tuning
            train, _ = choose_mixture(stores, config)
        return [(one.store, one.rows) for one in train.sources], ""
    except (LituneError, TypeError, ValueError) as why:
        return [], str(why)


def _find_store(run: Path, path: Path, described: dict[str, Any]) -> FeatureStore:
    """The store that `tune` was given as `path`: as seen from here, or from the run or a folder above it."""
    for place in (Path(), *run.absolute().parents):
        with suppress(StoreError):
            store = FeatureStore(place / path)
            if store.manifest.get("pairs") == described.get("pairs"):
                return store
    raise StoreError(f"{path}, which it was tuned on, is neither here nor beside the run")


def evaluate_retrieval(
    model: LiT, config: EvalConfig, run: Path, store: FeatureStore
) -> tuple[dict[str, Any], list[Result]]:
    """Recall@k both ways on the pairs of a store; with `config.by_lang`, also of each language by itself."""
    pairs = store.select(config.split, config.lang)
    damaged = 0
    if model.image_tuned and (store.tower is None or differences(model.image_provenance or {}, store.tower)):
        say(f"{store.path} has the features of another tower: encoding its pictures with that of {run}")
        images, kept = encode_files(model, pairs.image_files, config.max_damaged)
        damaged = len(pairs) - len(kept)
        pairs = pairs.subset(kept)
    else:
        check_store(run, model, store.path, store.width, store.tower)
        images = encode_stored(model, store, pairs.rows)
    captions = pairs.captions
    own = distributed.own_part(len(captions), CHUNK)
    parts = [torch.empty(0, model.dim)]
    with track("encoding", "captions", len(own)) as task:
        for start in own[::CHUNK]:
            parts.append(model.encode_text(captions[start : min(start + CHUNK, own.stop)]))
            task.advance(len(parts[-1]))
    texts = distributed.gather_rows(torch.cat(parts))
    about = {"store": str(store.path), "split": config.split, "lang": list(config.lang), "damaged": damaged}
    reported: list[Result] = []

    def measured(lang: str) -> dict[str, Any]:
        where = scoring_device(model)
        found, result = rank_pairs(
            send(images, where), send(texts, where), pairs, lang, {**about, "temperature": float(model.scale.detach())}
        )
        reported.append(result)
        return found

    def measure() -> dict[str, Any]:
        found = measured("") | about | {"definition": retrieval_metrics.DEFINITION}
        if config.by_lang:
            found["by_lang"] = {lang: measured(lang) for lang in languages(pairs)}
        return found

    return distributed.from_main(measure), reported


def languages(pairs: Selection) -> list[str]:
    """The languages of the captions, sorted. Raises `DataError` where they have none."""
    if pairs.langs is None:
        raise DataError(f"{pairs.store.path} has no languages, --by-lang asks for them: embed with a lang column")
    return sorted({one for one in pairs.langs if one})


def rank_pairs(
    images: torch.Tensor, texts: torch.Tensor, pairs: Selection, lang: str, facts: dict[str, Any]
) -> tuple[dict[str, Any], Result]:
    """Figures and result of all captions, or of those in one language and their images alone."""
    owner = pairs.owner
    there = np.arange(len(owner))
    if lang and pairs.langs:
        there = np.flatnonzero(np.array(pairs.langs) == lang)
    kept, own = np.unique(owner[there], return_inverse=True)
    ranks = retrieval_metrics.rank(
        images[torch.from_numpy(kept)], texts[torch.from_numpy(there)], torch.from_numpy(own)
    )
    pictures = pairs.image_files
    hashes = pairs.column("sha256")
    result = retrieval_result(
        pairs.store.path.absolute().name,
        ranks,
        own,
        pairs.take_captions(there).to_pylist(),
        [pairs.keys[i] for i in kept],
        [pictures[i] if Path(pictures[i]).is_file() else "" for i in kept],
        [hashes[int(i)].as_py() for i in kept] if hashes is not None else [""] * len(kept),
        facts,
        lang,
    )
    found = retrieval_metrics.figures(ranks, own)
    ends = intervals(result)
    ways = ("text_to_image", "image_to_text")
    return found | {"interval": {way: {k: ends[f"{way} {k}"] for k in found[way]} for way in ways}}, result


def encode_stored(model: LiT, store: FeatureStore, rows: np.ndarray) -> torch.Tensor:
    """Features [N, D] of these rows of a store, of which every rank encodes its part."""
    own = distributed.own_part(len(rows), 8192)
    blocks = store.blocks(rows[own.start : own.stop])
    return distributed.gather_rows(torch.cat([torch.empty(0, model.dim), *map(model.encode_features, blocks)]))


def evaluate_classes(model: LiT, config: EvalConfig, run: Path, where: Path) -> dict[str, Any]:
    """Zero-shot accuracy on a tree of class folders, or on a feature store made from one."""
    damaged = 0
    if (where / MANIFEST).exists():
        store = FeatureStore(where)
        check_store(run, model, where, store.width, store.tower)
        if "label" not in store.metadata.column_names:
            raise DataError(f"{where} has no classes: embed a tree with one folder of images per class")
        owners = store.metadata["label"].to_pylist()
        names = sorted(set(owners))
        features = encode_stored(model, store, np.arange(len(store)))
    else:
        tree = class_folders(where)
        names = list(tree)
        owners, features, damaged = encode_tree(model, tree, config.max_damaged)
    number = {name: i for i, name in enumerate(names)}
    labels = torch.tensor([number[owner] for owner in owners])

    def measure() -> dict[str, Any]:
        classifier = model.zero_shot(names, config.templates)
        scores = classifier.scores(features)
        hits = (zero_shot_metrics.ahead_of_own(scores, labels) == 0).double().numpy()
        ends = {"accuracy": interval(hits), "mean_per_class": interval(hits, labels.numpy(), per_group_mean=True)}
        found = zero_shot_metrics.accuracy(scores, labels)
        return found | {"interval": {k: list(v) for k, v in ends.items()}, "templates": classifier.templates}

    return distributed.from_main(measure) | {
        "classes_at": str(where),
        "class_names": [prompted_name(name) for name in names],
        "damaged": damaged,
        "definition": zero_shot_metrics.DEFINITION,
    }


def encode_tree(model: LiT, tree: dict[str, list[Path]], max_damaged: float) -> tuple[list[str], torch.Tensor, int]:
    """The class of every readable image, the images' features [B, D], and how many could not be read."""
    owners = [name for name, images in tree.items() for _ in images]
    features, kept = encode_files(model, [file for images in tree.values() for file in images], max_damaged)
    return [owners[i] for i in kept], features, len(owners) - len(kept)


def encode_files(model: LiT, files: Sequence[Path | str], max_damaged: float) -> tuple[torch.Tensor, np.ndarray]:
    """Features [B, D] of the image files that can be read, and their positions [B] among `files`.

    Every rank encodes its part. Raises `DataError` where more than the share `max_damaged` can't be read, or none can.
    """
    tower = model.load_image_tower()
    kept: list[int] = []
    own = distributed.own_part(len(files), BATCH)
    parts, damaged = [torch.empty(0, model.dim)], 0

    def locate(i: int) -> tuple[str, Path]:
        return str(files[i]), Path(files[i])

    name = "auto" if distributed.world_size() == 1 else "torch"
    runtime = pick_runtime(tower, own, locate, name=name, precision="float32", batch_size=None)

    def encode() -> None:
        nonlocal damaged
        with track("embedding", "images", len(own)) as task:
            for batch, features in encode_images(runtime, tower.preprocess, own, locate, batch_size=runtime.batch_size):
                for one in batch:
                    if one.damage is None:
                        kept.append(one.row)
                        continue
                    damaged += 1
                    say(f"skipped {one.key}: {one.damage.reason}")
                    if damaged > max_damaged * len(files):
                        raise DataError(
                            f"{damaged:,} of {len(files):,} images can't be read (at most {max_damaged:.1%} may): "
                            f"{one.key}: {one.damage.reason}; mend or remove them, or raise --max-damaged"
                        )
                if features is not None:
                    parts.append(model.encode_features(features))
                task.advance(len(batch))

    distributed.together(encode)
    kept = [row for part in distributed.gather_objects(kept) for row in part]
    damaged = distributed.sum_counts(damaged)
    if damaged > max_damaged * len(files):
        raise DataError(f"{damaged:,} of {len(files):,} images can't be read (at most {max_damaged:.1%} may)")
    if not kept:
        raise DataError(f"none of the {len(files):,} images can be read")
    return distributed.gather_rows(torch.cat(parts)), np.array(kept)
