"""Pairs → feature store: every image passes the locked tower once, ever."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from litune import distributed
from litune.config import EmbedConfig, command
from litune.devices import pick_device
from litune.errors import DataError, LituneError, OutputExistsError, StoreError
from litune.files import clear_output, read_json
from litune.image.encoding import FEATURES, encode_images, pick_alike, pick_runtime
from litune.image.pictures import Decoded
from litune.image.registry import ImageTower, differences
from litune.image.runtimes import Runtime
from litune.model.run_folder import find_image_tower
from litune.pairs.pairs import Damage, Pairs, read_files, say_pairs
from litune.pairs.reference import absolute
from litune.progress import Task, say, track
from litune.store.store import MANIFEST, FeatureStore, StoreWriter, library_versions

# A shard is closed when this much time has passed, or this share of the whole time so far if that is more: an
# interruption costs seconds, and a long run still has few files.
SHARD_SECONDS, SHARD_SHARE = 5.0, 0.01
# What embed finds out itself: metadata of these names is of the picture as it was somewhere else.
MEASURED = ("width", "height", "sha256")


@command(EmbedConfig)
def embed(config: EmbedConfig) -> FeatureStore:
    """Encode the images of `config.pairs` with a locked tower and write a feature store; returns it, open.

    Goes on with an unfinished store of the same tower and pairs. Under torchrun every process calls it alike and
    encodes its part of the images; the store is that of one process. Raises `DataError` for unusable pairs,
    `TowerError` for the tower, `StoreError` where the store at `config.out` is of another tower or of other
    pairs, `OutputExistsError` where it is finished already, `OutputBusyError` where another process writes it.
    """
    distributed.start(config.device)
    pairs = read_files(config, config.keep)
    say_pairs(pairs)
    store = embed_pairs(config, pairs)
    if store.manifest["damaged"]:
        say(f"skipped {store.manifest['damaged']:,} inputs that can't be used: {config.out}/damaged.jsonl")
    say(f"wrote {config.out}: {len(store):,} images, D={store.width}, {store.manifest['dtype']}")
    return store


def embed_pairs(config: EmbedConfig, pairs: Pairs) -> FeatureStore:
    """`embed` of pairs that are read already."""
    begun = _begun_with(config.out)
    device = "cpu" if config.device == "auto" and begun.get("device") == "cpu" else config.device
    tower = find_image_tower(config.image_tower).to(pick_device(device))
    runtime = _pick_runtime(config, tower, pairs, begun)
    manifest = {
        "tower": tower.provenance | runtime.facts,
        "pairs": {"source": pairs.source, "fingerprint": pairs.fingerprint(), "captions": pairs.captions},
        "images": len(pairs),
        "dtype": config.store_dtype,
        "libraries": library_versions(),
    }
    with distributed.claimed(config.out):
        if distributed.world_size() > 1:
            return _embed_on_ranks(config, pairs, tower, runtime, manifest)
        _check_output(config.out, manifest, config.overwrite)
        writer = StoreWriter(config.out, manifest)
        if writer.seen:
            say(f"going on with {config.out}: {writer.seen:,} of {len(pairs):,} images are done")
        _encode(config, pairs, range(len(pairs)), tower, runtime, writer)
        return writer.finish()


def _embed_on_ranks(
    config: EmbedConfig, pairs: Pairs, tower: ImageTower, runtime: Runtime, manifest: dict[str, Any]
) -> FeatureStore:
    """Each rank writes a store of its part of the images, into a folder inside the output; rank 0 joins them.

    Parts are whole batches, so that every image is encoded in the same company as by one process.
    """
    rank, ranks = distributed.rank(), distributed.world_size()
    manifest = manifest | {"parts": distributed.bounds(len(pairs), runtime.batch_size)}
    distributed.from_main(lambda: _check_output(config.out, manifest, config.overwrite))
    whole = distributed.from_main(lambda: StoreWriter(config.out, manifest))
    cuts = whole.manifest["parts"]  # those that it was begun with, maybe with another --batch-size
    folders = [config.out / f".rank-{r}-of-{ranks}" for r in range(ranks)]
    part = StoreWriter(folders[rank], manifest)
    done = distributed.sum_counts(part.seen)
    if done:
        say(f"going on with {config.out}: {done:,} of {len(pairs):,} images are done")
    _encode(config, pairs, range(cuts[rank], cuts[rank + 1]), tower, runtime, part)
    rates = distributed.gather_objects(part.manifest["images_per_second"])

    def join() -> None:
        whole.join(folders)
        damaged = whole.manifest["damaged"] - len(pairs.damaged)
        if damaged > config.max_damaged * len(pairs):
            raise _too_many(damaged, pairs, config, whole, [])
        del whole.manifest["parts"]
        whole.finish(images_per_second=round(sum(rates), 2))
        for folder in folders:
            shutil.rmtree(folder)

    distributed.from_main(join)
    return FeatureStore(config.out)


def _check_output(out: Path, manifest: dict[str, Any], overwrite: bool) -> None:
    """Let an unfinished store of the same tower and pairs pass, refuse or remove anything else."""
    if not (out / MANIFEST).exists():
        clear_output(out, False, "feature store", overwrite)
        return
    there = read_json(out / MANIFEST, StoreError)
    try:
        _check_same(out, there, manifest)
    except LituneError:
        if not overwrite:
            raise
        clear_output(out, "dtype" in there, "feature store", overwrite)


def _check_same(out: Path, there: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Raise unless the store at `out` is an unfinished one of this tower and these pairs."""
    found = differences(there.get("tower") or {}, manifest["tower"])
    for part in ("precision", "runtime", "device"):
        one = (there.get("tower") or {}).get(part)
        if one not in (None, manifest["tower"][part]) and not there.get("complete"):
            found.append(f"{part} {one} and {manifest['tower'][part]}")
    if found:
        one, other = (there.get("tower") or {}).get("spec"), manifest["tower"]["spec"]
        raise StoreError(
            f"{out} was made with {one}, not with {other} ({'; '.join(found)}): "
            "choose another --out or give --overwrite"
        )
    if there.get("complete"):
        raise OutputExistsError(
            f"{out} is finished ({there['rows']:,} images, {_tower_name(there)}): use it, choose another --out, "
            "or give --overwrite"
        )
    if there["pairs"]["fingerprint"] != manifest["pairs"]["fingerprint"]:
        raise StoreError(
            f"{out} was begun with other pairs ({there['images']:,} images, {there['pairs']['captions']:,} captions; "
            f"now {manifest['images']:,} and {manifest['pairs']['captions']:,}): "
            "choose another --out or give --overwrite"
        )
    if there["dtype"] != manifest["dtype"]:
        raise StoreError(f"{out} was begun with --store-dtype {there['dtype']}, not {manifest['dtype']}: keep to it")
    begun, now = (len(facts["parts"]) - 1 if "parts" in facts else 1 for facts in (there, manifest))
    if begun != now:
        raise StoreError(
            f"{out} was begun by {begun} processes, now there are {now}: go on with {begun}, or give --overwrite"
        )


def _tower_name(manifest: dict[str, Any]) -> str:
    """The tower of a store's manifest, in a word."""
    return str((manifest.get("tower") or {}).get("spec", "unknown tower"))


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


def _begun_with(out: Path) -> dict[str, Any]:
    """The tower of an unfinished store, with runtime, precision and device; nothing where no store says so."""
    there = read_json(out / MANIFEST, StoreError) if (out / MANIFEST).exists() else {}
    tower: dict[str, Any] = there.get("tower") or {}
    return {} if there.get("complete") or "precision" not in tower else tower


def _encode(
    config: EmbedConfig, pairs: Pairs, part: range, tower: ImageTower, runtime: Runtime, writer: StoreWriter
) -> None:
    """Encode a part of the images batch by batch, write shard by shard."""
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
    _finish_rate(writer, task)


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


def _finish_rate(writer: StoreWriter, task: Task) -> None:
    writer.manifest["images_per_second"] = round(task.rate, 2)
