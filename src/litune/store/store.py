"""The feature store: every image's features on disk, memory-mapped, with where they came from.

The layout is the one that clip-retrieval writes and the field's embedding tools read:

    img_emb/img_emb_0000.npy            features, [rows, D], float16
    metadata/metadata_0000.parquet      key, image_path, caption, captions, width, height, sha256 and,
                                        where the source has them, langs, split, label
    store.json                          tower, weights' hash, preprocessing, versions, dtype, D, counts
    damaged.jsonl                       what could not be used, by name, with the reason

Features are the tower's raw output: heads and the normalisation come later. A folder that clip-retrieval wrote
has no store.json; it is read all the same, its tower unknown.
"""

from __future__ import annotations

import json
import mmap
import platform
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from litune.errors import DataError, StoreError
from litune.files import atomic, read_json, sweep_temporaries, write_json, write_text
from litune.image.tower import MadeWith
from litune.pairs.pairs import Damage
from litune.store.captions import Captions, join_texts, offsets_of
from litune.store.selection import Selection, check_range, select

FORMAT = 1
MANIFEST, DAMAGE = "store.json", "damaged.jsonl"
READ_ROWS = 65536
"""Rows of metadata that are read at once."""


def library_versions() -> dict[str, str]:
    """The versions of Python and of the libraries that features and weights depend on."""
    found = {"python": platform.python_version()}
    for name in ("litune", "torch", "timm", "transformers", "numpy", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


class FeatureStore:
    """Features and metadata of N images, read-only.

    Features stay on disk (memory-mapped). `metadata` is one Arrow table of N rows; `column` and `captions` read what is
    asked for alone.
    """

    def __init__(self, path: Path | str) -> None:
        """Open the store at `path`. Raises `StoreError` where it is missing, incomplete or damaged."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise StoreError(f"there is no feature store at {self.path}: make one with litune embed")
        self.manifest: dict[str, Any] = {}
        if (self.path / MANIFEST).exists():
            self.manifest = read_json(self.path / MANIFEST, StoreError)
            if self.manifest.get("format") != FORMAT:
                raise StoreError(
                    f"{self.path} has the store format {self.manifest.get('format')!r}, this litune reads {FORMAT}"
                )
            if not self.manifest.get("complete"):
                done, total = self.manifest.get("seen", 0), self.manifest.get("images", 0)
                raise StoreError(
                    f"{self.path} is incomplete ({done:,} of {total:,} images): run the same litune embed again"
                )
        self._feature_files = self._numbered("img_emb", "img_emb_", ".npy")
        self._metadata_files = self._numbered("metadata", "metadata_", ".parquet")
        if not self._feature_files:
            raise StoreError(f"{self.path} has no img_emb/img_emb_*.npy: it is not a feature store")
        if [n for n, _ in self._feature_files] != [n for n, _ in self._metadata_files]:
            raise StoreError(
                f"{self.path} has {len(self._feature_files)} files of features but not the same of metadata"
            )
        self._parts = [self._map(file) for _, file in self._feature_files]
        self._starts = np.cumsum([0] + [len(p) for p in self._parts])
        expected = self.manifest.get("rows")
        if expected is not None and expected != len(self):
            raise StoreError(f"{self.path} holds {len(self):,} rows, its store.json says {expected:,}: embed it again")

    def _numbered(self, folder: str, prefix: str, suffix: str) -> list[tuple[int, Path]]:
        pattern = re.compile(re.escape(prefix) + r"(\d+)" + re.escape(suffix) + "$")
        files = (self.path / folder).glob(f"{prefix}*{suffix}") if (self.path / folder).is_dir() else []
        return sorted((int(m.group(1)), f) for f in files if (m := pattern.match(f.name)))

    def _map(self, file: Path) -> np.ndarray:
        try:
            part: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as why:
            raise StoreError(f"{file} is damaged ({why}): remove the store and embed again") from None
        if part.ndim != 2 or part.dtype.kind != "f":
            raise StoreError(f"{file} holds {part.dtype} of shape {part.shape}, expected float [rows, D]")
        return part

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def width(self) -> int:
        """The width D of the features."""
        return int(self._parts[0].shape[1])

    @property
    def tower(self) -> dict[str, Any] | None:
        """The provenance of the tower that made the features; None where it is unknown."""
        tower: dict[str, Any] | None = self.manifest.get("tower")
        return tower

    @property
    def made_with(self) -> MadeWith:
        """The tower and the width of the features, for `litune.image.tower.check_same_tower`."""
        return MadeWith(str(self.path), self.tower, self.width)

    @cached_property
    def metadata(self) -> pa.Table:
        """One row per image: key, image_path, captions and, where known, langs, split, label, …"""
        tables = []
        for (_, file), part in zip(self._metadata_files, self._parts, strict=True):
            try:
                table = pa.parquet.read_table(file)
            except (pa.ArrowInvalid, OSError) as why:
                raise _damaged(file, why) from None
            if table.num_rows != len(part):
                raise StoreError(f"{file} has {table.num_rows:,} rows for {len(part):,} features: embed it again")
            tables.append(table)
        table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        return self._foreign(table) if "captions" not in table.column_names else table

    @staticmethod
    def _foreign(table: pa.Table) -> pa.Table:
        """A clip-retrieval table (image_path, caption) with litune's columns added."""
        rows = table.num_rows
        if "image_path" not in table.column_names:
            table = table.append_column("image_path", pa.array([str(i) for i in range(rows)]))
        if "key" not in table.column_names:
            table = table.append_column("key", table["image_path"].cast(pa.string()))
        captions = table["caption"].to_pylist() if "caption" in table.column_names else [None] * rows
        lists = [[c] if isinstance(c, str) and c.strip() else [] for c in captions]
        return table.append_column("captions", pa.array(lists, pa.list_(pa.string())))

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the features: float16, or float32 where they are wider."""
        return np.dtype(np.float16 if all(part.dtype == np.float16 for part in self._parts) else np.float32)

    def features(self, rows: Sequence[int] | np.ndarray | slice, dtype: np.dtype[Any] | None = None) -> np.ndarray:
        """Raw features [len(rows), D] of these rows, in the order asked for; float32 by default.

        Raises `IndexError` for a row below 0 or past the last.
        """
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        index = np.asarray(rows, dtype=np.int64)
        found = np.empty((len(index), self.width), dtype=dtype or np.float32)
        for part, places, own in self._by_part(index):
            found[places] = part[own]
        return found

    def touch(self, rows: np.ndarray) -> None:
        """Have the system read the pages of these rows, without keeping a value."""
        step = max(1, mmap.PAGESIZE // self._parts[0].itemsize)
        for part, _, own in self._by_part(np.asarray(rows, dtype=np.int64)):
            part[own, ::step]

    def read_ahead(self, first: int, last: int) -> None:
        """Have the system begin to read the rows `first` to `last` − 1, and do not wait for them."""
        for part, start in zip(self._parts, self._starts, strict=False):
            begin, end = max(first - int(start), 0), min(last - int(start), len(part))
            mapped: Any = getattr(part, "_mmap", None)
            if begin < end and hasattr(mapped, "madvise"):
                begin = begin * part.strides[0] // mmap.PAGESIZE * mmap.PAGESIZE
                end = min(end * part.strides[0] + mmap.PAGESIZE, len(mapped))
                mapped.madvise(mmap.MADV_WILLNEED, begin, end - begin)

    def _by_part(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each file that has some of the rows: its features, which of the rows, and their places in the file."""
        check_range(rows, len(self), "rows")
        order = np.argsort(rows, kind="stable")
        ends = np.searchsorted(rows[order], self._starts)
        for number in np.flatnonzero(np.diff(ends)):
            places = order[ends[number] : ends[number + 1]]
            yield self._parts[number], places, rows[places] - self._starts[number]

    def blocks(self, rows: np.ndarray, size: int = 8192) -> Iterator[np.ndarray]:
        """`features` of `rows`, block by block: flat memory."""
        for start in range(0, len(rows), size):
            yield self.features(rows[start : start + size])

    @cached_property
    def column_names(self) -> list[str]:
        """The columns of the metadata, as they are in the files."""
        return list(dict.fromkeys(name for parquet in self._parquet() for name in parquet.schema_arrow.names))

    def _parquet(self) -> Iterator[pa.parquet.ParquetFile]:
        """The files of metadata, one after the other."""
        for (_, file), part in zip(self._metadata_files, self._parts, strict=True):
            try:
                parquet = pa.parquet.ParquetFile(file)
            except (pa.ArrowInvalid, OSError) as why:
                raise _damaged(file, why) from None
            with parquet:
                if parquet.metadata.num_rows != len(part):
                    raise StoreError(
                        f"{file} has {parquet.metadata.num_rows:,} rows for {len(part):,} features: embed it again"
                    )
                yield parquet

    def column_chunks(self, name: str) -> Iterator[pa.Array]:
        """One column of the metadata in parts, for all rows; nulls where a file does not have it."""
        for (_, file), parquet in zip(self._metadata_files, self._parquet(), strict=True):
            if name not in parquet.schema_arrow.names:
                yield pa.nulls(parquet.metadata.num_rows)
                continue
            try:
                for batch in parquet.iter_batches(READ_ROWS, columns=[name]):
                    yield batch.column(0)
            except (pa.ArrowInvalid, OSError) as why:
                raise _damaged(file, why) from None

    def column(self, name: str) -> pa.ChunkedArray | None:
        """One column of the metadata, one value per row; None where the store has none of that name."""
        if name not in self.column_names:
            # A folder of clip-retrieval's: the key is the path, and the path, where there is none, the row's number.
            if name == "key" and "image_path" in self.column_names:
                return self.column("image_path")
            return pa.chunked_array([[str(i) for i in range(len(self))]]) if name in ("key", "image_path") else None
        chunks = [chunk for chunk in self.column_chunks(name) if not pa.types.is_null(chunk.type)]
        return pa.chunked_array(chunks)

    @cached_property
    def captions(self) -> Captions:
        """All captions, row by row."""
        size = sum(file.stat().st_size for _, file in self._metadata_files)
        own = "captions" in self.column_names
        if not own and "caption" not in self.column_names:
            return Captions(np.zeros(len(self) + 1, np.int32), pa.array([], pa.large_string()), lambda name: None)
        counts: list[np.ndarray] = []

        def texts() -> Iterator[pa.Array]:
            for chunk in self.column_chunks("captions" if own else "caption"):
                if pa.types.is_string(chunk.type) or pa.types.is_large_string(chunk.type):
                    there = pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(chunk)), 0).fill_null(False)
                    counts.append(there.to_numpy(zero_copy_only=False).astype(np.int32))
                    yield chunk.filter(there)
                elif pa.types.is_list(chunk.type) or pa.types.is_large_list(chunk.type):
                    counts.append(pc.list_value_length(chunk).fill_null(0).to_numpy().astype(np.int32))
                    flat = chunk.flatten()
                    yield flat if flat.type != pa.null() else flat.cast(pa.string())
                else:
                    counts.append(np.zeros(len(chunk), np.int32))

        joined = join_texts(texts(), 3 * size)  # compressed to about a third
        return Captions(offsets_of(np.concatenate(counts)), joined, self._labels if own else lambda name: None)

    def _labels(self, column: str) -> pa.DictionaryArray | None:
        """A label of each caption: its language (langs), or its text field (fields)."""
        if column not in self.column_names:
            return None
        chunks = [chunk.flatten().cast(pa.string()).dictionary_encode() for chunk in self.column_chunks(column)]
        return pa.chunked_array(chunks).unify_dictionaries().combine_chunks()

    @cached_property
    def splits(self) -> list[str]:
        """The splits that there are; none where the store has no column of splits."""
        if "split" not in self.column_names:
            return []
        found = {str(one) for chunk in self.column_chunks("split") for one in pc.unique(chunk).to_pylist()}
        return sorted(found)

    def select(
        self,
        split: str | None = None,
        lang: Sequence[str] = (),
        fields: Sequence[str] = (),
        captions: Captions | None = None,
    ) -> Selection:
        """The images of a split that have captions, with their captions in these languages and of these text fields.

        `captions` stand in for those of the store. Raises `StoreError` where there is no such split, language, field
        or caption.
        """
        return select(self, split, lang, fields, captions)

    def __repr__(self) -> str:
        spec = self.tower["spec"] if self.tower else "unknown"
        return f"FeatureStore({str(self.path)!r}, {len(self):,} images, D={self.width}, tower={spec})"


