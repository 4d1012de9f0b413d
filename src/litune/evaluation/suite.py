"""One task, one run → a `Result`: the set's images embedded once per tower, the run's texts, then scores in blocks.

Features of a set are kept in a feature store that every later evaluation with the same tower shares; a `Result` has the
outcome of every example, so that reports can say how sure a figure is and what was wrong.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from litune import distributed
from litune.devices import send
from litune.errors import LituneError
from litune.evaluation import class_vectors as prompts
from litune.evaluation import published, retrieval, tasks, zero_shot
from litune.evaluation.result import Result
from litune.evaluation.set_features import Embedded, embed_set, stored_set
from litune.model.lit import LiT, scoring_device
from litune.model.run_folder import check_store
from litune.pairs.benchmarks import EvalSet
from litune.pairs.reference import absolute, is_there
from litune.progress import say, track
from litune.prompts import prompted_name, write_prompts
from litune.store.store import MANIFEST, FeatureStore

TEXTS = 8192  # captions that are encoded at once
CHUNK = 1024  # texts that one rank encodes at a time
CALIBRATED = 10_000  # images whose whole rows of logits are kept for calibration
KS = (1, 5, 10)

Training = tuple[Embedded, np.ndarray, list[np.ndarray]]
"""Training images, their classes, and the positions of those that each draw of few shots takes."""


@dataclass(frozen=True)
class Protocol:
    """How a run is evaluated: what its figures depend on beside the run and the set."""

    template_set: prompts.TemplateSet = "lit"
    templates: tuple[str, ...] = ()
    """Templates of the user's own, instead of a set."""
    canonical: bool = True
    bfloat16: bool = False
    """Texts are encoded in bfloat16."""
    calibration: bool = True
    shots: int = 0
    probes: bool = False
    contamination: bool = True
    by_lang: bool = False
    max_damaged: float = 0.01


@dataclass
class Subject:
    """A run that is evaluated, with what its evaluations share."""

    name: str
    path: Path
    model: LiT
    bfloat16: bool = False
    tuned_on: Sequence[tuple[FeatureStore, np.ndarray]] = ()
    """The stores that it was tuned on and which of their rows, where they are still there."""
    unchecked: str = ""
    """Why it can't be told whether images were tuned on, where that is so."""
    vectors: prompts.ClassVectors = field(init=False)

    def __post_init__(self) -> None:
        self.vectors = prompts.ClassVectors(self.encode_text)

    def encode_text(self, texts: list[str]) -> Float[Tensor, "N D"]:
        """Features of N texts; each rank encodes whole chunks, so that a text has the company that it has in one."""
        device = self.model.logit_scale.device.type
        precision: AbstractContextManager[Any] = (
            torch.autocast(device, torch.bfloat16) if self.bfloat16 else nullcontext()
        )
        own = distributed.own_part(len(texts), CHUNK)
        parts = [torch.empty(0, self.model.dim)]
        with precision:
            for start in own[::CHUNK]:
                parts.append(self.model.encode_text(texts[start : min(start + CHUNK, own.stop)]).float())
        return distributed.gather_rows(torch.cat(parts))


# Tasks ---------------------------------------------------------------------------------------------------------------


def run_task(task: tasks.Task, subject: Subject, protocol: Protocol, data: Path | None, features: Path) -> list[Result]:
    """The results of one task: one, or one for each language of its captions.

    Under torchrun every process calls it alike and encodes its part of the images and texts; rank 0 measures. Raises
    `DataError` for a set that can't be read, `StoreError` for a store of another tower: on every process, whichever met
    it.
    """
    path = task.find(data)
    assert path is not None, "find_tasks has looked"
    found, embedded = distributed.together(lambda: _open_set(task, path, subject))
    run = _retrieve_set if task.kind == "retrieval" else _classify_set
    results = run(task, path, found, embedded, subject, protocol, features)
    for result in results:
        if known := published.published_shares(result.task, result.lang):
            result.extras["published"] = known
            result.extras["published_note"] = published.note(result)
    return results


