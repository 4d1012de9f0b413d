"""One task, one run → a `Result`: the set's images embedded once per tower, the run's texts, then scores in blocks.

Features of a set are kept in a feature store that every later evaluation with the same tower shares; a `Result` has the
outcome of every example, so that reports can say how sure a figure is and what was wrong.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from litune.checkpoint import check_store
from litune.data.images import Decoded
from litune.data.sets import EvalSet, picture_path
from litune.encoding import encode_images, pick_runtime
from litune.errors import DataError, LituneError, StoreError
from litune.evaluation import prompts, retrieval, tasks, zero_shot
from litune.evaluation.published import published_shares
from litune.evaluation.result import Result
from litune.features import MANIFEST, FeatureStore, StoreWriter, library_versions
from litune.files import read_json
from litune.model import LiT
from litune.progress import say, track

BATCH = 32  # images
SHARD_SECONDS = 5.0
ROWS = 4096  # images that are scored at once
TEXTS = 8192  # captions that are encoded at once
CALIBRATED = 10_000  # images whose whole rows of logits are kept for calibration
KS = (1, 5, 10)


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
    vectors: prompts.ClassVectors = field(init=False)

    def __post_init__(self) -> None:
        self.vectors = prompts.ClassVectors(self.encode_text)

    def encode_text(self, texts: list[str]) -> Tensor:
        """Features [N, D] of N texts."""
        device = self.model.logit_scale.device.type
        precision: AbstractContextManager[Any] = (
            torch.autocast(device, torch.bfloat16) if self.bfloat16 else nullcontext()
        )
        with precision:
            return self.model.encode_text(texts).float()

    def tower(self) -> dict[str, Any]:
        """The provenance of its image tower, which is loaded only where the run does not say it."""
        return self.model.image_provenance or self.model.load_image_tower().provenance


# Images --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedded:
    """The images of a set that could be read: their rows in the set, their features in a store."""

    store: FeatureStore
    rows: np.ndarray
    """[B] of the set."""
    places: np.ndarray
    """[B] rows of the store."""
    hashes: list[str]
    """[B] SHA-256 of the picture files."""
    damaged: int

    def of(self, wanted: np.ndarray) -> Embedded:
        """Only the images at these rows of the set."""
        kept = np.flatnonzero(np.isin(self.rows, wanted))
        return replace(
            self, rows=self.rows[kept], places=self.places[kept], hashes=[self.hashes[i] for i in kept.tolist()]
        )

    def raw(self) -> np.ndarray:
        """The tower's features [B, W], float32."""
        return self.store.features(self.places)

    def blocks(self, model: LiT) -> Iterator[Float[Tensor, "b D"]]:
        """The model's features, block by block."""
        return (model.encode_features(raw) for raw in self.store.blocks(self.places, ROWS))


def embed_set(found: EvalSet, name: str, subject: Subject, folder: Path, max_damaged: float) -> Embedded:
    """The images of a set through the subject's tower, into a store in `folder`; or those that are there already.

    The store is named by the set and by a hash over the images and the tower. An interrupted one goes on. Raises
    `DataError` where more than the share `max_damaged` can't be read.
    """
    provenance = subject.tower()
    tower = {part: provenance[part] for part in ("weights", "pooling", "preprocess") if part in provenance}
    digest = hashlib.sha256(json.dumps([tower, found.fingerprint()], sort_keys=True).encode()).hexdigest()[:16]
    place = folder / f"{name.partition(':')[0]}-{digest}"
    if not _complete(place):
        _write_store(place, found, subject, max_damaged)
    store = FeatureStore(place)
    _check_damage(int(store.manifest["damaged"]), len(found), max_damaged, place)
    rows = store.metadata["position"].to_numpy()
    hashes = store.metadata["sha256"].to_pylist()
    return Embedded(store, rows, np.arange(len(store)), hashes, int(store.manifest["damaged"]))


def _complete(place: Path) -> bool:
    return (place / MANIFEST).exists() and bool(read_json(place / MANIFEST, StoreError).get("complete"))


