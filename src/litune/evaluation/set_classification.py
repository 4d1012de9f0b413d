"""Classification of a set: its images embedded, its classes' prompts encoded, then scores in blocks."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from litune import distributed
from litune.evaluation import class_vectors, extras, zero_shot
from litune.evaluation.embedded import Embedded
from litune.evaluation.registry import TASKS
from litune.evaluation.result import Result
from litune.evaluation.subject import Evaluation
from litune.evaluation.task import Truth
from litune.evaluation.truth import chance, find_truth, task_templates
from litune.progress import say
from litune.prompts import prompted_name, write_prompts

SEVERAL = (
    " An image may have several right classes: any of them counts. In per-class tables its class is the predicted one "
    "where that is right, else the first of them."
)


def classify(evaluation: Evaluation, embedded: Embedded | None) -> Result:
    """Zero-shot classification of a set's images among the task's classes.

    `embedded` are the images where their features are known.
    """
    truth = distributed.together(lambda: find_truth(evaluation.task, evaluation.images))
    embedded = (_embed_truth(evaluation, truth) if embedded is None else embedded).of(truth.rows)
    train = extras.training_images(evaluation, truth)
    prompted = embed_classes(evaluation, truth)

    def measure() -> Result:
        result = _classified(evaluation, truth, embedded, prompted)
        result.extras.update(extras.contamination(evaluation, embedded))
        result.extras.update(extras.probe(evaluation, truth, embedded, train) if train else {})
        return result

    return distributed.from_main(measure)


def _embed_truth(evaluation: Evaluation, truth: Truth) -> Embedded:
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


def embed_classes(evaluation: Evaluation, truth: Truth) -> Prompted:
    """The vectors of the task's classes under the protocol's templates, or under its own."""
    task, protocol, vectors = evaluation.task, evaluation.protocol, evaluation.subject.vectors
    own = protocol.templates or (task.templates if isinstance(task.templates, tuple) else ())
    templates = own or class_vectors.pick_templates(protocol.template_set, task_templates(task, evaluation.images))
    before = vectors.texts
    joined = [name for name in truth.names if re.search(r"\w[^\w\s,]+\w", name.replace("_", " "))]
    if joined and protocol.canonical and task.name.partition(":")[0] not in TASKS:  # somebody typed the names
        say(
            f"{task.name}: {joined[0]!r} is asked for as {prompted_name(joined[0])!r}, in the field's canonical form: "
            "write a space, or give --no-canonical"
        )
    with evaluation.timed("texts"):
        weights = vectors(truth.names, templates, canonical=protocol.canonical)
    return Prompted(weights, templates, "own" if own else protocol.template_set, vectors.texts - before)


def _classified(evaluation: Evaluation, truth: Truth, embedded: Embedded, prompted: Prompted) -> Result:
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
    keys, pictures = evaluation.describe(embedded)
    return Result(
        task=task.name,
        kind="classification",
        metric=task.metric if task.metric in figures.values else "accuracy",
        values=figures.values,
        chance=_chance(truth, figures.values),
        definition=zero_shot.DEFINITION if truth.single else zero_shot.DEFINITION + SEVERAL,
        images=len(embedded.rows),
        protocol=evaluation.facts(embedded) | _prompts(evaluation, truth, prompted),
        outcomes=figures.examples,
        groups=figures.groups,
        keys=keys,
        pictures=pictures,
        hashes=embedded.hashes,
        class_names=list(truth.names),
        labels=labels,
        predicted=outcomes.predicted,
        confidence=outcomes.confidence,
        lang=task.lang,
        extras=about,
    )


def _chance(truth: Truth, values: dict[str, float]) -> dict[str, float]:
    by_chance = {name: chance(truth) for name in values if name != "top5"}
    return by_chance | ({"top5": 5 / len(truth.names)} if "top5" in values and truth.single else {})


def _prompts(evaluation: Evaluation, truth: Truth, prompted: Prompted) -> dict[str, Any]:
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
