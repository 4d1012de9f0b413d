"""Pairs → pairs without near-duplicates: of evaluation images, and of each other."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from litune.claims import claim
from litune.config import DedupConfig, EmbedConfig, ReadingConfig, command, to_json
from litune.curation.alignment import SIDE, thumbnail
from litune.curation.duplicates import (
    BLOCK,
    DuplicatePairs,
    NeighbourIndex,
    Space,
    candidates,
    groups,
    once,
    same_content,
    stays,
    verify,
)
from litune.curation.facts import gather, read_facts
from litune.curation.source import SourcePairs, read_source, write_store
from litune.devices import processor_cores
from litune.errors import ConfigError, DataError, LituneError, OutputExistsError, StoreError
from litune.files import atomic, clear_output, read_json, write_json, write_text
from litune.image.tower import check_same_tower
from litune.pages import write_page
from litune.pairs.pairs import Pairs
from litune.pairs.reference import absolute, names_of
from litune.pairs.stores import is_store
from litune.pairs.write import reading, write_pairs
from litune.progress import say, track
from litune.store.embed import embed_pairs
from litune.store.store import MANIFEST, FeatureStore

REPORT = "report.json"
OWN = "pairs"
"""The name of the set that is made unique, beside those of --against."""
FIT = 20_000
"""Images from which the space of the features is fitted."""
PART = 20_000
"""Candidates after which the agreements are kept, so that an interruption costs a minute."""


@dataclass(frozen=True)
class Removed:
    """An image that goes: because of which other one, of which set; equal bytes have cosine and match 1."""

    row: int
    because: str
    set: str
    path: str
    cosine: float
    match: float
    exact: bool


@dataclass
class ImageSet:
    """A set of n images as it is compared: hashes, areas, thumbnails, and features of those that could be read."""

    name: str
    source: SourcePairs
    sha256: list[str]
    areas: np.ndarray  # [n]
    thumbnails: np.ndarray  # [n, SIDE, SIDE], on disk
    damage: list[str]
    store: FeatureStore
    place: np.ndarray  # [n], the row in the store; -1: none

    def __post_init__(self) -> None:
        first = same_content(self.sha256, self.sha256)
        usable = (self.place >= 0) & np.array([not reason for reason in self.damage])
        self.first = np.where(first >= 0, first, np.arange(len(first)))
        self.compared = np.flatnonzero(usable & (self.first == np.arange(len(first))))

    @property
    def table(self) -> pa.Table:
        """The pairs."""
        return self.source.pairs.table

    def features(self, numbers: np.ndarray) -> Iterator[np.ndarray]:
        """Raw features of the compared images with these numbers, block by block."""
        yield from self.store.blocks(self.place[self.compared[numbers]], BLOCK)


@command(DedupConfig)
def dedup_data(config: DedupConfig) -> dict[str, Any]:
    """Write the pairs of `config.pairs` without those whose image is a near-duplicate; returns the report.

    Raises `ConfigError` where no tower is known, `DataError` for unusable pairs, `StoreError` where stores are of
    different towers, `OutputExistsError` where there is a report already, `OutputBusyError` where another process
    writes it.
    """
    with claim(config.out):
        if (config.out / REPORT).exists() and not config.overwrite:
            raise OutputExistsError(f"{config.out} has a report: choose another --out, or give --overwrite")
        return _dedup(config)


def _dedup(config: DedupConfig) -> dict[str, Any]:
    began = time.monotonic()
    spec = _tower(config)
    sources = [(OWN, read_source(config))]
    for against in config.against:
        name = str(against) if str(against) != OWN else absolute(OWN)
        sources.append((name, read_source(ReadingConfig(against, max_damaged=config.max_damaged))))
    prints = [source.pairs.fingerprint() for _, source in sources]
    work = config.out / "work"
    seconds: dict[str, float] = {}
    sets = []
    for number, (name, source) in enumerate(sources):
        sets.append(_open_set(config, name, source, prints[number], work / str(number), spec))
    _check_same_tower(sets)
    seconds["features and thumbnails"] = time.monotonic() - began
    pairs = sets[0]
    removed = {row: Removed(row, reason, "", "", 0.0, 0.0, False) for row, reason in enumerate(pairs.damage) if reason}
    damaged = len(removed)
    if not len(pairs.compared):
        raise DataError(f"{config.pairs} has no image that can be compared: {pairs.damage[0]}")
    sample = np.sort(np.random.default_rng(0).permutation(len(pairs.compared))[:FIT])
    space = Space.fit(np.concatenate(list(pairs.features(sample))))
    settings = {name: getattr(config, name) for name in ("neighbours", "min_cosine", "within")}
    keep_parts = _Parts(work / "matches", {"sets": prints, "tower": spec, "settings": settings})
    compared = 0
    for other in sets[1:]:
        near, count = _compare(config, space, pairs, other, keep_parts, seconds)
        compared += count
        _remove_against(pairs, other, near, removed)
    if config.within:
        near, count = _compare(config, space, pairs, pairs, keep_parts, seconds)
        compared += count
        _remove_within(pairs, near, removed)
    report = _report(config, sets, removed, damaged, compared, seconds)
    _write(config, pairs, removed, report)
    return report


def _tower(config: DedupConfig) -> str:
    """The spec of the tower that all features are of."""
    if config.image_tower is not None:
        return config.image_tower
    for path in (config.pairs, *config.against):
        if is_store(path) and (tower := FeatureStore(path).tower):
            return str(tower["spec"])
    raise ConfigError(
        "no feature store is given: name the tower of the features, as in --image-tower efficientnet-lite0"
    )


def _open_set(config: DedupConfig, name: str, source: SourcePairs, fingerprint: str, work: Path, spec: str) -> ImageSet:
    facts, thumbnails = _look(config, name, source, fingerprint, work)
    if source.store is not None:
        store, place = source.store, source.rows
    else:
        store = _embed(config, source.pairs, fingerprint, work / "features", spec)
        known = pc.index_in(source.pairs.table["key"], store.metadata["key"].combine_chunks())
        place = pc.fill_null(known, -1).to_numpy()
    assert place is not None
    areas = facts["width"].to_numpy().astype(np.int64) * facts["height"].to_numpy()
    return ImageSet(
        name, source, facts["sha256"].to_pylist(), areas, thumbnails, facts["damage"].to_pylist(), store, place
    )


def _look(
    config: DedupConfig, name: str, source: SourcePairs, fingerprint: str, work: Path
) -> tuple[pa.Table, np.ndarray]:
    """Sizes, hashes and thumbnails of a set, in one pass over its files."""
    paths, keys = source.pairs.table["path"], source.pairs.table["key"]
    file = work / "thumbnails.npy"
    shape = (len(paths), SIDE, SIDE)
    if not file.exists():
        shutil.rmtree(work / "facts", ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
    there = np.load(file, mmap_mode="r+") if file.exists() else None
    if there is None or there.shape != shape:
        there = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=shape)
        shutil.rmtree(work / "facts", ignore_errors=True)
    thumbnails: np.ndarray = there

    def look(row: int) -> dict[str, Any]:
        def keep(data: bytes) -> None:
            thumbnails[row] = thumbnail(data)

        return read_facts(paths[row].as_py(), content=True, look=keep)

    parts = gather(
        look,
        range(len(paths)),
        work / "facts",
        {"pairs": fingerprint},
        what=f"looking at {name}",
        workers=config.workers or processor_cores(),
        keys=names_of(keys, paths),
        max_damaged=config.max_damaged,
    )
    return pa.concat_tables(parts), thumbnails


def _embed(config: DedupConfig, pairs: Pairs, fingerprint: str, out: Path, spec: str) -> FeatureStore:
    """The features of a set that is no store: those of an earlier run, or embedded now."""
    if (out / MANIFEST).exists():
        there = read_json(out / MANIFEST, StoreError)
        same = there["pairs"]["fingerprint"] == fingerprint and there["tower"]["spec"] == spec
        if same and there["complete"]:
            return FeatureStore(out)
        if not same:
            shutil.rmtree(out)
    limits = {name: getattr(config, name) for name in ("workers", "max_damaged", "device")}
    return embed_pairs(EmbedConfig(config.pairs, image_tower=spec, out=out, **limits), pairs)


def _check_same_tower(sets: list[ImageSet]) -> None:
    first = sets[0].store
    for other in sets[1:]:
        check_same_tower(other.store.made_with, first.made_with, "use one tower")


class _Parts:
    """Agreements of candidates in files, part by part, for going on after an interruption."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        if not (folder / "about.json").exists() or read_json(folder / "about.json", LituneError) != about:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(folder / "about.json", about)
        self.folder, self.number = folder, 0

    def next(self) -> Path:
        """The file of the next part."""
        self.number += 1
        return self.folder / f"{self.number:06}.npy"