def _write_store(place: Path, found: EvalSet, subject: Subject, max_damaged: float) -> None:
    tower = subject.model.load_image_tower()
    begun = read_json(place / MANIFEST, StoreError)["tower"] if (place / MANIFEST).exists() else {}
    with _as_files(found) as files:
        runtime = pick_runtime(
            tower,
            range(len(found)),
            files.locate,
            name=begun.get("runtime", "auto"),
            precision=begun.get("precision", "float32"),
            batch_size=BATCH,
        )
        manifest = {
            "tower": tower.provenance | {"precision": runtime.precision, "runtime": runtime.name},
            "pairs": {"source": found.layout, "fingerprint": found.fingerprint(), "captions": 0},
            "images": len(found),
            "dtype": "float16",
            "libraries": library_versions(),
        }
        writer = StoreWriter(place, manifest)
        if writer.seen:
            say(f"going on with {place}: {writer.seen:,} of {len(found):,} images are done")
        shard = _Shard()
        left = range(writer.seen, len(found))
        batches = encode_images(runtime, tower.preprocess, left, files.locate, batch_size=BATCH)
        with track("embedding", "images", len(found), writer.seen) as task:
            for batch, features in batches:
                shard.add(batch, features)
                files.forget(batch)
                task.advance(len(batch))
                end = batch[-1].row + 1
                if shard.seconds >= SHARD_SECONDS or end == len(found):
                    shard.write(writer, found, end)
                    _check_damage(int(writer.manifest["damaged"]), len(found), max_damaged, place)
                    shard = _Shard()
    if not writer.manifest["rows"]:
        raise DataError(f"none of the {len(found):,} images of {found.path} can be read")
    writer.finish(images_per_second=round(task.rate, 2))


class _Files:
    """The pictures of a set as files: what lies in an archive or an array is in a temporary folder while it is read."""

    def __init__(self, found: EvalSet, folder: Path) -> None:
        self.found, self.folder = found, folder

    def locate(self, row: int) -> tuple[str, Path]:
        key, picture = self.found.keys[row], self.found.pictures[row]
        if isinstance(picture, Path):
            return key, picture
        file = self.folder / str(row)
        with suppress(OSError):  # then there is no file, which counts as damage
            file.write_bytes(picture.read_bytes())
        return key, file

    def forget(self, batch: Sequence[Decoded]) -> None:
        for one in batch:
            (self.folder / str(one.row)).unlink(missing_ok=True)


@contextmanager
def _as_files(found: EvalSet) -> Iterator[_Files]:
    with tempfile.TemporaryDirectory(prefix="litune-") as folder:
        yield _Files(found, Path(folder))


def _check_damage(damaged: int, images: int, max_damaged: float, place: Path) -> None:
    if damaged > max_damaged * images:
        raise DataError(
            f"{damaged:,} of {images:,} images can't be read (at most {max_damaged:.1%} may): "
            f"{place / 'damaged.jsonl'} names them; mend them and remove that folder, or raise --max-damaged"
        )


class _Shard:
    """What was embedded since the last file was closed."""

    def __init__(self) -> None:
        self.features: list[np.ndarray] = []
        self.images: list[Decoded] = []
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def add(self, batch: list[Decoded], features: np.ndarray | None) -> None:
        self.images += batch
        self.features += [features] if features is not None else []

    def write(self, writer: StoreWriter, found: EvalSet, seen: int) -> None:
        good = [one for one in self.images if one.damage is None]
        damaged = [one.damage for one in self.images if one.damage is not None]
        for one in damaged:
            say(f"skipped {one.key}: {one.reason}")
        features = np.concatenate(self.features) if self.features else np.empty((0, 0), np.float32)
        table = pa.table(
            {
                "key": pa.array([one.key for one in good], pa.string()),
                "image_path": pa.array([picture_path(found.pictures[one.row]) for one in good], pa.string()),
                "captions": pa.array([[] for _ in good], pa.list_(pa.string())),
                "position": pa.array([one.row for one in good], pa.int64()),
                "width": pa.array([one.width for one in good], pa.int32()),
                "height": pa.array([one.height for one in good], pa.int32()),
                "sha256": pa.array([one.sha256 for one in good], pa.string()),
            }
        )
        writer.write_shard(features, table, damaged, seen, self.seconds)


# A feature store as a set --------------------------------------------------------------------------------------------


