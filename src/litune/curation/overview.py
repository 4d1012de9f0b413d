"""Figures about pairs: lengths, languages, repeats, sizes, damage."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from litune.curation import captions as text
from litune.pairs.reference import name_of

QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}


def spread(values: np.ndarray) -> dict[str, float]:
    """Minimum, maximum, median, and 5th and 95th percentile; {} where there are no values."""
    if not len(values):
        return {}
    quantiles = np.quantile(values, list(QUANTILES.values()))
    return {name: round(float(value), 2) for name, value in zip(QUANTILES, quantiles, strict=True)}


def histogram(values: np.ndarray, edges: Sequence[int]) -> dict[str, int]:
    """How many whole numbers are in each range from one of `edges` to below the next: {"1–4": 7, …, "64 and more": 2}.

    Empty ranges at both ends are left out.

    >>> histogram(np.array([3, 4, 5, 90]), [1, 5, 9, 65])
    {'1–4': 2, '5–8': 1, '9–64': 0, '65 and more': 1}
    """
    bin_of = np.searchsorted(edges, values, side="right") - 1
    counts = np.bincount(bin_of[bin_of >= 0], minlength=len(edges)).tolist()
    ranges = itertools.pairwise(edges)
    names = [f"{low}–{high - 1}" if high > low + 1 else f"{low}" for low, high in ranges]
    full = np.flatnonzero(counts)
    if not len(full):
        return {}
    names = [*names, f"{edges[-1]} and more"]
    return {names[i]: counts[i] for i in range(full[0], full[-1] + 1)}


def about_captions(table: pa.Table) -> dict[str, Any]:
    """Figures about the captions of `Pairs.table`: captions per image, lengths, repeats, boilerplate."""
    lists = table["captions"].combine_chunks()
    flat = lists.flatten()
    counts = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(table)), counts)
    repeats = text.repeated(flat, owner) if len(flat) else np.zeros(0, np.int64)
    blank = text.is_boilerplate(flat) if len(flat) else np.zeros(0, bool)
    top = pc.value_counts(flat.filter(pa.array(repeats > 1))).to_pylist() if (repeats > 1).any() else []
    top.sort(key=lambda count: (-count["counts"], count["values"]))
    return {
        "captions": len(flat),
        "images_without": int((counts == 0).sum()),
        "per_image": spread(counts),
        "characters": spread(text.characters(flat)),
        "words": spread(text.words(flat)),
        "words_histogram": histogram(text.words(flat), [0, 1, 3, 5, 8, 11, 16, 21, 31, 51, 101]),
        "on_several_images": int((repeats > 1).sum()),
        "most_repeated": {count["values"]: count["counts"] for count in top[:10]},
        "boilerplate": int(blank.sum()),
        "boilerplate_examples": flat.filter(pa.array(blank)).slice(0, 5).to_pylist(),
    }


def about_files(files: pa.Table) -> dict[str, Any]:
    """Figures about the opened image files: `files` (see `read_facts`) with their `key` and `path`."""
    good = files.filter(pc.equal(files["damage"], ""))
    width, height = (good[name].to_numpy().astype(np.int64) for name in ("width", "height"))
    short, long = np.minimum(width, height), np.maximum(width, height)
    hashes = Counter(value for value in files["sha256"].to_pylist() if value)
    repeated = {value for value, count in hashes.items() if count > 1}
    groups: dict[str, list[str]] = {}
    for key, value in zip(files["key"].to_pylist(), files["sha256"].to_pylist(), strict=True):
        if value in repeated:
            groups.setdefault(value, []).append(key)
    damaged = files.filter(pc.not_equal(files["damage"], "")).select(["key", "path", "damage"]).to_pylist()
    return {
        "opened": len(files),
        "formats": dict(Counter(good["format"].to_pylist()).most_common()),
        "megabytes": round(float(pc.sum(files["bytes"]).as_py() or 0) / 1e6, 1),
        "short_side": spread(short),
        "short_side_histogram": histogram(short, [0, 64, 128, 200, 256, 384, 512, 768, 1024, 2048]),
        "aspect": spread(long / np.maximum(short, 1)),
        "equal_files": sum(count - 1 for count in hashes.values()),
        "equal_examples": list(groups.values())[:10],
        "damaged": len(damaged),
        "damaged_examples": {name_of(row["key"], row["path"]): row["damage"] for row in damaged[:20]},
    }


def about_tokens(lengths: np.ndarray, max_tokens: int) -> dict[str, Any]:
    """Figures about captions with these numbers of tokens [N], of which the tower reads the first `max_tokens`."""
    cut = np.maximum(lengths - max_tokens, 0)
    return {
        "captions_counted": len(lengths),
        "tokens": spread(lengths),
        "tokens_histogram": histogram(lengths, [1, 5, 9, 13, 17, 25, 33, 49, 65]),
        "captions_cut": round(float((cut > 0).mean()), 4) if len(cut) else 0.0,
        "tokens_lost": round(float(cut.sum() / max(1, lengths.sum())), 4),
    }
