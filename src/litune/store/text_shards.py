"""Captions in files of their own, with references into feature stores: one set of features, many sets of texts.

A shard is a Parquet or Arrow (Feather) file with a caption per row, in any order (sorted by store row is fastest):

    caption   the text
    key       the image, by its name in the store; and/or
    row       the image, by its row in the store, from 0 (fastest; where both are there they are compared)
    store     which of several stores: the name of its folder, or its path as given (optional)
    lang      its language (optional)
    field     its text field, as title or tags (optional)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather
import pyarrow.parquet

from litune.errors import DataError, nearest
from litune.progress import say
from litune.store.captions import BLOCK, Captions, TextJoin, hash_texts, join_texts, offsets_of

SUFFIXES = (".parquet", ".arrow", ".feather")
COLUMNS = ("caption", "key", "row", "store", "lang", "field")
NAMED = 3
"""How many captions that can't be used a message names."""


@dataclass(frozen=True)
class Images:
    """The images that captions may be of: N rows of one store."""

    names: tuple[str, ...]
    """What a shard's column `store` may call it."""
    rows: int
    keys: Callable[[], pa.Array]


@dataclass
class _Matched:
    """Captions found for one store so far."""

    images: Images
    texts: TextJoin
    rows: list[np.ndarray] = field(default_factory=list)
    labels: dict[str, list[pa.Array]] = field(default_factory=lambda: {"langs": [], "fields": []})

    @cached_property
    def index(self) -> _Keys:
        return _Keys(self.images.keys())

    def match(self, chunk: pa.Table) -> np.ndarray:
        """The row of each caption's image, −1 for none of this store."""
        names = chunk.column_names
        if "row" not in names:
            found = self.index.rows(chunk["key"])
        else:
            found = chunk["row"].fill_null(-1).to_numpy()
            found = np.where((found >= 0) & (found < self.images.rows), found, -1)
            if "key" in names:
                found = self.index.agreeing(found, chunk["key"])
        if "store" in names:
            here = pc.is_in(chunk["store"], pa.array(self.images.names, pa.large_string())).to_numpy()
            found = np.where(here, found, -1)
        return found

    def add(self, chunk: pa.Table, rows: np.ndarray) -> None:
        """Keep those captions of a chunk that have a row."""
        there = np.flatnonzero(rows >= 0)
        self.rows.append(rows[there].astype(np.int32 if self.images.rows < 2**31 else np.int64))
        chosen = chunk if len(there) == len(rows) else chunk.take(pa.array(there))
        self.texts.add(one_array(chosen["caption"]))
        for label, column in (("langs", "lang"), ("fields", "field")):
            there_is = column in chosen.column_names
            values = one_array(chosen[column]) if there_is else pa.nulls(len(there), pa.large_string())
            self.labels[label].append(values.dictionary_encode())

    def captions(self) -> Captions:
        """All that were kept, image by image; those of one image in the order of the shards."""
        rows = np.concatenate([np.zeros(0, np.int64), *self.rows])
        offsets = offsets_of(np.bincount(rows.astype(np.int64), minlength=self.images.rows))
        texts = self.texts.array()
        of_captions = {
            label: pa.chunked_array(parts).unify_dictionaries().combine_chunks()
            for label, parts in self.labels.items()
            if any(len(part.dictionary) for part in parts)
        }
        if (np.diff(rows) < 0).any():
            order = np.argsort(rows, kind="stable")
            size = texts.nbytes
            parts = (pa.array(order[i : i + BLOCK]) for i in range(0, len(order), BLOCK))
            texts = join_texts((texts.take(part) for part in parts), size)
            of_captions = {label: codes.take(pa.array(order)) for label, codes in of_captions.items()}
        return Captions(offsets, texts, of_captions.get)


class _Keys:
    """Which row has a key: by its hash, and then by itself."""

    def __init__(self, keys: pa.Array) -> None:
        self.keys = keys
        parts = [hash_texts(keys.slice(start, BLOCK)) for start in range(0, len(keys), BLOCK)]
        hashes = np.concatenate(parts)
        self.order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[self.order]

    def rows(self, wanted: pa.ChunkedArray) -> np.ndarray:
        """The first row of each key, −1 where there is none."""
        texts = one_array(wanted).fill_null("")
        place = np.searchsorted(self.hashes, hash_texts(texts))
        return self.agreeing(self.order[np.minimum(place, len(self.order) - 1)], texts)

    def agreeing(self, rows: np.ndarray, wanted: pa.ChunkedArray | pa.Array) -> np.ndarray:
        """The rows whose key is the wanted one; −1 for the others."""
        own = self.keys.take(pa.array(np.maximum(rows, 0)))
        equal = pc.equal(own, one_array(wanted)).fill_null(False)
        return np.where(equal.to_numpy(zero_copy_only=False) & (rows >= 0), rows, -1)


