"""What a run is tuned on here: real captions, and a store of random features for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from litune.pairs.pairs import read_pairs
from litune.store.store import StoreWriter
from litune.studies.emoji import find_emoji

SHARD = 8192


def read_captions(table: Path | None, split: list[str], lang: list[str]) -> list[str]:
    """All captions of a table as litune reads them, or the emoji's names."""
    if table is not None:
        pairs = read_pairs(table, images="memory://", split=split, lang=lang)  # pictures elsewhere are not looked for
        return [caption for captions in pairs.table["captions"].to_pylist() for caption in captions]
    return [one.name for one in find_emoji()]


def vary(captions: list[str], count: int) -> list[str]:
    """As many captions as asked for: where the list is too short, two of them make a new one."""
    size = len(captions)
    joined = (f"{captions[i % size]} and {captions[(i + i // size) % size]}" for i in range(size, count))
    return [*captions[:count], *joined]


def write_store(folder: Path, captions: list[str], dim: int) -> None:
    """A store with one image of random float16 features per caption: a step's cost doesn't depend on their values.

    Those of the later files are the first one's, shifted by a column each, since a million would take long to draw.
    """
    drawn = np.random.default_rng(0).standard_normal((min(SHARD, len(captions)), dim), dtype=np.float32)
    facts = {"tower": None, "images": len(captions), "dtype": "float16", "pairs": None}
    writer = StoreWriter(folder, facts)
    for number, start in enumerate(range(0, len(captions), SHARD)):
        rows = captions[start : start + SHARD]
        keys = [f"{start + i}.png" for i in range(len(rows))]
        table = pa.table({"key": keys, "image_path": keys, "captions": [[caption] for caption in rows]})
        writer.write_shard(np.roll(drawn[: len(rows)], number, axis=1), table, [], start + len(rows))
    writer.finish()