def _open_set(task: tasks.Task, path: Path, subject: Subject) -> tuple[EvalSet, Embedded | None]:
    """The set, and where it is a feature store, its features."""
    if not (path / MANIFEST).is_file():
        return task.read(path), None
    found, embedded = stored_set(path, task.kind, None, (task.lang,) if task.lang else ())
    check_store(subject.path, subject.model, path, embedded.store.width, embedded.store.tower)
    return found, embedded


def _retrieve_set(
    task: tasks.Task,
    path: Path,
    found: EvalSet,
    embedded: Embedded | None,
    subject: Subject,
    protocol: Protocol,
    features: Path,
) -> list[Result]:
    seconds: dict[str, float] = {}
    if embedded is None:
        with _timed(seconds, "images"):
            embedded = embed_set(found, task.name, subject.model, features, protocol.max_damaged)
    several = protocol.by_lang or (task.name == "wit" and not task.lang)
    languages = found.languages if several else []
    parts = [(lang, *_in_language(found, embedded, lang)) for lang in languages] or [("", found, embedded)]
    return [retrieve(task, one, some, subject, protocol, lang, dict(seconds)) for lang, one, some in parts]


def _classify_set(
    task: tasks.Task,
    path: Path,
    found: EvalSet,
    embedded: Embedded | None,
    subject: Subject,
    protocol: Protocol,
    features: Path,
) -> list[Result]:
    seconds: dict[str, float] = {}
    truth = distributed.together(lambda: tasks.find_truth(task, found))
    if embedded is None:
        # Two thirds of ObjectNet's images are of classes that are none of ImageNet's.
        kept = found.subset(truth.rows) if task.truth == "objectnet" else found
        shared = task.truth == "real" or task.name.startswith("babel-imagenet")
        with _timed(seconds, "images"):
            name = "imagenet1k" if shared else task.name
            embedded = embed_set(kept, name, subject.model, features, protocol.max_damaged)
        if kept is not found:
            embedded = replace(embedded, rows=truth.rows[embedded.rows])
    embedded = embedded.of(truth.rows)
    train = _training_images(task, path, found, truth, subject, protocol, features)
    prompted = embed_classes(task, found, truth, subject, protocol, seconds)

    def measure() -> Result:
        result = classify(task, found, truth, embedded, prompted, subject, protocol, seconds)
        result.extras.update(_contamination(found, embedded, subject, protocol))
        result.extras.update(_probe(truth, embedded, train, protocol) if train else {})
        return result

    return [distributed.from_main(measure)]


def _in_language(found: EvalSet, embedded: Embedded, lang: str) -> tuple[EvalSet, Embedded]:
    """The captions in one language, and the images that have some."""
    place = {key: row for row, key in enumerate(found.keys)}
    only = found.in_language(lang)
    rows = np.array([place[key] for key in only.keys])
    some = embedded.of(rows)
    number = {int(row): i for i, row in enumerate(rows)}
    return only, replace(some, rows=np.array([number[int(row)] for row in some.rows], np.int64))


@dataclass(frozen=True)
class Prompted:
    """The vectors [C, D] of a task's classes, and the prompts that they are made of."""

    weights: Float[Tensor, "C D"]
    templates: tuple[str, ...]
    template_set: str
    texts: int
    """How many were encoded for it; others were known."""


def embed_classes(
    task: tasks.Task,
    found: EvalSet,
    truth: tasks.Truth,
    subject: Subject,
    protocol: Protocol,
    seconds: dict[str, float],
) -> Prompted:
    """The vectors of the task's classes under the protocol's templates, or under its own."""
    own = protocol.templates or (task.templates if isinstance(task.templates, tuple) else ())
    templates = own or prompts.pick_templates(protocol.template_set, tasks.task_templates(task, found))
    before = subject.vectors.texts
    joined = [name for name in truth.names if re.search(r"\w[^\w\s,]+\w", name.replace("_", " "))]
    if joined and protocol.canonical and task.name.partition(":")[0] not in tasks.TASKS:  # somebody typed the names
        say(
            f"{task.name}: {joined[0]!r} is asked for as {prompted_name(joined[0])!r}, in the field's canonical form: "
            "write a space, or give --no-canonical"
        )
    with _timed(seconds, "texts"):
        weights = subject.vectors(truth.names, templates, canonical=protocol.canonical)
    return Prompted(weights, templates, "own" if own else protocol.template_set, subject.vectors.texts - before)