def read_texts(paths: Sequence[Path], stores: Sequence[Images], max_unmatched: float) -> list[Captions]:
    """The captions in these files, and in the shards in these folders, for each of the stores.

    Captions that are empty or belong to no image are counted, and the first of them named. Raises `DataError` where
    they are more than the share `max_unmatched`, or a file is not one of captions.
    """
    files = [file for path in paths for file in shards(path)]
    size = 3 * sum(file.stat().st_size for file in files)  # compressed to about a third
    matched = [_Matched(images, TextJoin(size)) for images in stores]
    total = lost = 0
    named: list[str] = []
    for file in files:
        seen = 0
        for chunk in _chunks(file, len(stores)):
            caption = chunk["caption"]
            used = np.zeros(len(chunk), bool)
            there = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(caption)), 0).fill_null(False).to_numpy()
            for one in matched:
                rows = np.where(there, one.match(chunk), -1)
                if (rows >= 0).any():
                    one.add(chunk, rows)
                used |= rows >= 0
            for place in np.flatnonzero(~used)[: NAMED - len(named)]:
                empty = "" if there[place] else ", no text"
                named.append(f"{file.name} row {seen + place} ({_name(chunk, int(place))}{empty})")
            lost += int((~used).sum())
            seen += len(chunk)
        total += seen
    what = ", ".join(map(str, paths))
    unmatched = f"{lost:,} of the {total:,} captions in {what} are empty or of no image of the stores"
    if lost > max_unmatched * total:
        raise DataError(
            f"{unmatched} (at most {max_unmatched:.1%} may be), as {'; '.join(named)}: are they of these stores? "
            "Mend them, or raise --max-damaged"
        )
    found = [one.captions() for one in matched]
    images = sum(int((np.diff(one.offsets) > 0).sum()) for one in found)
    say(f"texts: {total - lost:,} captions for {images:,} images out of {len(files):,} files")
    if lost:
        say(f"{unmatched}, as {'; '.join(named)}; they are left out")
    return found


def shards(path: Path) -> list[Path]:
    """The files of captions at a path. Raises `DataError` where there are none."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise DataError(f"{path} has no shards of captions: expected .parquet or .arrow files in it")
        return files
    if not path.is_file():
        raise DataError(
            f"there are no texts at {path}: give a .parquet or .arrow file of captions, or a folder of them"
        )
    if path.suffix not in SUFFIXES:
        raise DataError(f"{path} is no file of captions that litune reads: expected .parquet, .arrow or .feather")
    return [path]


def _chunks(file: Path, stores: int) -> Iterator[pa.Table]:
    """The captions in a file, some at a time, checked."""
    try:
        if file.suffix == ".parquet":
            with pa.parquet.ParquetFile(file, memory_map=True) as parquet:
                names = _columns(file, parquet.schema_arrow, stores)
                for batch in parquet.iter_batches(BLOCK, columns=names):
                    yield _of_large_strings(pa.Table.from_batches([batch]))
        else:
            table = pa.feather.read_table(file, memory_map=True)
            table = table.select(_columns(file, table.schema, stores))
            for start in range(0, len(table), BLOCK):
                yield _of_large_strings(table.slice(start, BLOCK))
    except (pa.ArrowInvalid, OSError) as why:
        raise DataError(f"{file} can't be read as captions ({str(why).splitlines()[0]}): write it again") from None


def _of_large_strings(chunk: pa.Table) -> pa.Table:
    """The chunk with every text in the one type that all others are in; letters are not copied."""
    kinds = [(name, pa.int64() if name == "row" else pa.large_string()) for name in chunk.column_names]
    return chunk.cast(pa.schema(kinds))


def _columns(file: Path, schema: pa.Schema, stores: int) -> list[str]:
    """The columns to read. Raises `DataError` where one is missing or of another type."""
    names = [name for name in COLUMNS if name in schema.names]
    if "caption" not in names:
        raise DataError(f"{file} has no column 'caption' ({nearest('caption', schema.names)})")
    if "key" not in names and "row" not in names:
        raise DataError(f"{file} says of no caption which image it is of: it needs a column 'key' or 'row'")
    if stores > 1 and "key" not in names and "store" not in names:
        raise DataError(f"{file} has rows but no column 'store', and there are {stores} stores: say which one is meant")
    for name in names:
        kind = schema.field(name).type
        fits = pa.types.is_integer(kind) if name == "row" else _is_text(kind)
        if not fits:
            raise DataError(
                f"{file}: the column {name!r} holds {kind}, expected {'whole numbers' if name == 'row' else 'text'}"
            )
    return names


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind))


def _name(chunk: pa.Table, place: int) -> str:
    """Which image a caption says it is of."""
    columns = [name for name in ("store", "key", "row") if name in chunk.column_names]
    return ", ".join(f"{name} {chunk[name][place].as_py()!r}" for name in columns)


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """A column of a few chunks as one array."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
