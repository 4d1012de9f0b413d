"""Search: the images of a feature store whose features are nearest to a query's.

**One index for every run.** A locked tower's raw features never change, so an index should outlive the runs that are
tuned on them. What a run compares, though, is not raw: it subtracts its centre c, perhaps applies a whitening M or a
head, and normalises: the score of image r is q · M(r − c) / |M(r − c)|. For one text tower the query could be mapped
through the adjoint instead (Mᵀq against r − c), but the length below the line differs with every map, so that the
order of raw inner products is not the order of scores; and an index of mapped features, kept per map, is void with
the next run whose centre was estimated on other captions. So litune's index contains no map: it is a partition of the
raw features into cells (k-means), and a copy of them quantised to 8 bits, cell by cell. A query is compared with the
cells' centroids, then with the copies of the images in the nearest cells, and the best of those with the features
themselves; all of them go through the run's own `LiT.encode_features` first. Scores are therefore exact for every run,
map and head, a new text tower can search at once, and only the choice of the images that are scored is approximate.

Where the run has the hub correction on (`litune.model.hubs`), features of images get one further dimension, −r / 2, and
a query has there how much of it is a text: rankings are those of the corrected scores, and what is returned are the
cosines. Cells are chosen by the bare query.

The copy only makes searches faster. The rows that a query scores are scattered over the store; in the copy they are
about a hundred contiguous ranges, and half the bytes. Without it (an index that has not been saved yet, or one of an
older litune) searches read the store itself.
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from litune.devices import free_memory, send
from litune.errors import DataError, StoreError
from litune.files import atomic
from litune.image.tower import check_same_tower
from litune.index.cells import BLOCK, Cells, blocks, make_cells, usual_cells
from litune.index.codes import Codes, open_codes, write_codes
from litune.index.exact import SHARE, best_of, block_rows, top_positions
from litune.index.filters import select_rows
from litune.index.hubs import image_corrections
from litune.model.hubs import as_queries, corrections
from litune.model.lit import LiT, Picture, scoring_device
from litune.progress import track
from litune.store.store import FeatureStore
from litune.vectors import normalize

FORMAT = 1
FILE = "index.safetensors"
EXACT_ROWS = 200_000
"""A search scores all images of an index that has no more than this."""
NEAR_BYTES = 200_000
"""Bytes of float32 features that a query is compared with at once: few enough to stay in the processor's cache, and for
the allocator to reuse their memory from block to block."""
CACHED_BYTES = 1 << 30
"""From a run's second search on, its mapped features are kept in memory up to this size; on a GPU, up to a share of its
free memory."""


@dataclass(frozen=True)
class Found:
    """One image found: its row in the store, its path, its cosine similarity with the query, its captions."""

    row: int
    key: str
    path: str
    score: float
    captions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FoundCaption:
    """One caption found: the row of its image, its text, its cosine similarity with the query."""

    row: int
    key: str
    caption: str
    score: float


@runtime_checkable
class Encoder(Protocol):
    """Maps raw image features [B, W] to the unit-length features [B, D] that are compared."""

    def encode_features(self, raw: np.ndarray) -> Tensor:
        """The features [B, D] of raw ones."""
        ...


def nearest_images(
    model: LiT, store: FeatureStore, queries: Float[Tensor, "Q D"], top: int, block: int = BLOCK
) -> list[list[Found]]:
    """For each of Q query features, the `top` images of the store with the highest cosine similarity, best first.

    Exact; reads the store block by block, so that memory is flat. Equal scores keep the store's order.
    """
    encoded = ((rows, model.encode_features(store.features(rows))) for rows in blocks(np.arange(len(store)), block))
    scores, rows = best_of(encoded, queries.to("cpu", torch.float32), top)
    return [_matches(store.metadata, *best) for best in zip(rows, scores, strict=True)]


def _matches(metadata: pa.Table, rows: Tensor, scores: Tensor) -> list[Found]:
    table = metadata.select(["key", "image_path", "captions"]).take(pa.array(rows.numpy())).to_pydict()
    columns = (rows.tolist(), table["key"], table["image_path"], scores.tolist(), table["captions"])
    return [
        Found(row, str(key), str(path), score, captions or [])
        for row, key, path, score, captions in zip(*columns, strict=True)
    ]


class Index:
    """The images of one or several feature stores, searchable by every run on their tower's features.

    Rows are numbered through all stores, in order. Up to `EXACT_ROWS` images a search is exact; beyond, `build` makes
    cells, and a search looks into the nearest of them. What is added, removed or built is kept with `save`.
    """

    def __init__(self, store: FeatureStore | Path | str, file: Path | str | None = None) -> None:
        """Open the index at `file`, by default in the store's folder; where there is none, all images of the store.

        Raises `StoreError` for a store or an index that is missing, damaged or does not fit the other.
        """
        first = store if isinstance(store, FeatureStore) else FeatureStore(store)
        self.stores = [first]
        self.file = Path(file) if file is not None else first.path / FILE
        self.cells: Cells | None = None
        self.codes: Codes | None = None
        self.there = np.ones(len(first), dtype=bool)
        self.probes = 0
        """Cells that a search looks into."""
        self._metadata: pa.Table | None = None
        self._mapped: dict[str, Tensor] = {}
        self._last_run = ""
        self._captions: dict[str, Tensor] = {}
        self._hubs: dict[str, Tensor] = {}
        if self.file.exists():
            self._read()

    @property
    def store(self) -> FeatureStore:
        """The first store."""
        return self.stores[0]

    @property
    def rows(self) -> int:
        """The number of rows, removed ones included."""
        return len(self.there)

    def __len__(self) -> int:
        """The number of images that can be found."""
        return int(self.there.sum())

    @property
    def metadata(self) -> pa.Table:
        """One row per image of all stores."""
        if self._metadata is None:
            tables = [store.metadata for store in self.stores]
            self._metadata = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
        return self._metadata

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the features: float16, or float32 where a store has wider ones."""
        return np.result_type(*(store.dtype for store in self.stores))

    def features(self, rows: np.ndarray, dtype: np.dtype[Any] | None = None) -> np.ndarray:
        """Raw features [n, W] of these rows, float32 by default."""
        if len(self.stores) == 1:
            return self.store.features(rows, dtype)
        starts = np.cumsum([0] + [len(store) for store in self.stores])
        owner = np.searchsorted(starts, rows, side="right") - 1
        features = np.empty((len(rows), self.store.width), dtype=dtype or np.float32)
        for number in np.unique(owner):
            own = owner == number
            features[own] = self.stores[number].features(rows[own] - starts[number], dtype)
        return features

    # Queries

    def query(
        self,
        model: LiT,
        text: str | None = None,
        image: Picture | int | Tensor | None = None,
        *,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
    ) -> Float[Tensor, " D"]:
        """The feature [D] of a query: a text, an image, or both together.

        An image is a picture, a row of the index, or features [D]. For a text and an image, the weighted sum of their
        unit-length features is normalised again; a negative weight means "less like".
        """
        return combine(self._parts(model, text, image, text_weight, image_weight))

    def _parts(
        self,
        model: LiT,
        text: str | None,
        image: Picture | int | Tensor | None,
        text_weight: float,
        image_weight: float,
    ) -> list[Tensor]:
        """The weighted features of a query's text and of its picture, of those that there are."""
        parts = []
        if text is not None:
            if not text.strip():
                raise DataError("the text of the query is empty: say what to look for, or leave it out")
            parts.append(text_weight * model.encode_text(text)[0])
        if image is not None:
            parts.append(image_weight * self._image_feature(model, image))
        return parts

    def _image_feature(self, model: LiT, image: Picture | int | Tensor) -> Tensor:
        if isinstance(image, Tensor):
            return normalize(image.detach().to("cpu", torch.float32)[None])[0]
        if isinstance(image, int):
            if not 0 <= image < self.rows:
                raise DataError(f"there is no row {image}: the index has {self.rows:,}, counted from 0")
            return model.encode_features(self.features(np.array([image])))[0]
        return model.encode_image(image)[0]

    def search(
        self,
        model: LiT,
        text: str | None = None,
        image: Picture | int | Tensor | None = None,
        *,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
        top: int = 10,
        offset: int = 0,
        where: Sequence[str] = (),
        exact: bool | None = None,
        hub_correction: bool = True,
    ) -> list[Found]:
        """The images nearest to a text, an image, or both (see `query`), best first, without the first `offset`.

        A text ranks them by corrected scores where the run has the hub correction on (see `litune.model.hubs`) and
        `hub_correction` does not turn it off; `Found.score` is the cosine all the same.

        `where` are conditions on the metadata, such as "split=val" or "width>=640"; all have to be met. By default the
        search is exact up to `EXACT_ROWS` images, and where no cells were built.
        """
        _check_count("top", top, 1)
        _check_count("offset", offset, 0)
        parts = self._parts(model, text, image, text_weight, image_weight)
        corrects = hub_correction and model.bank is not None
        query = combine(parts, 0.0 if text is None else text_weight) if corrects else combine(parts)
        mask = select_rows(self.metadata, where) if where else None
        scores, rows = self.nearest(model, query[None], offset + top, mask=mask, exact=exact)
        return self.describe(rows[0][offset:], scores[0][offset:])

    def describe(self, rows: Tensor, scores: Tensor) -> list[Found]:
        """Rows and scores with the images' keys and paths."""
        return _matches(self.metadata, rows, scores)

    def search_captions(
        self,
        model: LiT,
        text: str | None = None,
        image: Picture | int | Tensor | None = None,
        *,
        text_weight: float = 1.0,
        image_weight: float = 1.0,
        top: int = 10,
        where: Sequence[str] = (),
        hub_correction: bool = True,
    ) -> list[FoundCaption]:
        """The captions nearest to a text, an image or both, best first. The first search encodes all captions.

        An image ranks them by corrected scores where the run has the hub correction on, as in `search`.
        """
        _check_count("top", top, 1)
        parts = self._parts(model, text, image, text_weight, image_weight)
        query = combine(parts, 0.0 if image is None else image_weight)
        mask = self.there & select_rows(self.metadata, where)
        lists = self.metadata["captions"].combine_chunks()
        captions, owner = lists.flatten(), np.repeat(np.arange(self.rows), _lengths(lists))
        features = self._caption_features(model, captions)
        cosines = features @ query[:-1]
        scores = cosines.clone()
        if hub_correction and model.bank is not None and query[-1]:
            scores += query[-1] * corrections(features, model.bank.images)
        scores[torch.from_numpy(~mask[owner])] = -torch.inf
        best = [i for i in top_positions(scores, top).tolist() if scores[i] > -torch.inf]
        keys = self.metadata["key"]
        return [
            FoundCaption(int(owner[i]), str(keys[int(owner[i])]), captions[i].as_py(), float(cosines[i])) for i in best
        ]

    def _caption_features(self, model: LiT, captions: pa.Array, size: int = 1024) -> Tensor:
        key = fingerprint(model, "text.", "text_head.")
        if key not in self._captions:
            features = [torch.empty(0, model.dim)]
            with track("encoding captions", "captions", len(captions)) as task:
                for start in range(0, len(captions), size):
                    features.append(model.encode_text(captions[start : start + size].to_pylist()))
                    task.advance(len(features[-1]))
            self._captions = {key: torch.cat(features)}
        return self._captions[key]

    def nearest(
        self,
        model: Encoder,
        queries: Float[Tensor, "Q D"],
        top: int,
        *,
        mask: np.ndarray | None = None,
        exact: bool | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """For each of Q query features, the cosines and the rows of the `top` nearest images, best first, on the CPU.

        Queries that are one dimension wider than the model's features (see `combine`) rank by corrected scores. Only
        images in `mask` [rows] are searched. Equal scores keep the order of the rows. Where the model is on a GPU,
        images are compared there.
        """
        keep = self.there if mask is None else self.there & mask
        count = int(keep.sum())
        queries = send(queries.float(), scoring_device(model))
        hubs = self.corrections(model) if isinstance(model, LiT) and queries.shape[1] > model.dim else None
        if self.cells is None or (count <= EXACT_ROWS if exact is None else exact):
            return _cosines(*best_of(self._all(model, keep, len(queries), hubs), queries, top), queries, hubs)
        share = max(count, 1) / max(len(self), 1)
        centroids = self._centroid_features(model)
        scores = queries[:, : centroids.shape[1]] @ centroids.T
        results = [
            best_of(self._near(model, query, cells, keep, top, share, hubs), query[None], top)
            for cells, query in zip(scores, queries, strict=True)
        ]
        return _cosines([scores[0] for scores, _ in results], [rows[0] for _, rows in results], queries, hubs)

    def corrections(self, model: LiT) -> Float[Tensor, " rows"]:
        """−r / 2 of every image under a run that has the hub correction on, where features are compared.

        Those of each store are computed in the first search, and kept in its folder.
        """
        assert model.bank is not None
        image_side = _image_side(model)
        key = f"{scoring_device(model)} {image_side} {model.bank.digest}"
        if key not in self._hubs:
            parts = [image_corrections(store, model, model.bank, image_side) for store in self.stores]
            self._hubs = {key: send(torch.from_numpy(np.concatenate(parts)), scoring_device(model))}
        return self._hubs[key]

    def _all(
        self, model: Encoder, keep: np.ndarray, queries: int, hubs: Tensor | None
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        features = self._cached_features(model, hubs)
        for rows in blocks(np.flatnonzero(keep), self._block_rows(model, queries)):
            if features is None:
                yield rows, self._map_rows(model, rows, hubs)
            elif rows[-1] - rows[0] + 1 == len(rows):  # without gaps, a slice needs no copy
                yield rows, features[rows[0] : rows[-1] + 1]
            else:
                yield rows, features[send(torch.from_numpy(rows), features.device)]

    def _block_rows(self, model: Encoder, queries: int = 0) -> int:
        width = self.store.width
        return block_rows(scoring_device(model), width, model.dim if isinstance(model, LiT) else width, queries)

    def _map_rows(self, model: Encoder, rows: np.ndarray, hubs: Tensor | None) -> Tensor:
        """The mapped features of these rows, with their corrections, on the device where they are compared."""
        on_gpu = scoring_device(model).type == "cuda"
        raw = self.features(rows, self.dtype if on_gpu else None)  # float16: half the bytes to send
        return _join(_map(model, raw), hubs, rows)

    def _near(
        self,
        model: Encoder,
        query: Tensor,
        scores: Tensor,
        keep: np.ndarray,
        top: int,
        share: float,
        hubs: Tensor | None,
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """The images in the `probes` nearest cells; in more of them where a filter leaves few images."""
        assert self.cells is not None
        nearest = scores.cpu().argsort(descending=True).numpy()
        enough = np.searchsorted(np.cumsum(self.cells.count()[nearest]) * share, 4 * top) + 1
        positions = self.cells.positions(nearest[: max(int(self.probes / share), int(enough))])
        rows = self.cells.order[positions]
        positions, rows = positions[keep[rows]], rows[keep[rows]]
        on_gpu = query.device.type == "cuda"
        size = self._block_rows(model) if on_gpu else max(1, NEAR_BYTES // (4 * self.store.width))
        if self.codes is not None and len(rows) > (shortlist := 4 * top + 100):
            codes, order = self.codes, self.cells.order
            estimates = [
                _join(_map(model, codes.features(part)), hubs, order[part]) @ query for part in blocks(positions, size)
            ]
            rows = rows[top_positions(torch.cat(estimates).cpu(), shortlist).numpy()]
        for block in blocks(np.sort(rows), size):
            yield block, self._map_rows(model, block, hubs)

    def _cached_features(self, model: Encoder, hubs: Tensor | None) -> Tensor | None:
        """The mapped features of all rows; None where they are too large to keep, or in a run's first search."""
        device = scoring_device(model)
        if not isinstance(model, LiT):
            return None
        # The key of corrections names the run as well; what maps the features is hashed once a search.
        key = next((key for key, own in self._hubs.items() if own is hubs), None) or f"{device} {_image_side(model)}"
        if key in self._mapped:
            return self._mapped[key]
        most = CACHED_BYTES if device.type == "cpu" else SHARE * free_memory(device)
        if self.rows * model.dim * 4 > most:
            return None
        if key != self._last_run:
            self._last_run = key
            return None
        features = torch.empty(self.rows, model.dim + (hubs is not None), device=device)
        for rows in blocks(np.arange(self.rows), self._block_rows(model)):
            features[rows[0] : rows[-1] + 1] = self._map_rows(model, rows, hubs)
        self._mapped = {key: features}
        return features

    def _centroid_features(self, model: Encoder) -> Tensor:
        assert self.cells is not None
        return _map(model, self.cells.centroids)

    # Cells

    def build(self, cells: int | None = None, *, seed: int = 0) -> None:
        """Group all images into cells (2√N by default): k-means on a sample, then one pass over all.

        Searches look into a 32nd of the cells until `calibrate` finds how many a run's queries need. Raises
        `MissingExtraError` without faiss.
        """
        count = usual_cells(len(self)) if cells is None else cells
        with track("building the index", "images", len(self)) as task:
            self.cells, self.codes = make_cells(self.features, self.there, count, seed, task.advance), None
        self.probes = max(1, len(self.cells) // 32)

    def calibrate(self, model: Encoder, queries: Float[Tensor, "Q D"], *, top: int = 10, target: float = 0.96) -> float:
        """Set `probes` to the least that has the `target` recall@`top` on these queries; returns the recall.

        Recall on other queries varies a little, so the default is above the 95% wanted for them.
        """
        if self.cells is None:
            raise StoreError(f"{self.file} has no cells: build them first")
        _, expected = self.nearest(model, queries, top, exact=True)
        centroids = self._centroid_features(model).cpu()
        scores = queries.to("cpu", torch.float32)[:, : centroids.shape[1]] @ centroids.T
        ranks = []  # for each true neighbour, how many cells are nearer to the query than its own
        for rows, cell_scores in zip(expected, scores, strict=True):
            cell_ranks = cell_scores.argsort(descending=True).argsort()
            ranks.append(cell_ranks[torch.from_numpy(self.cells.cell[rows.numpy()])])
        ordered = torch.cat(ranks).sort().values
        needed = max(math.ceil(target * len(ordered)), 1) - 1
        self.probes = int(ordered[needed]) + 1
        return float((ordered < self.probes).double().mean())

    def recall(self, model: Encoder, queries: Float[Tensor, "Q D"], top: int = 10) -> float:
        """The share of each query's true `top` nearest images that a search through the cells finds, on average."""
        expected = self.nearest(model, queries, top, exact=True)[1]
        return shared(expected, self.nearest(model, queries, top, exact=False)[1])

    # Adding, removing, keeping

    def add(self, store: FeatureStore | Path | str) -> None:
        """Make the images of another store of the same tower searchable. Cells stay as they are.

        Raises `StoreError` where its features are of another tower or width.
        """
        more = store if isinstance(store, FeatureStore) else FeatureStore(store)
        known = {store.path.resolve() for store in self.stores}
        if more.path.resolve() in known:
            raise StoreError(f"{more.path} is in the index already")
        indexed = replace(self.store.made_with, name=f"the index of {self.store.path}")
        check_same_tower(more.made_with, indexed, "embed with the same image tower", strict=True)
        if self.cells is not None:
            assigned = [self.cells.assign(more.features(rows)) for rows in blocks(np.arange(len(more)))]
            self.cells, self.codes = self.cells.with_rows(np.concatenate([self.cells.cell, *assigned])), None
        self.stores.append(more)
        self.there = np.concatenate([self.there, np.ones(len(more), dtype=bool)])
        self._changed()

    def remove(self, keys: Sequence[str]) -> int:
        """Exclude the images with these keys from every search; returns how many there were.

        Raises `DataError` for a key that no image has.
        """
        keys = [keys] if isinstance(keys, str) else keys
        removed = np.isin(self.metadata["key"].to_numpy(), np.asarray(list(keys), dtype=object)) & self.there
        known = set(self.metadata.filter(pa.array(removed))["key"].to_pylist())
        if missing := [key for key in keys if key not in known]:
            raise DataError(
                f"no image of the index has the key {missing[0]!r}: give keys as in the store's metadata, or as "
                "`Found.key` has them"
            )
        self.there = self.there & ~removed
        return int(removed.sum())

    def _changed(self) -> None:
        self._metadata, self._mapped, self._captions, self._hubs = None, {}, {}, {}

    def save(self) -> Path:
        """Write cells, codes, added stores and removed images, atomically; codes go to their own file beside `file`.

        Existing codes are rewritten only where images were added or cells changed.
        """
        tensors = {"there": self.there.astype(np.uint8)}
        if self.cells is not None:
            if self.codes is None:
                name = f"{self.file.stem}.codes-{hashlib.sha256(self.cells.cell.data).hexdigest()[:12]}.npy"
                with track("writing the index", "images", len(self.cells.order)) as task:
                    self.codes = write_codes(self.file.with_name(name), self.features, self.cells, task.advance)
            tensors |= {"centroids": self.cells.centroids, "mean": self.cells.mean, "cell": self.cells.cell}
            tensors |= {"low": self.codes.low, "step": self.codes.step}
        header = {
            "format": FORMAT,
            "probes": self.probes,
            "codes": None if self.codes is None else self.codes.file.name,
            "stores": [_describe(store) for store in self.stores],
        }
        with atomic(self.file) as temporary:
            save_file(tensors, temporary, {"litune": json.dumps(header)})
        for old in self.file.parent.glob(f"{glob.escape(self.file.stem)}.codes-*.npy"):
            if old.name != header["codes"]:
                old.unlink(missing_ok=True)
        return self.file

    def _read(self) -> None:
        try:
            with safe_open(self.file, framework="np") as file:
                header = json.loads((file.metadata() or {}).get("litune", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError, OSError) as why:
            raise StoreError(f"{self.file} is damaged ({why}): remove it and build the index again") from None
        if header.get("format") != FORMAT:
            raise StoreError(f"{self.file} has the index format {header.get('format')!r}, this litune reads {FORMAT}")
        for saved in header["stores"][1:]:
            if not Path(saved["path"]).is_dir():
                raise StoreError(
                    f"{self.file} holds the images of {saved['path']}, too, which is gone: bring it back, or remove "
                    "the index"
                )
            self.stores.append(FeatureStore(saved["path"]))
        for store, saved in zip(self.stores, header["stores"], strict=True):
            now = _describe(store)
            if changed := [name for name in ("rows", "width", "weights") if now[name] != saved[name]]:
                name = changed[0]
                raise StoreError(
                    f"{self.file} was built when {store.path} had {name} {saved[name]}, it has {now[name]}: remove the "
                    "index and build it again"
                )
        self.there, self.probes = tensors["there"].astype(bool), int(header["probes"])
        if "cell" in tensors:
            self.cells = Cells(tensors["centroids"], tensors["mean"], tensors["cell"])
        if self.cells is not None and header.get("codes"):
            file = self.file.with_name(header["codes"])
            self.codes = open_codes(file, tensors["low"], tensors["step"], len(self.cells.order))


def _check_count(name: str, value: int, least: int) -> None:
    if value < least:
        raise DataError(f"{name} is {value}, it must be at least {least}")


def combine(parts: Sequence[Float[Tensor, " D"]], corrected: float | None = None) -> Float[Tensor, " E"]:
    """The sum of weighted features, of length one. Raises `DataError` for no parts, or parts that sum to zero.

    With `corrected`, the weight of the part for which the hub correction is meant (0 without one), the query gets one
    further dimension (E = D + 1, else D).
    """
    if not parts:
        raise DataError("a query needs a text, an image or both")
    total = torch.stack(list(parts)).sum(0)
    if not total.norm() > 1e-6:
        raise DataError("the weighted text and image cancel each other out: change the weights")
    query = normalize(total[None])
    return (query if corrected is None else as_queries(query, corrected / float(total.norm())))[0]


def _join(features: Tensor, hubs: Tensor | None, rows: np.ndarray) -> Tensor:
    """Features of these rows with their corrections, if there are any, as one further dimension."""
    if hubs is None:
        return features
    return torch.cat([features, hubs[send(torch.from_numpy(rows), hubs.device)][:, None]], dim=1)


def _cosines(
    scores: list[Tensor], rows: list[Tensor], queries: Tensor, hubs: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Scores without their corrections, and their rows."""
    if hubs is None:
        return scores, rows
    shares = queries[:, -1].cpu()
    own = [hubs[send(of, hubs.device)].cpu() for of in rows]
    return [each - share * part for each, share, part in zip(scores, shares, own, strict=True)], rows


def shared(expected: Sequence[Tensor], retrieved: Sequence[Tensor]) -> float:
    """The share of the expected rows that were retrieved, averaged over queries."""
    shares = [len(set(a.tolist()) & set(b.tolist())) / max(len(a), 1) for a, b in zip(expected, retrieved, strict=True)]
    return sum(shares) / max(len(shares), 1)


def fingerprint(model: LiT, *prefixes: str) -> str:
    """A hash of the model's weights whose names begin with these prefixes: equal ones give equal features."""
    named = {name: value.detach() for name, value in model.state_dict().items() if name.startswith(prefixes)}
    values = [value.contiguous().view(-1).view(torch.uint8) for value in named.values()]
    whole = torch.cat(values).cpu().split([len(value) for value in values])  # a GPU is waited for once
    digest = hashlib.sha256()
    for name, value in zip(named, whole, strict=True):
        digest.update(name.encode())
        digest.update(value.numpy().data)
    return digest.hexdigest()


def _image_side(model: LiT) -> str:
    """The fingerprint of what maps the features of images."""
    return fingerprint(model, "center", "whitening", "image_head.")


def _map(model: Encoder, raw: np.ndarray) -> Tensor:
    """Raw features as the model compares them, on the device where it does."""
    if isinstance(model, LiT) and scoring_device(model).type == "cuda":
        return model.map_features(raw)
    return model.encode_features(raw)


def _weights(store: FeatureStore) -> str | None:
    return (store.tower or {}).get("weights")


def _describe(store: FeatureStore) -> dict[str, Any]:
    return {"path": str(store.path.absolute()), "rows": len(store), "width": store.width, "weights": _weights(store)}


def _lengths(lists: pa.Array) -> np.ndarray:
    import pyarrow.compute as pc

    lengths: np.ndarray = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return lengths