def classify(
    task: tasks.Task,
    found: EvalSet,
    truth: tasks.Truth,
    embedded: Embedded,
    prompted: Prompted,
    subject: Subject,
    protocol: Protocol,
    seconds: dict[str, float],
) -> Result:
    """Zero-shot classification of a set's images among the task's classes."""
    accepted_of = dict(zip(truth.rows.tolist(), truth.accepted, strict=True))
    accepted = [accepted_of[int(row)] for row in embedded.rows]
    weights, model = prompted.weights, subject.model
    scale = float(model.scale.detach())
    with _timed(seconds, "scores"):
        outcomes = zero_shot.classify(embedded.blocks(model), weights, accepted, scale)
    labels = np.array([p if p in one else one[0] for p, one in zip(outcomes.predicted, accepted, strict=True)])
    hits = outcomes.hits.astype(np.float64)
    per_class = [hits[labels == one].mean() for one in np.unique(labels)]
    values = {"accuracy": float(hits.mean())}
    kept = {"accuracy": hits}
    groups = {}
    if truth.single:
        values["mean_per_class"] = float(np.mean(per_class))
        kept["mean_per_class"], groups["mean_per_class"] = hits, labels
    if len(truth.names) > 5:
        kept["top5"] = (outcomes.ahead < 5).astype(np.float64)
        values["top5"] = float(kept["top5"].mean())
    by_chance = tasks.chance(truth)
    chance = {name: by_chance for name in values if name != "top5"}
    if "top5" in values and truth.single:
        chance["top5"] = 5 / len(truth.names)
    extras: dict[str, Any] = {"seconds": seconds, "texts": prompted.texts}
    if protocol.calibration:
        extras["calibration"] = _calibrate(embedded, model, weights, labels, scale)
    keys, pictures = _described(found, embedded)
    definition = zero_shot.DEFINITION if truth.single else zero_shot.DEFINITION + SEVERAL
    return Result(
        task=task.name,
        kind="classification",
        metric=task.metric if task.metric in values else "accuracy",
        values=values,
        chance=chance,
        definition=definition,
        images=len(embedded.rows),
        protocol=_protocol(task, found, embedded, subject, protocol)
        | {
            "templates": len(prompted.templates),
            "template_set": prompted.template_set,
            "example": write_prompts(truth.names[:1], prompted.templates[:1], protocol.canonical)[0],
            "canonical_names": protocol.canonical,
            "classes": len(truth.names),
            "classes_with_equal_prompts": _equal(weights),
            "classes_matched": truth.note,
        },
        outcomes=kept,
        groups=groups,
        keys=keys,
        pictures=pictures,
        hashes=embedded.hashes,
        class_names=list(truth.names),
        labels=labels,
        predicted=outcomes.predicted,
        confidence=outcomes.confidence,
        captions=[],
        owner=None,
        found=None,
        lang=task.lang,
        extras=extras,
    )


SEVERAL = (
    " An image may have several right classes: any of them counts. In per-class tables its class is the predicted one "
    "where that is right, else the first of them."
)


def _equal(weights: Float[Tensor, "C D"]) -> int:
    """How many classes have the same vector as another: they tie, which counts against the model."""
    counts = weights.unique(dim=0, return_counts=True)[1]
    return int(counts[counts > 1].sum())


