"""Input and output of the data commands: pairs from files, or from a feature store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from litune.config import ReadingConfig
from litune.errors import DataError, nearest
from litune.pairs.pairs import Pairs, options_of, read_files, say_pairs, select_captions
from litune.pairs.sample import find_split
from litune.pairs.stores import is_store, metadata_files, moved_to
from litune.store.build import MEASURED
from litune.store.store import FeatureStore, StoreWriter


@dataclass(frozen=True)
class SourcePairs:
    """Pairs and, if they come from a feature store, the store and each pair's row in it."""

    pairs: Pairs
    store: FeatureStore | None = None
    rows: np.ndarray | None = None


def read_source(config: ReadingConfig) -> SourcePairs:
    """The pairs of a command, as its settings say. Raises `DataError` or `StoreError` where they can't be read."""
    if is_store(config.pairs):
        source = _from_store(FeatureStore(Path(config.pairs)), config)
    else:
        source = SourcePairs(read_files(config))
    say_pairs(source.pairs)
    return source


def store_pairs(store: FeatureStore) -> pa.Table:
    """A store's metadata as the columns of `Pairs.table`: all but those that follow from others or are measured."""
    table = store.metadata.select([name for name in store.metadata.column_names if name not in ("caption", *MEASURED)])
    return table.rename_columns(["path" if name == "image_path" else name for name in table.column_names])


def _from_store(store: FeatureStore, config: ReadingConfig) -> SourcePairs:
    for about, flag in options_of(config).given.items():
        if about != "images":
            raise DataError(f"{flag} means nothing for the feature store {store.path}: leave it out")
    table = store_pairs(store)
    if config.images is not None:
        moved = moved_to(store.path, metadata_files(store.path), config.images)
        paths = pa.array([moved(path) for path in table["path"].to_pylist()], pa.string())
        table = table.set_column(table.column_names.index("path"), "path", paths)
    table = table.append_column("row", pa.array(np.arange(len(table))))
    for option, wanted, column in (("--split", config.split, "split"), ("--lang", config.lang, "langs")):
        if not wanted:
            continue
        if column not in table.column_names:
            raise DataError(f"{option} was given but the store {store.path} has no {column}: embed with such a column")
        values = table[column] if column == "split" else pc.list_flatten(table[column])
        known = pc.unique(values).to_pylist()
        if column == "split":
            wanted = tuple(find_split(name, known) or name for name in wanted)
        for name in wanted:
            if name not in known:
                raise DataError(f"{option}: {store.path} has no {name!r} ({nearest(name, map(str, known))})")
        if column == "split":
            table = table.filter(pc.is_in(table["split"], pa.array(list(wanted))))
        else:
            table = select_captions(table, "langs", wanted)
            table = table.filter(pc.greater(pc.list_value_length(table["captions"]), 0))
    if not len(table):
        raise DataError(f"{store.path} has no image left after --split and --lang: widen them")
    rows = table["row"].to_numpy()
    return SourcePairs(Pairs(table.drop_columns("row"), f"the feature store {store.path}"), store, rows)


def write_store(
    out: Path, source: SourcePairs, positions: np.ndarray, table: pa.Table, block: int = 16384
) -> FeatureStore:
    """Write the store of the pairs at these `positions`, with the captions that `table` has for them."""
    assert source.store is not None
    assert source.rows is not None
    rows = source.rows[positions]
    pairs = Pairs(table, f"kept of {source.store.path}")
    provenance = {name: source.store.manifest.get(name) for name in ("tower", "libraries")}
    about = {"source": pairs.source, "fingerprint": pairs.fingerprint(), "captions": pairs.captions}
    dtype = source.store.manifest.get("dtype", "float16")
    writer = StoreWriter(out, {**provenance, "pairs": about, "images": len(rows), "dtype": dtype})
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        metadata = source.store.metadata.take(pa.array(part))
        captions = table.slice(start, block)
        first = [texts[0] if texts else "" for texts in captions["captions"].to_pylist()]
        lists = [name for name in ("captions", "langs", "fields") if name in captions.column_names]
        columns = {"caption": pa.array(first, pa.string()), **{name: captions[name] for name in lists}}
        for name, values in columns.items():
            if name in metadata.column_names:
                metadata = metadata.set_column(metadata.column_names.index(name), name, values)
            else:
                metadata = metadata.append_column(name, values)
        writer.write_shard(source.store.features(part), metadata, [], start + len(part))
    return writer.finish()
