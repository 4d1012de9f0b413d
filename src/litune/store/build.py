"""Pairs and a locked image tower → feature store, resumable: what `embed` and evaluation call.

Images pass the tower batch by batch and are written shard by shard. Of several ranks each one writes its part.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from litune import distributed
from litune.config import EmbedConfig
from litune.errors import DataError, StoreError
from litune.files import read_json
from litune.image.encoding import FEATURES, encode_images, pick_alike, pick_runtime
from litune.image.pictures import Decoded
from litune.image.registry import ImageTower
from litune.image.runtimes import Runtime
from litune.pairs.pairs import Damage, Pairs
from litune.pairs.reference import absolute
from litune.progress import say, track
from litune.store.store import DAMAGE, MANIFEST, FeatureStore, StoreWriter, library_versions

# A shard is closed when this much time has passed, or this share of the whole time so far if that is more: an
# interruption costs seconds, and a long run still has few files.
SHARD_SECONDS, SHARD_SHARE = 5.0, 0.01
# What is found out here: metadata of these names is of the picture as it was somewhere else.
MEASURED = ("width", "height", "sha256")

Check = Callable[[Path, dict[str, Any]], None]
"""Raises unless a store with this manifest can be begun, or gone on with, in this folder."""


def build_store(
    config: EmbedConfig,
    pairs: Pairs,
    tower: ImageTower,
    check: Check,
    *,
    fingerprint: str | None = None,
    together: bool = False,
) -> FeatureStore:
    """Encode the images of `pairs` into a feature store at `config.out`; returns it, open.

    Goes on with an unfinished store. The caller has claimed the folder. Under torchrun every process calls it alike:
    each rank writes a store of its part of the images into a folder inside the output, and rank 0 joins them. Parts are
    whole batches, so that every image is encoded in the same company as by one process. With `together`, an error of
    one rank is raised on all, which can go on; else it ends them at once. `fingerprint` tells these images from others;
    by default that of the pairs. Raises what `check` does, and `DataError` where more than the share
    `config.max_damaged` of the images can't be used, or none can.
    """
    rank, ranks = distributed.rank(), distributed.world_size()
    runtime = _pick_runtime(config, tower, pairs, begun_tower(config.out))
    manifest = {
        "tower": tower.provenance | runtime.facts,
        "pairs": {
            "source": pairs.source,
            "fingerprint": fingerprint or pairs.fingerprint(),
            "captions": pairs.captions,
        },
        "images": len(pairs),
        "dtype": config.store_dtype,
        "libraries": library_versions(),
    } | ({"parts": distributed.bounds(len(pairs), runtime.batch_size)} if ranks > 1 else {})
    distributed.from_main(lambda: check(config.out, manifest))
    whole = distributed.from_main(lambda: StoreWriter(config.out, manifest))
    cuts = whole.manifest.get("parts", [0, len(pairs)])  # those that it was begun with, maybe with other batches
    folders = [config.out / f".rank-{r}-of-{ranks}" for r in range(ranks)] if ranks > 1 else []
    writer = distributed.together(lambda: StoreWriter(folders[rank], manifest) if folders else whole)
    if done := distributed.sum_counts(writer.seen):
        say(f"going on with {config.out}: {done:,} of {len(pairs):,} images are done")
    encode = partial(_encode, config, pairs, range(cuts[rank], cuts[rank + 1]), tower, runtime, writer)
    rates = distributed.gather_objects(distributed.together(encode) if together else encode())
    distributed.from_main(lambda: _finish(config, pairs, whole, folders, sum(rates)))
    return distributed.together(lambda: FeatureStore(config.out))


def _finish(config: EmbedConfig, pairs: Pairs, whole: StoreWriter, folders: list[Path], rate: float) -> None:
    """Join the ranks' parts, if there are some, and mark the store complete."""
    if folders:
        whole.join(folders)
        damaged = whole.manifest["damaged"] - len(pairs.damaged)
        if damaged > config.max_damaged * len(pairs):
            raise _too_many(damaged, pairs, config, whole, [])
        del whole.manifest["parts"]
    if not whole.manifest["rows"]:
        raise DataError(f"none of the {len(pairs):,} images can be read: {config.out / DAMAGE} says why")
    whole.finish(images_per_second=round(rate, 2))
    for folder in folders:
        shutil.rmtree(folder)


def read_manifest(out: Path) -> dict[str, Any]:
    """What the store in a folder says of itself; nothing where none was begun."""
    return read_json(out / MANIFEST, StoreError) if (out / MANIFEST).exists() else {}


def check_processes(out: Path, there: dict[str, Any], manifest: dict[str, Any], remedy: str) -> None:
    """Raise `StoreError` where another number of processes has begun the unfinished store that is `there`."""
    begun, now = (len(facts["parts"]) - 1 if "parts" in facts else 1 for facts in (there, manifest))
    if begun != now:
        raise StoreError(f"{out} was begun by {begun} processes, now there are {now}: go on with {begun}, or {remedy}")


def begun_tower(out: Path) -> dict[str, Any]:
    """The tower of an unfinished store, with runtime, precision and device; nothing where no store says so."""
    manifest = read_manifest(out)
    tower: dict[str, Any] = manifest.get("tower") or {}
    return {} if manifest.get("complete") or "precision" not in tower else tower


