"""Pairs → feature store: every image passes the locked tower once, ever."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from litune import distributed
from litune.config import EmbedConfig, command
from litune.devices import pick_device
from litune.errors import LituneError, OutputExistsError, StoreError
from litune.files import clear_output
from litune.image.features import featured_spec
from litune.image.tower import MadeWith, check_same_tower
from litune.model.run_folder import find_image_tower
from litune.pairs.pairs import Pairs, read_files, say_pairs
from litune.progress import say
from litune.store.build import begun_tower, build_store, check_processes, read_manifest
from litune.store.store import FeatureStore


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
    begun = begun_tower(config.out)
    device = "cpu" if config.device == "auto" and begun.get("device") == "cpu" else config.device
    tower = find_image_tower(featured_spec(config.image_tower, config.features)).to(pick_device(device))
    with distributed.claimed(config.out):
        return build_store(config, pairs, tower, partial(_check_output, overwrite=config.overwrite))


def _check_output(out: Path, manifest: dict[str, Any], *, overwrite: bool) -> None:
    """Let an unfinished store of the same tower and pairs pass, refuse or remove anything else."""
    there = read_manifest(out)
    if not there:
        clear_output(out, False, "feature store", overwrite)
        return
    try:
        _check_same(out, there, manifest)
    except LituneError:
        if not overwrite:
            raise
        clear_output(out, "dtype" in there, "feature store", overwrite)


def _check_same(out: Path, there: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Raise unless the store at `out` is an unfinished one of this tower and these pairs."""
    tower: dict[str, Any] = there.get("tower") or {}
    also = [
        f"{part} {tower[part]} and {manifest['tower'][part]}"
        for part in ("precision", "runtime", "device")
        if not there.get("complete") and tower.get(part) not in (None, manifest["tower"][part])
    ]
    begun, now = MadeWith(str(out), there.get("tower")), MadeWith("", manifest["tower"])
    check_same_tower(begun, now, "choose another --out or give --overwrite", strict=True, also=also)
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
    check_processes(out, there, manifest, "give --overwrite")


def _tower_name(manifest: dict[str, Any]) -> str:
    """The tower of a store's manifest, in a word."""
    return str((manifest.get("tower") or {}).get("spec", "unknown tower"))