def _calibrate(
    embedded: Embedded, model: LiT, weights: Float[Tensor, "C D"], labels: np.ndarray, scale: float
) -> dict[str, Any]:
    """Calibration on at most `CALIBRATED` images, drawn at random; none of fewer than 20."""
    from litune.evaluation.calibration import calibrate

    if len(labels) < 20:
        return {}
    chosen = np.arange(len(labels))
    if len(labels) > CALIBRATED:
        chosen = np.sort(np.random.default_rng(0).choice(len(labels), CALIBRATED, replace=False))
    raw = embedded.store.features(embedded.places[chosen])
    logits = scale * (model.encode_features(raw) @ weights.T)
    return {**calibrate(logits.numpy(), labels[chosen], seed=0), "images": len(chosen)}


def retrieve(
    task: tasks.Task,
    found: EvalSet,
    embedded: Embedded,
    subject: Subject,
    protocol: Protocol,
    lang: str,
    seconds: dict[str, float],
) -> Result:
    """Retrieval both ways among a set's images and their captions."""
    captions = [found.captions[row] for row in embedded.rows]
    owner = np.repeat(np.arange(len(captions)), [len(one) for one in captions])
    flat = [caption for one in captions for caption in one]
    with _timed(seconds, "texts"):
        texts = encode_captions(subject, flat)

    def measure() -> Result:
        with _timed(seconds, "scores"):
            images = torch.cat([torch.empty(0, subject.model.dim), *embedded.blocks(subject.model)])
            images = send(images, scoring_device(subject.model))
            ranks = retrieval.rank(images, texts, torch.from_numpy(owner))
        keys, pictures = _described(found, embedded)
        facts = _protocol(task, found, embedded, subject, protocol) | {"captions": len(flat)}
        result = retrieval_result(
            task.name, ranks, owner, flat, keys, pictures, embedded.hashes, facts, lang or task.lang
        )
        result.extras.update({"seconds": seconds, "texts": len(set(flat))})
        result.extras.update(_contamination(found, embedded, subject, protocol))
        return result

    return distributed.from_main(measure)


def encode_captions(subject: Subject, captions: list[str]) -> Float[Tensor, "N D"]:
    """Features of captions; each distinct one is encoded once."""
    distinct = list(dict.fromkeys(captions))
    parts = [torch.empty(0, subject.model.dim)]
    with track("encoding", "captions", len(distinct)) as task:
        for start in range(0, len(distinct), TEXTS):
            parts.append(subject.encode_text(distinct[start : start + TEXTS]))
            task.advance(len(parts[-1]))
    place = {caption: i for i, caption in enumerate(distinct)}
    return torch.cat(parts)[[place[caption] for caption in captions]]


def retrieval_result(
    name: str,
    ranks: retrieval.Ranks,
    owner: np.ndarray,
    captions: list[str],
    keys: list[str],
    pictures: list[str],
    hashes: list[str],
    protocol: dict[str, Any],
    lang: str = "",
) -> Result:
    """A `Result` out of ranks."""
    hits = {figure: one.astype(np.float64) for figure, one in ranks.hits(KS).items()}
    by_chance = retrieval.figures(ranks, owner, KS)["chance"]
    chance = {f"{way} {k}": share for way, row in by_chance.items() for k, share in row.items()}
    return Result(
        task=name,
        kind="retrieval",
        metric="text_to_image recall@1",
        values={figure: float(one.mean()) for figure, one in hits.items()},
        chance=chance,
        definition=retrieval.DEFINITION,
        images=len(keys),
        protocol=protocol,
        outcomes=hits,
        groups={figure: owner for figure in hits if figure.startswith("text_to_image")},
        keys=keys,
        pictures=pictures,
        hashes=hashes,
        class_names=[],
        labels=None,
        predicted=None,
        confidence=None,
        captions=captions,
        owner=owner,
        found=ranks.found,
        lang=lang,
    )


def _described(found: EvalSet, embedded: Embedded) -> tuple[list[str], list[str]]:
    """Keys of the embedded images, and references to their pictures where these are still there."""
    pictures = [absolute(found.pictures[row]) for row in embedded.rows]
    return [found.keys[row] for row in embedded.rows], [one if is_there(one) else "" for one in pictures]


