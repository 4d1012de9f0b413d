"""One run on one set → a `Result`: the images embedded once per tower, the run's texts, then scores in blocks.

Features of a set are kept in a feature store that every later evaluation with the same tower shares; a `Result` has the
outcome of every example, so that reports can say how sure a figure is and what was wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from litune import distributed
from litune.devices import send
from litune.evaluation import class_vectors, extras, published, retrieval, tasks, zero_shot
from litune.evaluation.embedded import Embedded, open_set
from litune.evaluation.result import Result
from litune.evaluation.subject import Evaluation, Protocol, Subject
from litune.model.lit import scoring_device
from litune.pairs.reference import absolute, is_there
from litune.progress import say
from litune.prompts import prompted_name, write_prompts

KS = (1, 5, 10)
SEVERAL = (
    " An image may have several right classes: any of them counts. In per-class tables its class is the predicted one "
    "where that is right, else the first of them."
)


def run_task(task: tasks.Task, subject: Subject, protocol: Protocol, data: Path | None, features: Path) -> list[Result]:
    """The results of one task: one, or one for each language of its captions.

    Under torchrun every process calls it alike and encodes its part of the images and texts; rank 0 measures. Raises
    `DataError` for a set that can't be read, `StoreError` for a store of another tower: on every process, whichever met
    it.
    """
    path = task.find(data)
    assert path is not None, "find_tasks has looked"
    images, embedded = distributed.together(lambda: open_set(task, path, subject.path, subject.model))
    evaluation = Evaluation(task, images, subject, protocol, features)
    if task.kind == "retrieval":
        several = protocol.by_lang or (task.name == "wit" and not task.lang)
        results = retrieve(evaluation, embedded, images.languages if several else ())
    else:
        results = [classify(evaluation, embedded)]
    for result in results:
        if known := published.published_shares(result.task, result.lang):
            result.extras["published"] = known
            result.extras["published_note"] = published.note(result)
    return results


# Retrieval -----------------------------------------------------------------------------------------------------------


def retrieve(evaluation: Evaluation, embedded: Embedded | None, langs: Sequence[str] = ()) -> list[Result]:
    """Retrieval both ways among a set's images and captions, those of each language by themselves.

    Without languages, or for "", it is among all captions. `embedded` are the images where their features are known.
    """
    if embedded is None:
        embedded = evaluation.embed(evaluation.images, evaluation.task.name)
    captions = [caption for row in embedded.rows for caption in evaluation.images.captions[row]]
    with evaluation.timed("texts"):
        texts = evaluation.subject.encode_captions(captions)
    measure = partial(_rank, evaluation, embedded, captions, texts, langs or [""])
    return distributed.from_main(measure)


def _rank(
    evaluation: Evaluation, embedded: Embedded, captions: list[str], texts: Float[Tensor, "N D"], langs: Sequence[str]
) -> list[Result]:
    """One result for each of the languages."""
    images, model = evaluation.images, evaluation.subject.model
    features = torch.cat([torch.empty(0, model.dim), *embedded.blocks(model)])
    owner = np.repeat(np.arange(len(embedded.rows)), [len(images.captions[row]) for row in embedded.rows])
    lang_of = np.array([lang for row in embedded.rows for lang in images.langs[row]] if images.langs else [])
    results = []
    for lang in (lang for lang in langs if not lang or lang in lang_of):  # others have no picture that can be read
        chosen = np.flatnonzero(lang_of == lang) if lang else np.arange(len(captions))
        rows, own = np.unique(owner[chosen], return_inverse=True)
        with evaluation.timed("scores"):
            on_device = send(features[torch.from_numpy(rows)], scoring_device(model))
            ranks = retrieval.rank(on_device, texts[torch.from_numpy(chosen)], torch.from_numpy(own))
        of_lang = [captions[i] for i in chosen]
        results.append(_retrieval_result(evaluation, embedded.take(rows), ranks, own, of_lang, lang))
    return results


def _retrieval_result(
    evaluation: Evaluation,
    embedded: Embedded,
    ranks: retrieval.Ranks,
    owner: np.ndarray,
    captions: list[str],
    lang: str,
) -> Result:
    hits = {figure: hit.astype(np.float64) for figure, hit in ranks.hits(KS).items()}
    by_chance = retrieval.figures(ranks, owner, KS)["chance"]
    keys, pictures = _described(evaluation, embedded)
    return Result(
        task=evaluation.task.name,
        kind="retrieval",
        metric="text_to_image recall@1",
        values={figure: float(hit.mean()) for figure, hit in hits.items()},
        chance={f"{way} {k}": share for way, row in by_chance.items() for k, share in row.items()},
        definition=retrieval.DEFINITION,
        images=len(keys),
        protocol=_protocol(evaluation, embedded, lang) | {"captions": len(captions)},
        outcomes=hits,
        groups={figure: owner for figure in hits if figure.startswith("text_to_image")},
        keys=keys,
        pictures=pictures,
        hashes=embedded.hashes,
        class_names=[],
        labels=None,
        predicted=None,
        confidence=None,
        captions=captions,
        owner=owner,
        found=ranks.found,
        lang=lang or evaluation.task.lang,
        extras={"seconds": dict(evaluation.seconds), "texts": len(set(captions))}
        | extras.contamination(evaluation, embedded),
    )


# Classification ------------------------------------------------------------------------------------------------------


def classify(evaluation: Evaluation, embedded: Embedded | None) -> Result:
    """Zero-shot classification of a set's images among the task's classes.

    `embedded` are the images where their features are known.
    """
    truth = distributed.together(lambda: tasks.find_truth(evaluation.task, evaluation.images))
    embedded = (_embed_truth(evaluation, truth) if embedded is None else embedded).of(truth.rows)
    train = extras.training_images(evaluation, truth)
    prompted = embed_classes(evaluation, truth)

    def measure() -> Result:
        result = _classified(evaluation, truth, embedded, prompted)
        result.extras.update(extras.contamination(evaluation, embedded))
        result.extras.update(extras.probe(evaluation, truth, embedded, train) if train else {})
        return result

    return distributed.from_main(measure)


def _embed_truth(evaluation: Evaluation, truth: tasks.Truth) -> Embedded:
    """The set's images, embedded; those of ImageNet's images are shared by the tasks that are of them."""
    task, images = evaluation.task, evaluation.images
    if task.truth == "objectnet":  # two thirds of its images are of classes that are none of ImageNet's
        embedded = evaluation.embed(images.subset(truth.rows), task.name)
        return replace(embedded, rows=truth.rows[embedded.rows])
    shared = task.truth == "real" or task.name.startswith("babel-imagenet")
    return evaluation.embed(images, "imagenet1k" if shared else task.name)


@dataclass(frozen=True)
class Prompted:
    """The vectors [C, D] of a task's classes, and the prompts that they are made of."""

    weights: Float[Tensor, "C D"]
    templates: tuple[str, ...]
    template_set: str
    texts: int
    """How many were encoded for it; others were known."""