def stored_set(path: Path, kind: str, split: str | None = None, lang: Sequence[str] = ()) -> tuple[EvalSet, Embedded]:
    """A feature store as an evaluation set, by its column `label` or its captions, with its features as they are."""
    store = FeatureStore(path)
    table = store.metadata
    layout = f"the feature store {path}" + (f", split {split}" if split else "")
    pairs = store.select(split, lang) if kind == "retrieval" else None
    rows = np.arange(len(store)) if pairs is None else pairs.rows
    if pairs is None and "label" not in table.column_names:
        raise DataError(f"{path} has no classes: embed a tree with one folder of images per class")
    if pairs is None and split is not None:
        raise DataError(f"{path} has classes: a split is of captions")
    chosen = table.take(pa.array(rows))
    files = [Path(one) for one in chosen["image_path"].cast(pa.string()).to_pylist()]
    hashes = chosen["sha256"].to_pylist() if "sha256" in chosen.column_names else [""] * len(rows)
    found = EvalSet(path, layout, chosen["key"].to_pylist(), files)
    if pairs is None:
        names = sorted(set(table["label"].to_pylist()))
        place = {name: i for i, name in enumerate(names)}
        labels = np.array([place[one] for one in table["label"].to_pylist()], np.int64)
        found = replace(found, classes=names, labels=labels)
    else:
        ends = np.cumsum(pairs.counts)[:-1]
        captions = [list(part) for part in np.split(np.array(pairs.captions, object), ends)]
        column = pairs.column("langs")
        found = replace(found, captions=captions, langs=column.to_pylist() if column is not None else [])
    damaged = int(store.manifest.get("damaged", 0))
    return found, Embedded(store, np.arange(len(rows)), rows, hashes, damaged)


# Tasks ---------------------------------------------------------------------------------------------------------------


def run_task(task: tasks.Task, subject: Subject, protocol: Protocol, data: Path | None, features: Path) -> list[Result]:
    """The results of one task: one, or one for each language of its captions.

    Raises `DataError` for a set that can't be read, `StoreError` for a store of another tower.
    """
    path = task.find(data)
    assert path is not None, "find_tasks has looked"
    if (path / MANIFEST).is_file():
        found, embedded = stored_set(path, task.kind, None, (task.lang,) if task.lang else ())
        check_store(subject.path, subject.model, path, embedded.store.width, embedded.store.tower)
    else:
        found = task.read(path)
        embedded = None
    seconds: dict[str, float] = {}
    if task.kind == "retrieval":
        if embedded is None:
            with _timed(seconds, "images"):
                embedded = embed_set(found, task.name, subject, features, protocol.max_damaged)
        several = protocol.by_lang or (task.name == "wit" and not task.lang)
        languages = found.languages if several else []
        parts = [(lang, *_in_language(found, embedded, lang)) for lang in languages] or [("", found, embedded)]
        return [retrieve(task, one, some, subject, protocol, lang, dict(seconds)) for lang, one, some in parts]
    truth = tasks.find_truth(task, found)
    if embedded is None:
        # Two thirds of ObjectNet's images are of classes that are none of ImageNet's.
        kept = found.subset(truth.rows) if task.truth == "objectnet" else found
        shared = task.truth == "real" or task.name.startswith("babel-imagenet")
        with _timed(seconds, "images"):
            name = "imagenet1k" if shared else task.name
            embedded = embed_set(kept, name, subject, features, protocol.max_damaged)
        if kept is not found:
            embedded = replace(embedded, rows=truth.rows[embedded.rows])
    result = classify(task, found, truth, embedded, subject, protocol, seconds)
    result.extras.update(_contamination(found, embedded.of(truth.rows), subject, protocol))
    result.extras.update(_probe(task, path, truth, found, embedded, subject, protocol, features))
    return [result]


def _in_language(found: EvalSet, embedded: Embedded, lang: str) -> tuple[EvalSet, Embedded]:
    """The captions in one language, and the images that have some."""
    place = {key: row for row, key in enumerate(found.keys)}
    only = found.in_language(lang)
    rows = np.array([place[key] for key in only.keys])
    some = embedded.of(rows)
    number = {int(row): i for i, row in enumerate(rows)}
    return only, replace(some, rows=np.array([number[int(row)] for row in some.rows], np.int64))