def _pick_runtime(config: EmbedConfig, tower: ImageTower, pairs: Pairs, begun: dict[str, Any]) -> Runtime:
    """What runs the tower: as asked; going on with a store, what it was begun with; else the fastest.

    Of several processes the first one chooses.
    """
    name, precision = str(config.runtime), str(config.precision)
    if begun:
        name = begun.get("runtime", "torch") if name == "auto" else name
        precision = begun["precision"] if precision == "auto" else precision
    pick = partial(pick_runtime, tower, range(len(pairs)), partial(_locate, pairs), batch_size=config.batch_size)
    return pick_alike(pick, name, precision)


def _encode(
    config: EmbedConfig, pairs: Pairs, part: range, tower: ImageTower, runtime: Runtime, writer: StoreWriter
) -> float:
    """Encode a part of the images batch by batch, write shard by shard; returns images per second."""
    caption_damage = list(pairs.damaged) if part.start == 0 else []
    limit = config.max_damaged * len(pairs)
    damaged_images = _damaged_images(writer, len(caption_damage))
    shard = _Shard(pairs, [] if writer.seen else caption_damage)
    began = closed = time.monotonic()
    encoded = encode_images(
        runtime,
        tower.preprocess,
        part[writer.seen :],
        partial(_locate, pairs),
        batch_size=runtime.batch_size,
        workers=config.workers,
        dtype=config.store_dtype,
    )
    with track("embedding", "images", len(part), writer.seen) as task:
        for batch, features in encoded:
            bad = [d.damage for d in batch if d.damage is not None]
            damaged_images += len(bad)
            if damaged_images > limit:
                raise _too_many(damaged_images, pairs, config, writer, shard.damaged + bad)
            if features is not None:
                shard.add(features, [d for d in batch if d.damage is None])
            shard.damaged += bad
            task.advance(len(batch))
            task.note = f"{damaged_images} damaged" if damaged_images else ""
            now, end = time.monotonic(), batch[-1].row + 1
            due = now - closed >= max(SHARD_SECONDS, SHARD_SHARE * (now - began))
            if due or shard.rows >= config.shard_size or end == part.stop:
                shard.write(writer, end - part.start, now - closed)
                _announce_damage(shard.damaged)
                shard, closed = _Shard(pairs, []), now
    return round(task.rate, 2)


def _locate(pairs: Pairs, row: int) -> tuple[str, str]:
    return pairs.table["key"][row].as_py(), pairs.table["path"][row].as_py()


class _Shard:
    """Features and metadata of the images since the last file was closed."""

    def __init__(self, pairs: Pairs, damaged: list[Damage]) -> None:
        self.pairs, self.damaged = pairs, damaged
        self.features: list[np.ndarray] = []
        self.images: list[Decoded] = []

    @property
    def rows(self) -> int:
        return len(self.images)

    def add(self, features: np.ndarray, images: list[Decoded]) -> None:
        self.features.append(features)
        self.images += images

    def write(self, writer: StoreWriter, seen: int, seconds: float) -> None:
        width = int(writer.manifest.get("width") or 0)
        features = np.concatenate(self.features) if self.features else np.empty((0, width), np.float32)
        source = self.pairs.table.take(pa.array([d.row for d in self.images], pa.int64()))
        columns: dict[str, Any] = {
            "key": source["key"],
            "image_path": pa.array([absolute(p) for p in source["path"].to_pylist()], pa.string()),
            "caption": pa.array([c[0] if c else "" for c in source["captions"].to_pylist()], pa.string()),
            "captions": source["captions"],
        }
        columns |= {name: source[name] for name in source.column_names if name not in ("path", *columns, *MEASURED)}
        columns |= {
            "width": pa.array([d.width for d in self.images], pa.int32()),
            "height": pa.array([d.height for d in self.images], pa.int32()),
            "sha256": pa.array([d.sha256 for d in self.images], pa.string()),
        }
        writer.write_shard(features, pa.table(columns), self.damaged, seen, seconds)


def _too_many(damaged: int, pairs: Pairs, config: EmbedConfig, writer: StoreWriter, latest: list[Damage]) -> DataError:
    example = _last_damage(writer, latest)
    remedy = "mend them or raise --max-damaged"
    if FEATURES in example:
        remedy = "give another --out with --precision float32 and --store-dtype float32, or raise --max-damaged"
    return DataError(
        f"{damaged:,} of {len(pairs):,} images can't be used (at most {config.max_damaged:.1%} may), as "
        f"{example}; {remedy}; what is done stays in {config.out}"
    )


def _last_damage(writer: StoreWriter, damaged: list[Damage]) -> str:
    """One damaged image, for a message."""
    return f"{damaged[0].key}: {damaged[0].reason}" if damaged else f"those in {writer.path / 'damaged.jsonl'}"


def _damaged_images(writer: StoreWriter, damaged_captions: int) -> int:
    """How many images an unfinished store has skipped already."""
    return max(0, int(writer.manifest["damaged"]) - damaged_captions) if writer.seen else 0


def _announce_damage(damaged: list[Damage]) -> None:
    for one in damaged:
        say(f"skipped {one.key}: {one.reason}")