def _compare(
    config: DedupConfig, space: Space, own: ImageSet, other: ImageSet, parts: _Parts, seconds: dict[str, float]
) -> tuple[DuplicatePairs, int]:
    """The verified pairs (numbers are rows of the sets' tables), and how many candidates there were."""
    within, workers = own is other, config.workers or processor_cores()
    began = time.monotonic()
    index = NeighbourIndex(space, other.features, len(other.compared))
    candidate_blocks = []
    with track(f"candidates in {other.name}", "images", len(own.compared)) as task:
        numbers = np.arange(len(own.compared))
        starts = range(0, len(numbers), BLOCK)
        blocks = ((part, next(own.features(part))) for part in (numbers[start : start + BLOCK] for start in starts))
        for block in candidates(
            space, blocks, index, neighbours=config.neighbours, min_cosine=config.min_cosine, within=within
        ):
            candidate_blocks.append(block)
            task.advance(min(BLOCK, len(numbers) - task.done))
    columns = [field.name for field in dataclasses.fields(DuplicatePairs)]
    pairs = once(DuplicatePairs(*(np.concatenate([getattr(b, name) for b in candidate_blocks]) for name in columns)))
    pairs = dataclasses.replace(pairs, left=own.compared[pairs.left], right=other.compared[pairs.right])
    searched = time.monotonic()
    cuts = [range(start, min(start + PART, len(pairs.left))) for start in range(0, len(pairs.left), PART)]
    files = [parts.next() for _ in cuts]
    before = sum(len(cut) for cut, file in zip(cuts, files, strict=True) if file.exists())
    with track(f"comparing with {other.name}", "candidates", len(pairs.left), before) as task:
        matches = [np.zeros(0, np.float32)]
        for cut, file in zip(cuts, files, strict=True):
            if not file.exists():
                done, part = [], pairs.where(np.array(cut))
                for agreed in verify(part, own.thumbnails, other.thumbnails, (own.areas, other.areas), workers=workers):
                    done.append(agreed)
                    task.advance(len(agreed))
                with atomic(file) as temporary, open(temporary, "wb") as out:
                    np.save(out, np.concatenate(done))
            matches.append(np.load(file))
    match = np.concatenate(matches)
    for name, value in (("candidates", searched - began), ("comparing", time.monotonic() - searched)):
        seconds[name] = seconds.get(name, 0.0) + value
    return dataclasses.replace(pairs, match=match).where(match >= config.min_match), len(match)


