"""How fast images are found: a search of all of them, and through the cells of an index.

The features are made: mixtures of groups whose spread falls off from direction to direction, as features of pictures
do. Prints a table, then one JSON object on its last line.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from bench_run import machine

from litune.index.index import Index
from litune.store.store import FeatureStore, StoreWriter
from litune.vectors import normalize

SHARD = 65536


class Centered:
    """A run's image side: the fixed centre, then length one."""

    def __init__(self, center: np.ndarray) -> None:
        self.center = torch.from_numpy(center)

    def encode_features(self, raw: np.ndarray) -> torch.Tensor:
        """What is compared, of raw features."""
        return normalize(torch.from_numpy(raw) - self.center)


class Features:
    """Rows of a mixture: `groups` centres on a spectrum that falls off, and half as wide a spread around each."""

    def __init__(self, dim: int, groups: int, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.spectrum = (np.arange(1, dim + 1) ** -0.5).astype(np.float32)
        self.offset = self.random.standard_normal(dim, dtype=np.float32) ** 2
        self.groups = self.random.standard_normal((groups, dim), dtype=np.float32) * self.spectrum

    def draw(self, rows: int, *, spread: float = 0.5) -> np.ndarray:
        """So many rows."""
        group = self.random.integers(0, len(self.groups), rows)
        around = self.random.standard_normal((rows, len(self.spectrum)), dtype=np.float32) * self.spectrum
        found: np.ndarray = self.offset + self.groups[group] + spread * around
        return found


def make_store(folder: Path, features: Features, rows: int) -> FeatureStore:
    writer = StoreWriter(folder, {"tower": None, "images": rows, "dtype": "float16", "pairs": None})
    for start in range(0, rows, SHARD):
        count = min(SHARD, rows - start)
        keys = [str(start + i) for i in range(count)]
        table = pa.table({"key": keys, "image_path": keys, "captions": pa.array([[]] * count, pa.list_(pa.string()))})
        writer.write_shard(features.draw(count), table, [], start + count)
    return writer.finish()


def resident_mb() -> float:
    """Memory of this process that no file backs, in 10⁶ bytes: pages of the store can be given back at any time."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6


def latencies(index: Index, model: Centered, queries: torch.Tensor, exact: bool) -> dict[str, float]:
    """Milliseconds of single queries."""
    index.nearest(model, queries[:1], 10, exact=exact)
    taken = []
    for query in queries:
        began = time.perf_counter()
        index.nearest(model, query[None], 10, exact=exact)
        taken.append(1000 * (time.perf_counter() - began))
    return {"p50_ms": float(np.median(taken)), "p99_ms": float(np.quantile(taken, 0.99)), "queries": len(taken)}


def measure(rows: int, dim: int, groups: int, queries: int, exact_queries: int, folder: Path) -> dict[str, Any]:
    features = Features(dim, groups, seed=0)
    store = make_store(folder / "store", features, rows)
    model = Centered(store.features(np.arange(min(rows, 10_000))).mean(0))
    index = Index(store)
    before, began = resident_mb(), time.perf_counter()
    index.build()
    built = time.perf_counter()
    size = index.save().stat().st_size
    seconds, kept = (built - began, time.perf_counter() - built), resident_mb() - before
    assert index.cells is not None
    assert index.codes is not None
    tuned = model.encode_features(features.draw(256, spread=0.7))
    asked = model.encode_features(features.draw(queries, spread=0.7))  # farther out than the images, as texts are
    calibrated = index.calibrate(model, tuned)
    through = latencies(index, model, asked, exact=False)
    scan = latencies(index, model, asked[:exact_queries], exact=True)
    return {
        "rows": rows,
        "dim": dim,
        "cells": len(index.cells),
        "probes": index.probes,
        "build_seconds": round(seconds[0], 1),
        "write_seconds": round(seconds[1], 1),
        "memory_of_building_mb": round(kept, 1),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1),
        "index_mb": round(size / 1e6, 1),
        "codes_mb": round(index.codes.values.nbytes / 1e6, 1),
        "store_mb": round(2 * rows * dim / 1e6, 1),
        "recall@10": round(index.recall(model, asked), 4),
        "recall@10_when_calibrated": round(calibrated, 4),
        "looked_at": round(float(index.cells.count().mean() * index.probes / rows), 4),
        "approximate": {name: round(value, 2) for name, value in through.items()},
        "exact": {name: round(value, 2) for name, value in scan.items()},
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--groups", type=int, default=20_000, help="groups that the made features lie in")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--exact-queries", type=int, default=20, help="those that also look at every image")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        found = measure(
            options.rows, options.dim, options.groups, options.queries, options.exact_queries, Path(name)
        ) | machine()  # fmt: skip
    for name, value in found.items():
        print(f"{name:28}{value}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
