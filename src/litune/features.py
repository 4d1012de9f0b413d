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

from litune.data.pairs import Damage, select_captions
from litune.errors import DataError, StoreError, nearest
from litune.files import atomic, read_json, sweep_temporaries, write_json, write_text

FORMAT = 1
MANIFEST, DAMAGE = "store.json", "damaged.jsonl"


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

    Features stay on disk (memory-mapped); `metadata` is one Arrow table of N rows.
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

    @cached_property
    def metadata(self) -> pa.Table:
        """One row per image: key, image_path, captions and, where known, langs, split, label, …"""
        tables = []
        for (_, file), part in zip(self._metadata_files, self._parts, strict=True):
            try:
                table = pa.parquet.read_table(file)
            except (pa.ArrowInvalid, OSError) as why:
                raise StoreError(
                    f"{file} is damaged ({str(why).splitlines()[0]}): remove the store and embed again"
                ) from None
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

    def features(self, rows: Sequence[int] | np.ndarray | slice) -> np.ndarray:
        """Raw float32 features [len(rows), D] of these rows, in the order asked for."""
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        index = np.asarray(rows, dtype=np.int64)
        found = np.empty((len(index), self.width), dtype=np.float32)
        part = np.searchsorted(self._starts, index, side="right") - 1
        for p in np.unique(part):
            here = part == p
            found[here] = self._parts[p][index[here] - self._starts[p]]
        return found

    def blocks(self, rows: np.ndarray, size: int = 8192) -> Iterator[np.ndarray]:
        """`features` of `rows`, block by block: flat memory."""
        for start in range(0, len(rows), size):
            yield self.features(rows[start : start + size])

    def select(self, split: str | None = None, lang: Sequence[str] = (), fields: Sequence[str] = ()) -> Selection:
        """The images of a split that have captions, with their captions in these languages and of these text fields.

        Raises `StoreError` where the store has no such split, language, field or captions.
        """
        table = self.metadata
        rows = np.arange(len(self))
        if split is not None:
            if "split" not in table.column_names:
                raise StoreError(f"{self.path} has no splits, {split!r} was asked for: embed with a split column")
            known = set(pc.unique(table["split"]).to_pylist())
            if split not in known:
                raise StoreError(f"{self.path} has no split {split!r} ({nearest(split, map(str, known))})")
            rows = np.flatnonzero(pc.equal(table["split"], split).to_numpy())
            table = table.take(pa.array(rows))
        if lang:
            if "langs" not in table.column_names:
                raise StoreError(f"{self.path} has no languages, {', '.join(lang)} asked for: embed with a lang column")
            known = set(pc.unique(pc.list_flatten(table["langs"])).to_pylist())
            for name in lang:
                if name not in known:
                    raise StoreError(f"{self.path} has no captions in {name!r} ({nearest(name, map(str, known))})")
            table = select_captions(table, "langs", lang)
        if fields:
            self._check_fields(fields)
            table = select_captions(table, "fields", fields)
        keep = np.flatnonzero(pc.list_value_length(table["captions"]).to_numpy() > 0)
        if not keep.size:
            raise StoreError(f"{self.path} has no captions: embed its images with a table of captions")
        return Selection(self, rows[keep], table.take(pa.array(keep)))

    def _check_fields(self, names: Sequence[str]) -> None:
        if "fields" not in self.metadata.column_names:
            raise StoreError(
                f"{self.path} has one text field, {', '.join(names)} asked for: embed with several --caption-column"
            )
        known = set(pc.unique(pc.list_flatten(self.metadata["fields"])).to_pylist())
        for name in names:
            if name not in known:
                raise StoreError(f"{self.path} has no text field {name!r} ({nearest(name, known)})")

    def __repr__(self) -> str:
        spec = self.tower["spec"] if self.tower else "unknown"
        return f"FeatureStore({str(self.path)!r}, {len(self):,} images, D={self.width}, tower={spec})"


class Selection:
    """Some of a store's images, with their captions."""

    def __init__(self, store: FeatureStore, rows: np.ndarray, table: pa.Table) -> None:
        self.store, self.rows, self._table = store, rows, table.combine_chunks()
        lists = self._table["captions"].combine_chunks()
        self.caption_array = lists.flatten()
        self._offsets = np.concatenate([[0], np.cumsum(pc.list_value_length(lists).to_numpy())])

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def keys(self) -> list[str]:
        """The images' names, as their source has them."""
        found: list[str] = self._table["key"].to_pylist()
        return found

    @property
    def image_files(self) -> list[str]:
        """The images' files."""
        found: list[str] = self._table["image_path"].to_pylist()
        return found

    def column(self, name: str) -> pa.Array | None:
        """A column of the metadata, one value per image; None where the store has none of that name."""
        return self._table[name].combine_chunks() if name in self._table.column_names else None

    @property
    def captions(self) -> list[str]:
        """All captions, image by image."""
        found: list[str] = self.caption_array.to_pylist()
        return found

    @property
    def fields(self) -> list[str]:
        """For each of `captions`, the text field that it is of."""
        found: list[str] = pc.list_flatten(self._table["fields"]).to_pylist()
        return found

    @property
    def owner(self) -> np.ndarray:
        """For each of `captions`, the position of its image in this selection."""
        return np.repeat(np.arange(len(self)), self.counts)

    @property
    def counts(self) -> np.ndarray:
        """The number of captions of each image."""
        return np.diff(self._offsets)

    def subset(self, positions: np.ndarray) -> Selection:
        """The images at these positions of the selection."""
        return Selection(self.store, self.rows[positions], self._table.take(pa.array(positions)))

    def features(self, positions: np.ndarray | None = None) -> np.ndarray:
        """Raw float32 features of the images at these positions (all by default)."""
        return self.store.features(self.rows if positions is None else self.rows[positions])


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
        stored = features.astype(self.manifest["dtype"])
        if not np.isfinite(stored).all():
            row = int(np.flatnonzero(~np.isfinite(stored).all(axis=1))[0])
            raise DataError(
                f"the features of {rows['key'][row].as_py()} do not fit {self.manifest['dtype']} "
                "(infinite or not a number): use --store-dtype float32 (with --overwrite), or check the tower"
            )
        if len(features):
            with atomic(self.path / "img_emb" / f"img_emb_{number:04d}.npy") as file, open(file, "wb") as out:
                np.save(out, stored, allow_pickle=False)
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