def _remove_against(pairs: ImageSet, other: ImageSet, near: DuplicatePairs, removed: dict[int, Removed]) -> None:
    """Remove the images that are duplicates of one of the other set, and all copies of theirs."""
    keys, paths = other.table["key"], other.table["path"]
    equal = same_content(pairs.sha256, other.sha256)
    best: dict[int, tuple[int, float, float]] = {}
    for i in np.argsort(near.match, kind="stable"):  # the best match last, which wins
        best[int(near.left[i])] = (int(near.right[i]), float(near.cosine[i]), float(near.match[i]))
    for row, first in enumerate(pairs.first.tolist()):
        if row in removed:
            continue
        exact = equal[row] >= 0
        hit = (int(equal[row]), 1.0, 1.0) if exact else best.get(first)
        if hit is not None:
            key, path = keys[hit[0]].as_py(), paths[hit[0]].as_py()
            removed[row] = Removed(row, key, other.name, path, hit[1], hit[2], bool(exact))


def _remove_within(pairs: ImageSet, near: DuplicatePairs, removed: dict[int, Removed]) -> None:
    """Of each group of duplicates that are left, remove all but one."""
    remaining = np.array([row not in removed for row in range(len(pairs.table))])
    near = near.where(remaining[near.left] & remaining[near.right])
    copies = np.flatnonzero(remaining & (pairs.first != np.arange(len(remaining))) & remaining[pairs.first])
    group = groups(
        len(remaining), np.concatenate([near.left, copies]), np.concatenate([near.right, pairs.first[copies]])
    )
    staying = stays(group, np.where(remaining, pairs.areas, -1))
    best: dict[int, tuple[float, float]] = {}
    for first, second, cosine, match in zip(near.left, near.right, near.cosine, near.match, strict=True):
        for row in (int(first), int(second)):
            best[row] = max(best.get(row, (0.0, 0.0)), (float(match), float(cosine)))
    keys, paths = pairs.table["key"], pairs.table["path"]
    for row in np.flatnonzero(remaining & (staying != np.arange(len(remaining)))).tolist():
        to = int(staying[row])
        exact = pairs.sha256[row] == pairs.sha256[to]
        match, cosine = (1.0, 1.0) if exact else best.get(int(pairs.first[row]), (1.0, 1.0))
        removed[row] = Removed(row, keys[to].as_py(), pairs.name, paths[to].as_py(), cosine, match, exact)