def classify(
    task: tasks.Task,
    found: EvalSet,
    truth: tasks.Truth,
    embedded: Embedded,
    subject: Subject,
    protocol: Protocol,
    seconds: dict[str, float],
) -> Result:
    """Zero-shot classification of a set's images among the task's classes."""
    embedded = embedded.of(truth.rows)
    accepted_of = dict(zip(truth.rows.tolist(), truth.accepted, strict=True))
    accepted = [accepted_of[int(row)] for row in embedded.rows]
    written = protocol.templates or (task.templates if isinstance(task.templates, tuple) else ())
    templates = written or prompts.pick_templates(protocol.template_set, tasks.task_templates(task, found))
    with _timed(seconds, "texts"):
        before = subject.vectors.texts
        weights = subject.vectors(truth.names, templates, canonical=protocol.canonical)
    model = subject.model
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
    extras: dict[str, Any] = {"seconds": seconds, "texts": subject.vectors.texts - before}
    if known := published_shares(task.name, task.lang):
        extras["published"] = known
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
            "templates": len(templates),
            "template_set": "own" if written else protocol.template_set,
            "example": templates[0],
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
    with _timed(seconds, "scores"):
        images = torch.cat([torch.empty(0, subject.model.dim), *embedded.blocks(subject.model)])
        ranks = retrieval.rank(images, texts, torch.from_numpy(owner))
    keys, pictures = _described(found, embedded)
    protocol_facts = _protocol(task, found, embedded, subject, protocol) | {"captions": len(flat)}
    result = retrieval_result(
        task.name, ranks, owner, flat, keys, pictures, embedded.hashes, protocol_facts, lang or task.lang
    )
    result.extras.update({"seconds": seconds, "texts": len(set(flat))})
    if known := published_shares(task.name, task.lang):
        result.extras["published"] = known
    result.extras.update(_contamination(found, embedded, subject, protocol))
    return result


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
    """Keys and picture files of the embedded images."""
    paths = [picture_path(found.pictures[row]) for row in embedded.rows]
    return [found.keys[row] for row in embedded.rows], [one if one and Path(one).is_file() else "" for one in paths]


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
    if task.lang:
        facts["languages"] = [task.lang]
    return facts


def _probe(
    task: tasks.Task,
    path: Path,
    truth: tasks.Truth,
    found: EvalSet,
    embedded: Embedded,
    subject: Subject,
    protocol: Protocol,
    features: Path,
) -> dict[str, Any]:
    """What the image features alone tell of the classes, learned from the set's training images."""
    if not (protocol.shots or protocol.probes):
        return {}
    if not truth.single or (path / MANIFEST).is_file():
        say(f"{task.name}: no probes, which need training images with one class each")
        return {}
    try:
        train = task.read(task.train or path, train=True)
        own = tasks.find_truth(task, train)
    except LituneError as why:
        say(f"{task.name}: no probes: {why}")
        return {}
    if train.path == found.path and train.keys == found.keys:
        say(f"{task.name}: no probes: there is no training split beside the images that are evaluated")
        return {}
    from litune.evaluation import probes

    test_rows = embedded.of(truth.rows)
    label_of = {int(row): int(one[0]) for row, one in zip(truth.rows, truth.accepted, strict=True)}
    test = test_rows.raw(), np.array([label_of[int(row)] for row in test_rows.rows])
    labels = np.array([int(one[0]) for one in own.accepted])
    train = train.subset(own.rows)
    draws = probes.draw_shots(labels, protocol.shots)
    if not protocol.probes:  # few images are enough: only these are embedded
        few = np.unique(np.concatenate(draws))
        train, labels, draws = train.subset(few), labels[few], [np.searchsorted(few, rows) for rows in draws]
    there = embed_set(train, f"{task.name}-train", subject, features, protocol.max_damaged)
    given = there.raw(), labels[there.rows]
    said = {}
    if protocol.shots:
        there_too = [np.flatnonzero(np.isin(there.rows, rows)) for rows in draws]
        said["ridge"] = probes.ridge(*given, *test, shots=protocol.shots, draws=there_too)
    if protocol.probes:
        said["linear"] = probes.linear_probe(*given, *test, seed=0)
        said["knn"] = probes.knn(*given, *test)
    return said


def _contamination(found: EvalSet, embedded: Embedded, subject: Subject, protocol: Protocol) -> dict[str, Any]:
    """How many of the images the run was tuned on, exactly or nearly, where its store is still there."""
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
