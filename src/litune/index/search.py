"""Text, picture or both → the images of a store that match, or its captions."""

from __future__ import annotations

import os
import unicodedata
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from litune.config import SearchConfig, command
from litune.files import check_file, write_json
from litune.index.gallery import write_sheet
from litune.index.index import EXACT_ROWS, Found, FoundCaption, Index
from litune.model.hubs import as_queries
from litune.model.lit import LiT
from litune.model.run_folder import check_store, load
from litune.progress import say
from litune.store.store import FeatureStore

CALIBRATED_ON = 256
"""Captions that calibrate how many cells a search has to look into."""


@command(SearchConfig)
def search(config: SearchConfig) -> list[Found] | list[FoundCaption]:
    """The `config.top` images (or captions) of a store that match the query best, best first.

    Raises `StoreError` where the store is of another tower than the run, `DataError` for a filter or a picture that
    can't be read, `MissingExtraError` where an index is to be built and faiss is not installed.
    """
    check_file(config.sheet, "--sheet", config.overwrite)
    check_file(config.json, "--json", config.overwrite)
    store = FeatureStore(config.store)
    model = load(config.run, image_tower=config.image_tower, device=config.device)
    check_store(config.run, model, store.made_with)
    index = Index(store)
    say_changes(index)
    if config.index == "approximate" and index.cells is None:
        build(index, model, hub_correction=config.hub_correction)
    elif config.index == "approximate" and index.codes is None:
        index.save()  # of an older litune, or its codes were removed
    text = config.query if config.query.strip() else None
    names = ("text_weight", "image_weight", "top", "where", "hub_correction")
    how: dict[str, Any] = {name: getattr(config, name) for name in names}
    matches: list[Found] | list[FoundCaption]
    if config.captions:
        matches = index.search_captions(model, text, config.image, **how)
    else:
        exact = None if config.index == "auto" else config.index == "exact"
        if exact is None and index.cells is None and len(index) > EXACT_ROWS:
            say(f"searching all {len(index):,} images; --index approximate makes an index, once, and is faster")
        matches = index.search(model, text, config.image, **how, exact=exact)
    if not matches:
        say("nothing found" + (f": no image meets {' and '.join(config.where)}" if config.where else ""))
    title = " + ".join([*([text] if text else []), *([str(config.image)] if config.image else [])])
    if config.sheet:
        write_sheet(config.sheet, [(title, [match for match in matches if isinstance(match, Found)])])
        say(f"wrote {config.sheet}")
    if config.json:
        write_json(config.json, {"query": title, "found": [asdict(match) for match in matches]})
    return matches


def line(match: Found | FoundCaption, width: int | None = None) -> str:
    """A match as printed: its score, its path, its first caption.

    In a terminal of `width` columns, the shorter of relative and absolute path is shown and the caption is cut to fit.
    """
    if isinstance(match, FoundCaption):
        return f"{match.score:.4f}  {plain(match.caption)}"
    path = match.path
    if width is not None and Path(path).is_absolute():
        path = min(path, os.path.relpath(path), key=len)
    start = f"{match.score:.4f}  {path}"
    if not match.captions:
        return start
    caption, left = plain(match.captions[0]), None if width is None else width - columns(start) - 2
    if left is not None and columns(caption) > left:
        while caption and columns(caption) >= left:
            caption = caption[:-1]
        caption += "…"
    return f"{start}  {caption}" if left is None or left > 1 else start


def plain(text: str) -> str:
    """A text on one line, without control characters that would move a terminal's cursor or change its colours."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def columns(text: str) -> int:
    """How wide a terminal shows a text: Chinese, Japanese, Korean characters and emoji take two columns."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else not unicodedata.combining(c) for c in text)


def say_changes(index: Index) -> None:
    """Say whether a saved index has more or fewer images than its store, or is slower than it could be."""
    removed = index.rows - len(index)
    if removed or len(index.stores) > 1:
        say(f"{index.file}: {len(index):,} images of {len(index.stores):,} stores, {removed:,} removed ones left out")
    if index.cells is not None and index.codes is None and len(index) > EXACT_ROWS:
        say(f"{index.file} has no codes, so searches are slower: litune search with --index approximate writes them")


def build(index: Index, model: LiT, *, hub_correction: bool = True) -> None:
    """Build and save an index, and calibrate its probes on the store's own captions, encoded by this run."""
    index.build()
    captions = index.metadata["captions"].combine_chunks().flatten()
    count = len(captions) or index.rows
    picked = np.unique(np.linspace(0, count - 1, CALIBRATED_ON).astype(int))
    if len(captions):
        queries = model.encode_text(captions.take(pa.array(picked)).to_pylist())
        if hub_correction and model.bank is not None:
            queries = as_queries(queries)
    else:
        queries = model.encode_features(index.features(picked))
    recall = index.calibrate(model, queries)
    file = index.save()
    assert index.cells is not None
    say(f"{file}: {len(index.cells):,} cells; {index.probes:,} of them hold {recall:.1%} of the ten nearest images")