def _report(
    config: DedupConfig,
    sets: list[ImageSet],
    removed: dict[int, Removed],
    damaged: int,
    compared: int,
    seconds: dict[str, float],
) -> dict[str, Any]:
    images = len(sets[0].table)
    gone = {
        image_set.name: {
            "images": len(image_set.table),
            "exact": sum(r.set == image_set.name and r.exact for r in removed.values()),
            "near": sum(r.set == image_set.name and not r.exact for r in removed.values()),
        }
        for image_set in (*sets[1:], *([sets[0]] if config.within else []))
    }
    return {
        "images": images,
        "kept": images - len(removed),
        "removed": gone,
        "damaged": damaged,
        "candidates": compared,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "seconds_per_million_images": {name: round(value * 1e6 / images) for name, value in seconds.items()},
        "settings": to_json(config),
    }


def _write(config: DedupConfig, pairs: ImageSet, removed: dict[int, Removed], report: dict[str, Any]) -> None:
    keep = np.array([row not in removed for row in range(len(pairs.table))])
    keys = pairs.table["key"]
    lines = [
        {"key": keys[r.row].as_py(), "damage": r.because}
        if not r.set
        else {
            "key": keys[r.row].as_py(), "duplicate_of": r.because, "set": r.set, "exact": r.exact,
            "cosine": round(r.cosine, 4), "match": round(r.match, 4),
        }
        for r in sorted(removed.values(), key=lambda r: r.row)
    ]  # fmt: skip
    write_text(config.out / "removed.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    table = pairs.table.filter(pa.array(keep))
    write_pairs(config.out / "kept.parquet", table)
    if pairs.source.store is not None:
        clear_output(
            config.out / "store", (config.out / "store" / MANIFEST).exists(), "feature store", config.overwrite
        )
        write_store(config.out / "store", pairs.source, np.flatnonzero(keep), table)
    _write_page(config, pairs, removed, report)
    write_json(config.out / REPORT, report)
    kept = f"{report['kept']:,} of {report['images']:,} images kept"
    say(f"wrote {config.out}: {kept}; look at report.html{reading(table)}")


def _write_page(config: DedupConfig, pairs: ImageSet, removed: dict[int, Removed], report: dict[str, Any]) -> None:
    """The removed pictures beside what they are duplicates of, the least sure first."""
    keys, paths = pairs.table["key"], pairs.table["path"]
    share = max(1, config.examples // max(1, len(report["removed"])))
    groups = []
    for name in report["removed"]:
        near = sorted((r for r in removed.values() if r.set == name and not r.exact), key=lambda r: r.match)
        exact = [r for r in removed.values() if r.set == name and r.exact]
        examples = [
            {
                "removed": (paths[r.row].as_py(), f"removed: {keys[r.row].as_py()}"),
                "other": (r.path, f"{'kept' if name == OWN else 'there'}: {r.because}"),
                "match": "equal bytes" if r.exact else f"pixels agree {r.match:.3f}, cosine of features {r.cosine:.3f}",
            }
            for r in [*near, *exact][:share]
        ]
        where = "within the pairs" if name == OWN else f"of {name}"
        groups.append({"where": where, "near": len(near), "exact": len(exact), "examples": examples})
    write_page(
        config.out / "report.html",
        "duplicates.html",
        title="Near-duplicates",
        intro=pairs.source.pairs.source,
        report=report,
        groups=groups,
    )