def _damaged(file: Path, why: Exception) -> StoreError:
    return StoreError(f"{file} is damaged ({str(why).splitlines()[0]}): remove the store and embed again")


class StoreWriter:
    """Writes a feature store shard by shard, each atomically, so that any interruption can be resumed.

    The order of the writes makes a shard count only when all of it is on disk: features, metadata, then the
    manifest with the new count. What a killed writer left beyond the manifest is overwritten.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        """Start a store, or go on with an unfinished one of the same `manifest` (see `resumable`)."""
        self.path = path
        self.manifest = {
            "format": FORMAT,
            "complete": False,
            "rows": 0,
            "seen": 0,
            "shards": 0,
            "damaged": 0,
            **manifest,
        }
        if (path / MANIFEST).exists():
            self.manifest = read_json(path / MANIFEST, StoreError)
            sweep_temporaries(path)
            self._truncate_damage()
        else:
            path.mkdir(parents=True, exist_ok=True)
            sweep_temporaries(path)
            write_json(path / MANIFEST, self.manifest)

    @property
    def seen(self) -> int:
        """How many of the source's images are done, damaged ones included."""
        return int(self.manifest["seen"])

    def write_shard(
        self, features: np.ndarray, rows: pa.Table, damaged: Sequence[Damage], seen: int, seconds: float = 0.0
    ) -> None:
        """Write one shard: features [n, D], n rows of metadata, what was damaged, source position and time."""
        number = self.manifest["shards"]
        stored = np.ascontiguousarray(features, dtype=self.manifest["dtype"])
        if not np.isfinite(stored).all():
            row = int(np.flatnonzero(~np.isfinite(stored).all(axis=1))[0])
            raise DataError(
                f"the features of {rows['key'][row].as_py()} do not fit {self.manifest['dtype']} "
                "(infinite or not a number): use --store-dtype float32 (with --overwrite), or check the tower"
            )
        if len(features):
            with atomic(self.path / "img_emb" / f"img_emb_{number:04d}.npy") as file, open(file, "wb") as out:
                # np.save, but that a full disk is an error that says so: np.ndarray.tofile has no errno.
                np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(stored))
                out.write(stored.data)
            with atomic(self.path / "metadata" / f"metadata_{number:04d}.parquet") as file:
                pa.parquet.write_table(rows, file)
        if damaged:
            with open(self.path / DAMAGE, "a", encoding="utf-8") as log:
                for one in damaged:
                    log.write(json.dumps({"key": one.key, "reason": one.reason}, ensure_ascii=False) + "\n")
        self.manifest |= {
            "shards": number + (1 if len(features) else 0),
            "rows": self.manifest["rows"] + len(features),
            "damaged": self.manifest["damaged"] + len(damaged),
            "width": int(features.shape[1]) if len(features) else self.manifest.get("width"),
            "seen": seen,
            "seconds": round(self.manifest.get("seconds", 0.0) + seconds, 3),
        }
        write_json(self.path / MANIFEST, self.manifest)

    def join(self, parts: Sequence[Path]) -> None:
        """Take over the shards of finished stores, in order; what an interruption left is done by calling again.

        Shards are renamed, so the parts are no stores any more. All counts are those of the parts together.
        """
        manifests = [read_json(part / MANIFEST, StoreError) for part in parts]
        number, damage = 0, ""
        for part, facts in zip(parts, manifests, strict=True):
            for shard in range(facts["shards"]):
                for name in ("img_emb/img_emb_{:04d}.npy", "metadata/metadata_{:04d}.parquet"):
                    source, target = part / name.format(shard), self.path / name.format(number)
                    target.parent.mkdir(exist_ok=True)
                    if source.exists():
                        source.replace(target)
                    elif not target.exists():
                        raise StoreError(f"{source} is gone: embed again, with --overwrite")
                number += 1
            if (part / DAMAGE).exists():
                damage += (part / DAMAGE).read_text(encoding="utf-8")
        if damage:
            write_text(self.path / DAMAGE, damage)
        self.manifest |= {name: sum(facts[name] for facts in manifests) for name in ("rows", "seen", "damaged")}
        self.manifest |= {
            "shards": number,
            "width": next((facts["width"] for facts in manifests if facts.get("width")), None),
            "seconds": max(facts.get("seconds", 0.0) for facts in manifests),
        }

    def finish(self, **facts: Any) -> FeatureStore:
        """Mark the store complete and open it."""
        self.manifest |= {**facts, "complete": True}
        write_json(self.path / MANIFEST, self.manifest)
        return FeatureStore(self.path)

    def _truncate_damage(self) -> None:
        """Drop the lines of damage that were written after the last shard that counts."""
        file = self.path / DAMAGE
        if file.exists():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            with atomic(file) as temporary:
                temporary.write_text("".join(lines[: self.manifest["damaged"]]), encoding="utf-8")
