"""The features of an evaluation set's images: embedded once per tower, into a store that later evaluations share."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from torch import Tensor

from litune import distributed
from litune.errors import DataError, StoreError
from litune.files import read_json
from litune.image.encoding import encode_images, pick_alike, pick_runtime
from litune.image.pictures import Decoded
from litune.image.runtimes import Runtime
from litune.model.lit import LiT
from litune.pairs.benchmarks import EvalSet, picture_path
from litune.progress import say, track
from litune.store.store import MANIFEST, FeatureStore, StoreWriter, library_versions

DTYPE = "float16"
SHARD_SECONDS = 5.0
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


def embed_set(found: EvalSet, name: str, model: LiT, folder: Path, max_damaged: float) -> Embedded:
    """The images of a set through the model's image tower, into a store in `folder`; or those that are there already.

    The store is named by the set and by a hash over the images and the tower. An interrupted one goes on. Under
    torchrun every process embeds its part. Raises `DataError` where more than the share `max_damaged` can't be read.
    """
    provenance = model.image_provenance or distributed.together(lambda: model.load_image_tower().provenance)
    tower = {part: provenance[part] for part in ("weights", "pooling", "preprocess") if part in provenance}
    digest = hashlib.sha256(json.dumps([tower, found.fingerprint()], sort_keys=True).encode()).hexdigest()[:16]
    place = folder / f"{name.partition(':')[0]}-{digest}"

    def complete() -> bool:
        return distributed.from_main(lambda: bool(_manifest(place).get("complete")))

    if not complete():
        with distributed.claimed(place):
            if not complete():  # nor by another process, meanwhile
                _write_store(place, found, model, max_damaged)
    store = distributed.together(lambda: FeatureStore(place))
    _check_damage(int(store.manifest["damaged"]), len(found), max_damaged, place)
    rows = store.metadata["position"].to_numpy()
    hashes = store.metadata["sha256"].to_pylist()
    return Embedded(store, rows, np.arange(len(store)), hashes, int(store.manifest["damaged"]))


def _manifest(place: Path) -> dict[str, Any]:
    """What the store says of itself; nothing where none was begun."""
    return read_json(place / MANIFEST, StoreError) if (place / MANIFEST).exists() else {}


def _write_store(place: Path, found: EvalSet, model: LiT, max_damaged: float) -> None:
    """Each rank writes its part, of whole batches, into a folder of its own; rank 0 joins them."""
    rank, ranks = distributed.rank(), distributed.world_size()
    tower = distributed.together(model.load_image_tower)
    with _as_files(found) as files:
        runtime = _pick_runtime(place, found, model, files)
        manifest = {
            "tower": tower.provenance | runtime.facts,
            "pairs": {"source": found.layout, "fingerprint": found.fingerprint(), "captions": 0},
            "images": len(found),
            "dtype": DTYPE,
            "libraries": library_versions(),
        } | ({"parts": distributed.bounds(len(found), runtime.batch_size)} if ranks > 1 else {})
        whole = distributed.from_main(lambda: _begin(place, manifest))
        cuts = whole.manifest.get("parts", [0, len(found)])
        parts = [place / f".rank-{r}-of-{ranks}" for r in range(ranks)] if ranks > 1 else []
        writer = distributed.together(lambda: StoreWriter(parts[rank], manifest) if parts else whole)
        if done := distributed.sum_counts(writer.seen):
            say(f"going on with {place}: {done:,} of {len(found):,} images are done")
        limit = max_damaged if ranks == 1 else 1.0  # of several ranks, the sum counts
        part = range(cuts[rank], cuts[rank + 1])
        rate = distributed.together(lambda: _encode(found, part, model, runtime, files, writer, limit))

    rates = distributed.gather_objects(rate)

    def finish() -> None:
        if parts:
            whole.join(parts)
            del whole.manifest["parts"]
        if not whole.manifest["rows"]:
            raise DataError(f"none of the {len(found):,} images of {found.path} can be read")
        whole.finish(images_per_second=round(sum(rates), 2))
        for folder in parts:
            shutil.rmtree(folder)

    distributed.from_main(finish)


def _begin(place: Path, manifest: dict[str, Any]) -> StoreWriter:
    """The store's writer. Raises `StoreError` where another number of processes, or another device, has begun it."""
    there = _manifest(place)
    begun, now = (len(one["parts"]) - 1 if "parts" in one else 1 for one in (there or manifest, manifest))
    if begun != now:
        raise StoreError(
            f"{place} was begun by {begun} processes, now there are {now}: go on with {begun}, or remove that folder"
        )
    then, device = (one["tower"].get("device") for one in (there or manifest, manifest))
    if then not in (None, device):
        raise StoreError(f"{place} was begun with --device {then}, not {device}: keep to it, or remove that folder")
    return StoreWriter(place, manifest)


def _pick_runtime(place: Path, found: EvalSet, model: LiT, files: _Files) -> Runtime:
    """What the store was begun with, else the fastest that agrees; of several ranks the first one chooses."""
    begun = _manifest(place).get("tower", {})
    pick = partial(pick_runtime, model.load_image_tower(), range(len(found)), files.locate, batch_size=None)
    name, precision = begun.get("runtime", "auto"), begun.get("precision", "float32")
    return pick_alike(pick, name, precision)


def _encode(
    found: EvalSet, part: range, model: LiT, runtime: Runtime, files: _Files, writer: StoreWriter, max_damaged: float
) -> float:
    """Encode a part of the images batch by batch, write shard by shard; returns images a second."""
    shard = _Shard()
    left = part[writer.seen :]
    preprocess, size = model.load_image_tower().preprocess, runtime.batch_size
    batches = encode_images(runtime, preprocess, left, files.locate, batch_size=size, dtype=DTYPE)
    with track("embedding", "images", len(part), writer.seen) as task:
        for batch, features in batches:
            shard.add(batch, features)
            files.forget(batch)
            task.advance(len(batch))
            end = batch[-1].row + 1
            if shard.seconds >= SHARD_SECONDS or end == part.stop:
                shard.write(writer, found, end - part.start)
                _check_damage(int(writer.manifest["damaged"]), len(found), max_damaged, writer.path)
                shard = _Shard()
    return task.rate


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
        langs = [list(part) for part in np.split(np.array(pairs.langs, object), ends)] if pairs.langs else []
        found = replace(found, captions=captions, langs=langs)
    damaged = int(store.manifest.get("damaged", 0))
    return found, Embedded(store, np.arange(len(rows)), rows, hashes, damaged)