def _protocol(
    task: tasks.Task, found: EvalSet, embedded: Embedded, subject: Subject, protocol: Protocol
) -> dict[str, Any]:
    tower = embedded.store.tower or {}
    facts: dict[str, Any] = {
        "set": str(found.path),
        "layout": found.layout,
        "damaged": embedded.damaged,
        "features": str(embedded.store.path),
        "image_tower": tower.get("spec", "unknown"),
        "text_precision": "bfloat16" if protocol.bfloat16 else "float32",
        "temperature": float(subject.model.scale.detach()),
    }
    if task.subset:
        facts["class_subset"] = task.subset
    if languages := [task.lang] if task.lang else found.languages:
        facts["languages"] = languages
    return facts


def _training_images(
    task: tasks.Task,
    path: Path,
    found: EvalSet,
    truth: tasks.Truth,
    subject: Subject,
    protocol: Protocol,
    features: Path,
) -> Training | None:
    """The set's training images that the probes need, embedded; None where there are none."""
    if not (protocol.shots or protocol.probes):
        return None
    from litune.evaluation import probes

    if not truth.single or (path / MANIFEST).is_file():
        say(f"{task.name}: no probes, which need training images with one class each")
        return None

    def read() -> tuple[EvalSet, tasks.Truth]:
        images = task.read(task.train or path, train=True)
        return images, tasks.find_truth(task, images)

    try:
        train, own = distributed.together(read)
    except LituneError as why:
        say(f"{task.name}: no probes: {why}")
        return None
    if train.path == found.path and train.keys == found.keys:
        say(f"{task.name}: no probes: there is no training split beside the images that are evaluated")
        return None
    labels = np.array([int(one[0]) for one in own.accepted])
    train = train.subset(own.rows)
    draws = probes.draw_shots(labels, protocol.shots)
    if not protocol.probes:  # few images are enough: only these are embedded
        few = np.unique(np.concatenate(draws))
        train, labels, draws = train.subset(few), labels[few], [np.searchsorted(few, rows) for rows in draws]
    there = embed_set(train, f"{task.name}-train", subject.model, features, protocol.max_damaged)
    return there, labels[there.rows], [np.flatnonzero(np.isin(there.rows, rows)) for rows in draws]


def _probe(truth: tasks.Truth, embedded: Embedded, train: Training, protocol: Protocol) -> dict[str, Any]:
    """What the image features alone tell of the classes, learned from the set's training images."""
    from litune.evaluation import probes

    label_of = {int(row): int(one[0]) for row, one in zip(truth.rows, truth.accepted, strict=True)}
    test = embedded.raw(), np.array([label_of[int(row)] for row in embedded.rows])
    there, labels, draws = train
    given = there.raw(), labels
    said = {}
    if protocol.shots:
        said["ridge"] = probes.ridge(*given, *test, shots=protocol.shots, draws=draws)
    if protocol.probes:
        said["linear"] = probes.linear_probe(*given, *test, seed=0)
        said["knn"] = probes.knn(*given, *test)
    return said


def _contamination(found: EvalSet, embedded: Embedded, subject: Subject, protocol: Protocol) -> dict[str, Any]:
    """How many of the images the run was tuned on, exactly or nearly, where its store is still there."""
    if protocol.contamination and subject.unchecked:
        return {"unchecked": f"not checked whether images were tuned on: {subject.unchecked}"}
    if not protocol.contamination or not subject.tuned_on:
        return {}
    from litune.evaluation.contamination import overlap_with

    # The features of an image tower that was tuned are not those of the store that its tuning began with.
    raw = None if subject.model.image_tuned else embedded.raw()
    keys = [found.keys[row] for row in embedded.rows]
    return {"contamination": overlap_with(subject.tuned_on, embedded.hashes, raw, keys=keys)}


class _timed:  # noqa: N801
    """Seconds inside a `with`, under a name."""

    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self.seconds, self.name = seconds, name

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.name] = round(time.perf_counter() - self.began, 3)