def embed_classes(evaluation: Evaluation, truth: tasks.Truth) -> Prompted:
    """The vectors of the task's classes under the protocol's templates, or under its own."""
    task, protocol, vectors = evaluation.task, evaluation.protocol, evaluation.subject.vectors
    own = protocol.templates or (task.templates if isinstance(task.templates, tuple) else ())
    templates = own or class_vectors.pick_templates(
        protocol.template_set, tasks.task_templates(task, evaluation.images)
    )
    before = vectors.texts
    joined = [name for name in truth.names if re.search(r"\w[^\w\s,]+\w", name.replace("_", " "))]
    if joined and protocol.canonical and task.name.partition(":")[0] not in tasks.TASKS:  # somebody typed the names
        say(
            f"{task.name}: {joined[0]!r} is asked for as {prompted_name(joined[0])!r}, in the field's canonical form: "
            "write a space, or give --no-canonical"
        )
    with evaluation.timed("texts"):
        weights = vectors(truth.names, templates, canonical=protocol.canonical)
    return Prompted(weights, templates, "own" if own else protocol.template_set, vectors.texts - before)


def _classified(evaluation: Evaluation, truth: tasks.Truth, embedded: Embedded, prompted: Prompted) -> Result:
    model, task = evaluation.subject.model, evaluation.task
    accepted_of = dict(zip(truth.rows.tolist(), truth.accepted, strict=True))
    accepted = [accepted_of[int(row)] for row in embedded.rows]
    with evaluation.timed("scores"):
        outcomes = zero_shot.classify(embedded.blocks(model), prompted.weights, accepted, float(model.scale.detach()))
    labels = np.array(
        [best if best in right else right[0] for best, right in zip(outcomes.predicted, accepted, strict=True)]
    )
    figures = zero_shot.accuracies(outcomes, labels, len(truth.names), single=truth.single)
    about: dict[str, Any] = {"seconds": evaluation.seconds, "texts": prompted.texts}
    if evaluation.protocol.calibration:
        about["calibration"] = extras.calibrate(evaluation, embedded, prompted.weights, labels)
    keys, pictures = _described(evaluation, embedded)
    return Result(
        task=task.name,
        kind="classification",
        metric=task.metric if task.metric in figures.values else "accuracy",
        values=figures.values,
        chance=_chance(truth, figures.values),
        definition=zero_shot.DEFINITION if truth.single else zero_shot.DEFINITION + SEVERAL,
        images=len(embedded.rows),
        protocol=_protocol(evaluation, embedded) | _prompts(evaluation, truth, prompted),
        outcomes=figures.examples,
        groups=figures.groups,
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
        extras=about,
    )


