"""What is measured beside a task's figures: calibration, probes of the image features, images that were tuned on."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from litune import distributed
from litune.config import TuneConfig, from_json
from litune.errors import DataError, LituneError, StoreError
from litune.evaluation.embedded import Embedded, embed_set
from litune.evaluation.subject import Evaluation
from litune.evaluation.task import Truth
from litune.evaluation.truth import find_truth
from litune.files import read_json
from litune.model.run_folder import CONFIG, MANIFEST
from litune.pairs.benchmarks import EvalSet
from litune.progress import say
from litune.store.selection import choose_mixture
from litune.store.store import MANIFEST as STORE
from litune.store.store import FeatureStore

CALIBRATED = 10_000  # images whose whole rows of logits are kept for calibration

Training = tuple[Embedded, np.ndarray, list[np.ndarray]]
"""Training images, their classes, and the positions of those that each draw of few shots takes."""


def calibrate(
    evaluation: Evaluation, embedded: Embedded, weights: Float[Tensor, "C D"], labels: np.ndarray
) -> dict[str, Any]:
    """Calibration on at most `CALIBRATED` images, drawn at random; none of fewer than 20."""
    from litune.evaluation import calibration

    if len(labels) < 20:
        return {}
    chosen = np.arange(len(labels))
    if len(labels) > CALIBRATED:
        chosen = np.sort(np.random.default_rng(0).choice(len(labels), CALIBRATED, replace=False))
    model = evaluation.subject.model
    raw = embedded.store.features(embedded.places[chosen])
    logits = float(model.scale.detach()) * (model.encode_features(raw) @ weights.T)
    return {**calibration.calibrate(logits.numpy(), labels[chosen], seed=0), "images": len(chosen)}


# Probes --------------------------------------------------------------------------------------------------------------


def training_images(evaluation: Evaluation, truth: Truth) -> Training | None:
    """The set's training images that the probes need, embedded; None where there are none."""
    task, images, protocol = evaluation.task, evaluation.images, evaluation.protocol
    if not (protocol.shots or protocol.probes):
        return None
    from litune.evaluation import probes

    if not truth.single or (images.path / STORE).is_file():
        say(f"{task.name}: no probes, which need training images with one class each")
        return None

    def read() -> tuple[EvalSet, Truth]:
        there = task.read(task.train or images.path, train=True)
        return there, find_truth(task, there)

    try:
        train, own = distributed.together(read)
    except LituneError as why:
        say(f"{task.name}: no probes: {why}")
        return None
    if train.path == images.path and train.keys == images.keys:
        say(f"{task.name}: no probes: there is no training split beside the images that are evaluated")
        return None
    labels = np.array([int(classes[0]) for classes in own.accepted])
    train = train.subset(own.rows)
    draws = probes.draw_shots(labels, protocol.shots)
    if not protocol.probes:  # few images are enough: only these are embedded
        few = np.unique(np.concatenate(draws))
        train, labels, draws = train.subset(few), labels[few], [np.searchsorted(few, rows) for rows in draws]
    name, model = f"{task.name}-train", evaluation.subject.model
    embedded = embed_set(train, name, model, evaluation.features, protocol.max_damaged)
    places = [np.flatnonzero(np.isin(embedded.rows, rows)) for rows in draws]
    return embedded, labels[embedded.rows], places


def probe(evaluation: Evaluation, truth: Truth, embedded: Embedded, train: Training) -> dict[str, Any]:
    """What the image features alone tell of the classes, learned from the set's training images."""
    from litune.evaluation import probes

    label_of = {int(row): int(classes[0]) for row, classes in zip(truth.rows, truth.accepted, strict=True)}
    test = embedded.raw(), np.array([label_of[int(row)] for row in embedded.rows])
    images, labels, draws = train
    learned = images.raw(), labels
    figures = {}
    if shots := evaluation.protocol.shots:
        figures["ridge"] = probes.ridge(*learned, *test, shots=shots, draws=draws)
    if evaluation.protocol.probes:
        figures["linear"] = probes.linear_probe(*learned, *test, seed=0)
        figures["knn"] = probes.knn(*learned, *test)
    return figures


# Images that were tuned on -------------------------------------------------------------------------------------------


def contamination(evaluation: Evaluation, embedded: Embedded) -> dict[str, Any]:
    """How many of the images the run was tuned on, exactly or nearly, where its store is still there."""
    subject = evaluation.subject
    if evaluation.protocol.contamination and subject.unchecked:
        return {"unchecked": f"not checked whether images were tuned on: {subject.unchecked}"}
    if not evaluation.protocol.contamination or not subject.tuned_on:
        return {}
    from litune.evaluation.contamination import overlap_with

    # The features of an image tower that was tuned are not those of the store that its tuning began with.
    raw = None if subject.model.image_tuned else embedded.raw()
    keys = [evaluation.images.keys[row] for row in embedded.rows]
    return {"contamination": overlap_with(subject.tuned_on, embedded.hashes, raw, keys=keys)}


def tuned_on(run: Path) -> tuple[list[tuple[FeatureStore, np.ndarray]], str]:
    """The stores that a run was tuned on with their rows; or none, and why, where they are not there any more."""
    if not (run / CONFIG).is_file():
        return [], f"{run / CONFIG} is missing"
    try:
        config = from_json(TuneConfig, read_json(run / CONFIG, DataError))
        manifest = read_json(run / MANIFEST, DataError)
        described = manifest.get("sources", {"": manifest.get("store", {})}).values()
        stores = [_find_store(run, *store) for store in zip(config.stores, described, strict=True)]
        with redirect_stderr(io.StringIO()):  # what is said of the choice was said before tuning
            train, _ = choose_mixture(stores, config)
        return [(source.store, source.rows) for source in train.sources], ""
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
