"""The features of an evaluation set's images: embedded once per tower, into a store that later evaluations share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from torch import Tensor

from litune import distributed
from litune.config import EmbedConfig
from litune.errors import DataError, StoreError
from litune.evaluation.task import Task
from litune.image.registry import differences
from litune.model.lit import LiT
from litune.model.run_folder import check_store
from litune.pairs.benchmarks import EvalSet, Kind, pairs_of
from litune.pairs.pairs import Pairs
from litune.progress import say
from litune.store.build import build_store, check_processes, read_manifest
from litune.store.selection import Selection
from litune.store.store import DAMAGE, MANIFEST, FeatureStore

ROWS = 4096  # images that are scored at once


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

    def take(self, positions: np.ndarray) -> Embedded:
        """Only the images at these positions among them."""
        hashes = [self.hashes[i] for i in positions.tolist()]
        return replace(self, rows=self.rows[positions], places=self.places[positions], hashes=hashes)

    def of(self, rows: np.ndarray) -> Embedded:
        """Only the images at these rows of the set."""
        return self.take(np.flatnonzero(np.isin(self.rows, rows)))

    def raw(self) -> np.ndarray:
        """The tower's features [B, W], float32."""
        return self.store.features(self.places)

    def blocks(self, model: LiT) -> Iterator[Float[Tensor, "b D"]]:
        """The model's features, block by block."""
        return (model.encode_features(raw) for raw in self.store.blocks(self.places, ROWS))


def embed_set(images: EvalSet, name: str, model: LiT, folder: Path, max_damaged: float) -> Embedded:
    """The images of a set through the model's image tower, into a store in `folder`; or those that are there already.

    The store is named by the set and by a hash over the images and the tower. An interrupted one goes on. Under
    torchrun every process embeds its part. Raises `DataError` where more than the share `max_damaged` can't be read.
    """
    provenance = model.image_provenance or distributed.together(lambda: model.load_image_tower().provenance)
    tower = {part: provenance[part] for part in ("weights", "pooling", "preprocess") if part in provenance}
    fingerprint = images.fingerprint()
    digest = hashlib.sha256(json.dumps([tower, fingerprint], sort_keys=True).encode()).hexdigest()[:16]
    place = folder / f"{name.partition(':')[0]}-{digest}"

    def complete() -> bool:
        return distributed.from_main(lambda: bool(read_manifest(place).get("complete")))

    if not complete():
        with distributed.claimed(place):
            if not complete():  # nor by another process, meanwhile
                _build(place, images, fingerprint, model)
    store = distributed.together(lambda: FeatureStore(place))
    _check_damage(int(store.manifest["damaged"]), len(images), max_damaged, place)
    rows = store.metadata["position"].to_numpy()
    hashes = store.metadata["sha256"].to_pylist()
    return Embedded(store, rows, np.arange(len(store)), hashes, int(store.manifest["damaged"]))


def _build(place: Path, images: EvalSet, fingerprint: str, model: LiT) -> None:
    """Embed all images that can be read: how many may be damaged is for each evaluation to say."""
    tower = distributed.together(model.load_image_tower)
    config = EmbedConfig(str(images.path), str(tower.provenance["spec"]), place, precision="float32", max_damaged=1.0)
    columns = {"key": images.keys, "path": images.pictures, "position": range(len(images))}
    table = pa.table(columns | {"captions": pa.array([[]] * len(images), pa.list_(pa.string()))})
    pairs = Pairs(table, images.layout)
    build_store(config, pairs, tower, _check_begun, fingerprint=fingerprint, together=True)


def _check_begun(place: Path, manifest: dict[str, Any]) -> None:
    """Raise `StoreError` where another number of processes, or another device, has begun the store."""
    there = read_manifest(place) or manifest
    check_processes(place, there, manifest, "remove that folder")
    then, device = (facts["tower"].get("device") for facts in (there, manifest))
    if then not in (None, device):
        raise StoreError(f"{place} was begun with --device {then}, not {device}: keep to it, or remove that folder")


def _check_damage(damaged: int, images: int, max_damaged: float, place: Path) -> None:
    if damaged > max_damaged * images:
        with open(place / DAMAGE, encoding="utf-8") as lines:
            first = json.loads(lines.readline())
        raise DataError(
            f"{damaged:,} of {images:,} images can't be read (at most {max_damaged:.1%} may), as {first['key']}: "
            f"{first['reason']}; {place / DAMAGE} names them; mend them and remove that folder, or raise --max-damaged"
        )


# A feature store as a set --------------------------------------------------------------------------------------------


def open_set(task: Task, path: Path, run: Path, model: LiT) -> tuple[EvalSet, Embedded | None]:
    """A task's set, and where it is a feature store, its features (see `open_store`)."""
    if not (path / MANIFEST).is_file():
        return task.read(path), None
    return open_store(path, task.kind, run, model, lang=(task.lang,) if task.lang else ())


def open_store(
    path: Path, kind: Kind, run: Path, model: LiT, *, split: str | None = None, lang: Sequence[str] = ()
) -> tuple[EvalSet, Embedded | None]:
    """A feature store as an evaluation set, with its features.

    None stands for features of another tower than the one that the run has tuned: its pictures are to be embedded anew.
    Raises `StoreError` for another tower than the one that a run was tuned on.
    """
    images, embedded = stored_set(path, kind, split, lang)
    tower = embedded.store.tower
    if model.image_tuned and (tower is None or differences(model.image_provenance or {}, tower)):
        say(f"{path} has the features of another tower: encoding its pictures with that of {run}")
        return images, None
    check_store(run, model, embedded.store.made_with)
    return images, embedded


def stored_set(path: Path, kind: Kind, split: str | None = None, lang: Sequence[str] = ()) -> tuple[EvalSet, Embedded]:
    """A feature store as an evaluation set, by its column `label` or its captions, with its features as they are."""
    store = FeatureStore(path)
    if kind == "classification":
        if "label" not in store.column_names:
            raise DataError(f"{path} has no classes: embed a tree with one folder of images per class")
        if split is not None:
            raise DataError(f"{path} has classes: a split is of captions")
        pairs, rows = None, np.arange(len(store))
    else:
        pairs = store.select(split, lang)
        rows = pairs.rows
    chosen = store.metadata.take(pa.array(rows))
    layout = f"the feature store {path}" + (f", split {split}" if split else "")
    pictures = chosen["image_path"].cast(pa.string()).to_pylist()
    keys = chosen["key"].to_pylist()
    if pairs is None:
        classes, labels = np.unique(np.array(chosen["label"].to_pylist(), object), return_inverse=True)
        images = EvalSet(path, pairs_of(layout, keys, pictures), classes.tolist(), labels)
    else:
        captions, langs = _by_image(pairs.captions, pairs), _by_image(pairs.langs or [], pairs)
        images = EvalSet(path, pairs_of(layout, keys, pictures, captions, langs))
    hashes = chosen["sha256"].to_pylist() if "sha256" in chosen.column_names else [""] * len(rows)
    return images, Embedded(store, np.arange(len(rows)), rows, hashes, int(store.manifest.get("damaged", 0)))


def _by_image(values: list[str], pairs: Selection) -> list[list[str]]:
    """Captions, or their languages, as a list for each image; no lists where there are none."""
    ends = np.cumsum(pairs.counts)[:-1]
    return [part.tolist() for part in np.split(np.array(values, object), ends)] if values else []
