"""Pairs → feature store: every image passes the locked tower once, ever."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from litune.checkpoint import find_image_tower
from litune.config import EmbedConfig, command
from litune.data.images import Decoded, decode_file, map_ahead
from litune.data.pairs import Damage, Pairs, read_pairs
from litune.devices import pick_bfloat16, pick_device, processor_cores
from litune.errors import DataError, LituneError, OutputExistsError, StoreError
from litune.features import MANIFEST, FeatureStore, StoreWriter, library_versions
from litune.files import clear_output, read_json
from litune.progress import Task, say, track
from litune.towers.image import ImageTower, differences

# A shard is closed when this much time has passed, or this share of the whole time so far if that is more: an
# interruption costs seconds, and a long run still has few files.
SHARD_SECONDS, SHARD_SHARE = 5.0, 0.01


@command(EmbedConfig)
def embed(config: EmbedConfig) -> FeatureStore:
    """Encode the images of `config.pairs` with a locked tower and write a feature store; returns it, open.

    Goes on with an unfinished store of the same tower and pairs. Raises `DataError` for unusable pairs,
    `TowerError` for the tower, `StoreError` where the store at `config.out` is of another tower or of other
    pairs, `OutputExistsError` where it is finished already.
    """
    pairs = read_pairs(
        config.pairs,
        images=config.images,
        image_column=config.image_column,
        caption_columns=config.caption_column,
        split_column=config.split_column,
        lang_column=config.lang_column,
        split=config.split,
        lang=config.lang,
        max_damaged=config.max_damaged,
    )
    say(f"pairs: {len(pairs):,} images, {pairs.captions:,} captions ({pairs.source})")
    if pairs.damaged:
        first = pairs.damaged[0]
        say(f"skipped {len(pairs.damaged):,} captions that can't be used, first {first.key}: {first.reason}")
    device = pick_device(config.device)
    tower = find_image_tower(config.image_tower).to(device)
    bfloat16 = pick_bfloat16(config.precision, device)
    manifest = {
        "tower": tower.provenance | {"precision": "bfloat16" if bfloat16 else "float32"},
        "pairs": {"source": pairs.source, "fingerprint": pairs.fingerprint(), "captions": pairs.captions},
        "images": len(pairs),
        "dtype": config.store_dtype,
        "libraries": library_versions(),
    }
    _check_output(config.out, manifest, config.overwrite)
    writer = StoreWriter(config.out, manifest)
    if writer.seen:
        say(f"going on with {config.out}: {writer.seen:,} of {len(pairs):,} images are done")
    _encode(config, pairs, tower, writer, bfloat16)
    store = writer.finish()
    if store.manifest["damaged"]:
        say(f"skipped {store.manifest['damaged']:,} images and captions that can't be used: {config.out}/damaged.jsonl")
    say(f"wrote {config.out}: {len(store):,} images, D={store.width}, {store.manifest['dtype']}")
    return store


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
    if (there.get("tower") or {}).get("precision") != manifest["tower"]["precision"]:
        found.append(f"precision {there['tower'].get('precision')} and {manifest['tower']['precision']}")
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


def _tower_name(manifest: dict[str, Any]) -> str:
    """The tower of a store's manifest, in a word."""
    return str((manifest.get("tower") or {}).get("spec", "unknown tower"))


def _encode(config: EmbedConfig, pairs: Pairs, tower: ImageTower, writer: StoreWriter, bfloat16: bool) -> None:
    """Decode ahead in threads, run the tower batch by batch, write shard by shard."""
    workers = config.workers or processor_cores()
    caption_damage = list(pairs.damaged) if writer.seen == 0 else []
    limit = config.max_damaged * len(pairs)
    damaged_images = _damaged_images(writer, len(pairs.damaged))
    shard = _Shard(pairs, caption_damage)
    began = closed = time.monotonic()
    with track("embedding", "images", len(pairs), writer.seen) as task:
        decoded = map_ahead(
            lambda row: _decode(pairs, row, tower),
            range(writer.seen, len(pairs)),
            workers,
            ahead=2 * config.batch_size + workers,
        )
        for batch, seen in _batches(decoded, config.batch_size):
            good = [d for d in batch if d.damage is None]
            bad = [d.damage for d in batch if d.damage is not None]
            damaged_images += len(bad)
            if damaged_images > limit:
                raise DataError(
                    f"{damaged_images:,} of {len(pairs):,} images can't be used (at most "
                    f"{config.max_damaged:.1%} may), as "
                    f"{_last_damage(writer, shard.damaged + bad)}; mend them or raise "
                    f"--max-damaged; what is done stays in {writer.path}"
                )
            if good:
                pixels = torch.from_numpy(np.stack([d.pixels for d in good if d.pixels is not None]))
                shard.add(tower.encode(pixels, bfloat16=bfloat16).cpu().numpy(), good)
            shard.damaged += bad
            task.advance(len(batch))
            task.note = f"{damaged_images} damaged" if damaged_images else ""
            now = time.monotonic()
            due = now - closed >= max(SHARD_SECONDS, SHARD_SHARE * (now - began))
            if due or shard.rows >= config.shard_size or seen == len(pairs):
                shard.write(writer, seen, now - closed)
                _announce_damage(shard.damaged)
                shard, closed = _Shard(pairs, []), now
    _finish_rate(writer, task)


def _decode(pairs: Pairs, row: int, tower: ImageTower) -> Decoded:
    key, path = pairs.table["key"][row].as_py(), pairs.table["path"][row].as_py()
    return decode_file(row, key, Path(path), tower.preprocess)


def _batches(decoded: Iterator[Decoded], size: int) -> Iterator[tuple[list[Decoded], int]]:
    """Batches of decoded images, and the source's position behind each."""
    batch: list[Decoded] = []
    for one in decoded:
        batch.append(one)
        if len(batch) == size:
            yield batch, one.row + 1
            batch = []
    if batch:
        yield batch, batch[-1].row + 1


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
        # The pixels have done their work.
        self.images += [Decoded(d.row, d.key, None, d.width, d.height, d.sha256) for d in images]

    def write(self, writer: StoreWriter, seen: int, seconds: float) -> None:
        width = int(writer.manifest.get("width") or 0)
        features = np.concatenate(self.features) if self.features else np.empty((0, width), np.float32)
        source = self.pairs.table.take(pa.array([d.row for d in self.images], pa.int64()))
        columns: dict[str, Any] = {
            "key": source["key"],
            "image_path": pa.array([str(Path(p).absolute()) for p in source["path"].to_pylist()], pa.string()),
            "caption": pa.array([c[0] if c else "" for c in source["captions"].to_pylist()], pa.string()),
            "captions": source["captions"],
        }
        columns |= {name: source[name] for name in ("langs", "fields", "split", "label") if name in source.column_names}
        columns |= {
            "width": pa.array([d.width for d in self.images], pa.int32()),
            "height": pa.array([d.height for d in self.images], pa.int32()),
            "sha256": pa.array([d.sha256 for d in self.images], pa.string()),
        }
        writer.write_shard(features, pa.table(columns), self.damaged, seen, seconds)


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