def _chance(truth: tasks.Truth, values: dict[str, float]) -> dict[str, float]:
    by_chance = {name: tasks.chance(truth) for name in values if name != "top5"}
    return by_chance | ({"top5": 5 / len(truth.names)} if "top5" in values and truth.single else {})


def _prompts(evaluation: Evaluation, truth: tasks.Truth, prompted: Prompted) -> dict[str, Any]:
    """What a classification's figures depend on beside the set: its classes and prompts."""
    canonical = evaluation.protocol.canonical
    return {
        "templates": len(prompted.templates),
        "template_set": prompted.template_set,
        "example": write_prompts(truth.names[:1], prompted.templates[:1], canonical)[0],
        "canonical_names": canonical,
        "classes": len(truth.names),
        "classes_with_equal_prompts": _equal(prompted.weights),
        "classes_matched": truth.note,
    }


def _equal(weights: Float[Tensor, "C D"]) -> int:
    """How many classes have the same vector as another: they tie, which counts against the model."""
    counts = weights.unique(dim=0, return_counts=True)[1]
    return int(counts[counts > 1].sum())


# Both ----------------------------------------------------------------------------------------------------------------


def _described(evaluation: Evaluation, embedded: Embedded) -> tuple[list[str], list[str]]:
    """Keys of the embedded images, and references to their pictures where these are still there."""
    images = evaluation.images
    pictures = [absolute(images.pictures[row]) for row in embedded.rows]
    return [images.keys[row] for row in embedded.rows], [place if is_there(place) else "" for place in pictures]


def _protocol(evaluation: Evaluation, embedded: Embedded, lang: str = "") -> dict[str, Any]:
    """What the figures depend on: the set, its features, the run's precision and temperature."""
    task, images, subject = evaluation.task, evaluation.images, evaluation.subject
    facts: dict[str, Any] = {
        "set": str(images.path),
        "layout": images.layout,
        "damaged": embedded.damaged,
        "features": str(embedded.store.path),
        "image_tower": (embedded.store.tower or {}).get("spec", "unknown"),
        "text_precision": "bfloat16" if subject.bfloat16 else "float32",
        "temperature": float(subject.model.scale.detach()),
    }
    if task.subset:
        facts["class_subset"] = task.subset
    own = lang or task.lang
    if languages := [own] if own else images.languages:
        facts["languages"] = languages
    return facts
