"""What the API answers, without HTTP: a run, the images it is served with, and the worker that computes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from litune.config import ServeConfig
from litune.errors import DataError, LituneError
from litune.index.filters import Column, list_columns, select_rows
from litune.index.index import Found, Index, combine, fingerprint
from litune.model.lit import LiT
from litune.prompts import BARE_TEMPLATES, DEFAULT_TEMPLATES, SHORT_TEMPLATES, write_prompts
from litune.serve import messages
from litune.serve.cache import Cache
from litune.serve.metrics import Metrics
from litune.serve.pictures import open_upload, thumbnail
from litune.serve.problems import Problem
from litune.serve.worker import Busy, Worker
from litune.text.alike import find_alike
from litune.vectors import class_vectors, normalize

TEMPLATES = {"auto": DEFAULT_TEMPLATES, "bare": BARE_TEMPLATES, "short": SHORT_TEMPLATES}
MAX_TEXTS = 8192
"""Texts that the classes and templates of one request may make."""
MAX_NUMBERS = 500_000
"""Probabilities in one answer."""
DECODERS = 2
"""Pictures that are decoded at once: of each, all pixels are in memory."""
ROWS = 1024
"""Stored features that one job reads."""

T = TypeVar("T")


class Engine:
    """A run and its images, asked by many at once."""

    def __init__(self, model: LiT, index: Index | None, config: ServeConfig, name: str, facts: dict[str, Any]) -> None:
        """Serve `model`, called `name`, on the images of `index`; `facts` of the model go into /v1/model."""
        self.model, self.index, self.config, self.name, self.facts = model, index, config, name, facts
        self.can_encode_images = bool(facts["can_encode_images"])
        self.text_key = fingerprint(model, "text.", "text_head.")
        size = int(config.cache_mb * 1e6)
        self.texts_kept = Cache[tuple[str, str], Tensor](size)
        self.pictures_kept = Cache[tuple[int, int], bytes](size)
        self.masks_kept = Cache[tuple[str, ...], np.ndarray](size)
        self.columns_kept: list[Column] | None = None
        self.metrics = Metrics(lambda: self.worker.waiting())
        self.worker = Worker(
            {"texts": self._encode_texts, "pixels": self._encode_pixels, "search": self._search, "call": _call},
            batch=config.batch,
            seconds=config.batch_ms / 1000,
            queue=config.queue,
            on_batch=lambda kind, weight: self.metrics.batches.labels(kind).observe(weight),
        )
        self.decoding = 0
        # Threads of their own: were pictures decoded in any thread, each would keep some of the memory that it took.
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="decode")
        self.scale = float(model.scale.detach())
        self.corrects_hubs = model.bank is not None and config.hub_correction
        if index is not None:
            self.rows = np.flatnonzero(index.there)
            self.metadata = index.metadata
            self.has_labels = "label" in self.metadata.column_names

    def stop(self) -> None:
        """Finish what waits."""
        self.worker.stop()
        self._decoders.shutdown()

    # In the worker's thread

    def _encode_texts(self, payloads: list[list[str]]) -> list[Tensor]:
        found = self.model.encode_text([text for texts in payloads for text in texts])
        return list(found.split([len(texts) for texts in payloads]))

    def _encode_pixels(self, payloads: list[np.ndarray]) -> list[Tensor]:
        tower = self.model.load_image_tower()
        return list(self.model.encode_features(tower.encode(torch.from_numpy(np.stack(payloads)))))

    def _search(self, payloads: list[tuple[Tensor, int, np.ndarray | None]]) -> list[tuple[Tensor, Tensor]]:
        """Searches of all images share one pass over them; filtered ones are done by themselves."""
        assert self.index is not None
        exact = None if self.config.index == "auto" else self.config.index == "exact"
        found: dict[int, tuple[Tensor, Tensor]] = {}
        plain = [i for i, (_, _, mask) in enumerate(payloads) if mask is None]
        if plain:
            queries = torch.stack([payloads[i][0] for i in plain])
            most = max(payloads[i][1] for i in plain)
            scores, rows = self.index.nearest(self.model, queries, most, exact=exact)
            found |= {i: (scores[n], rows[n]) for n, i in enumerate(plain)}
        for i, (query, top, mask) in enumerate(payloads):
            if mask is not None:
                scores, rows = self.index.nearest(self.model, query[None], top, mask=mask, exact=exact)
                found[i] = scores[0], rows[0]
        return [found[i] for i in range(len(payloads))]

    # From the event loop

    async def _do(self, kind: str, payload: Any, weight: int = 1) -> Any:
        try:
            return await self.worker.do(kind, payload, weight)
        except Busy:
            raise busy() from None

    async def _compute(self, function: Callable[[], T]) -> T:
        found: T = await self._do("call", function)
        return found

    async def texts(self, texts: Sequence[str]) -> Tensor:
        """Features [N, D] of N texts; each distinct one that is not kept is encoded once.

        A long list goes through the worker batch by batch, so that others come in between.
        """
        known = {text: self.texts_kept.get((self.text_key, text)) for text in texts}
        missing = [text for text, feature in known.items() if feature is None]
        self.metrics.texts.labels("cache").inc(len(texts) - len(missing))
        self.metrics.texts.labels("model").inc(len(missing))
        for start in range(0, len(missing), self.config.batch):
            chunk = missing[start : start + self.config.batch]
            for text, feature in zip(chunk, await self._do("texts", chunk, len(chunk)), strict=True):
                known[text] = feature
                self.texts_kept.put((self.text_key, text), feature.clone(), 4 * self.model.dim + len(text))
        return torch.stack([feature for text in texts if (feature := known[text]) is not None])

    async def pictures(self, files: Sequence[tuple[str, Callable[[], Awaitable[bytes]]]]) -> Tensor:
        """Features [B, D] of B uploaded pictures, each a name and what reads its bytes."""
        if not self.can_encode_images:
            raise Problem(
                409, "this server can't encode pictures: its image tower could not be loaded", "the image tower",
                "use rows of the store, or start the server with --image-tower",
            )  # fmt: skip
        if self.decoding + len(files) > self.config.queue:
            raise busy()
        self.decoding += len(files)
        jobs: list[asyncio.Task[Tensor]] = []
        try:
            for name, read in files:  # one after the other, so that few decoded pictures are in memory
                pixels = await self._in_thread(partial(self._decode, name, await read()))
                jobs.append(asyncio.create_task(self._do("pixels", pixels)))
            return torch.stack(await asyncio.gather(*jobs))
        finally:
            for job in jobs:
                job.cancel()
            self.decoding -= len(files)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, function)

    def _decode(self, name: str, data: bytes) -> np.ndarray:
        try:
            picture = open_upload(data, int(self.config.pixels_m * 1e6))
            return np.asarray(self.model.load_image_tower().preprocess(picture))
        except LituneError as why:
            raise Problem(
                422, f"the picture {name[:100]!r} can't be used: {why}", name, "send a whole, smaller or other picture"
            ) from None

    async def images(self, images: Sequence[messages.Image]) -> Tensor:
        """Features [B, D] of images that are rows of the store, or features themselves."""
        rows = [image.row for image in images if isinstance(image, messages.Row)]
        stored = iter(await self.stored(np.array([self.check_row(row) for row in rows]))) if rows else iter(())
        return torch.stack([
            next(stored) if isinstance(image, messages.Row) else self._given(image.features) for image in images
        ])  # fmt: skip

    def _given(self, features: list[float]) -> Tensor:
        found = torch.tensor(features, dtype=torch.float32)
        if len(features) != self.model.dim or not (found.isfinite().all() and 1e-6 < found.norm() < 1e18):
            raise Problem(
                422, f"features of an image are {self.model.dim} numbers that are not all zero", "features",
                "send what /v1/encode/image gave",
            )  # fmt: skip
        return normalize(found[None])[0]

    async def stored(self, rows: np.ndarray) -> Tensor:
        """Features [n, D] of these rows of the store."""
        index = self.need_images()
        found = [
            await self._compute(partial(_features, self.model, index, rows[start : start + ROWS]))
            for start in range(0, len(rows), ROWS)
        ]
        return torch.cat([torch.empty(0, self.model.dim), *found])

    async def match(self, images: Sequence[messages.Image], texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Cosines [B, N] of images and texts, and per image the softmax at the model's temperature."""
        cosines = (await self.images(images)) @ (await self.texts(texts)).T
        return cosines, (self.scale * cosines).softmax(1)

    async def classify(
        self, images: Tensor | np.ndarray, classes: Sequence[str], templates: str | Sequence[str]
    ) -> Tensor:
        """Probabilities [B, C] of classes for images: features [B, D], or rows of the store."""
        chosen = TEMPLATES[templates] if isinstance(templates, str) else templates
        if len(classes) * len(chosen) > MAX_TEXTS:
            raise Problem(
                422, f"{len(classes)} classes in {len(chosen)} templates are more than {MAX_TEXTS:,} texts",
                "classes", "send fewer classes or templates",
            )  # fmt: skip
        if len(images) * len(classes) > MAX_NUMBERS:
            raise Problem(
                422, f"{len(images):,} images and {len(classes)} classes make more than {MAX_NUMBERS:,} probabilities",
                "images", 'ask for some of them: "images": {"offset": 0, "limit": 1000}',
            )  # fmt: skip
        if blank := [name for name in classes if not name.strip()]:
            raise Problem(422, f"classes has the blank name {blank[0][:20]!r}", "classes", "leave it out")
        if alike := find_alike(classes):
            raise Problem(422, f"classes has {alike}", "classes", "leave one of them out")
        weights = class_vectors(await self.texts(write_prompts(classes, chosen)), len(classes))
        found = [torch.empty(0, len(classes))]
        for start in range(0, len(images), ROWS):
            part = images[start : start + ROWS]
            features = await self.stored(part) if isinstance(part, np.ndarray) else part
            found.append(await self._compute(partial(_probabilities, self.scale, features, weights)))
        return torch.cat(found)

    async def search(self, request: messages.Search) -> list[Found]:
        """The images nearest to a text, an image or both."""
        index = self.need_images()
        parts = []
        if request.text is not None:
            parts.append(request.text_weight * (await self.texts([request.text]))[0])
        if request.image is not None:
            parts.append(request.image_weight * (await self.images([request.image]))[0])
        try:
            text_weight = 0.0 if request.text is None else request.text_weight
            query = combine(parts, text_weight if self.corrects_hubs else None)
        except DataError as why:
            raise Problem(422, str(why), "the query", "send other weights, or one of both") from None
        mask = await self._mask(tuple(request.where)) if request.where else None
        scores, rows = await self._do("search", (query, request.offset + request.top, mask))
        some = slice(request.offset, request.offset + request.top)
        return index.describe(rows[some], scores[some])

    async def _mask(self, where: tuple[str, ...]) -> np.ndarray:
        mask = self.masks_kept.get(where)
        if mask is None:
            try:
                mask = await self._in_thread(partial(select_rows, self.metadata, where))
            except DataError as why:
                raise Problem(422, str(why), "where", "see /v1/columns for the columns") from None
            self.masks_kept.put(where, mask, mask.nbytes)
        return mask

    # Of the store

    def need_images(self) -> Index:
        """The index. Raises `Problem` where the server has no images."""
        if self.index is None:
            raise Problem(
                409, "this server was started without images", "the store", "start it with --images STORE"
            )  # fmt: skip
        return self.index

    def check_row(self, row: int, status: int = 422) -> int:
        """A row of the store. Raises `Problem` where it has none of that number."""
        index = self.need_images()
        if not (0 <= row < index.rows and index.there[row]):
            known = f"there is no row {row}: they go from 0 to {index.rows - 1}"
            gone = f"row {row} was removed from the index"
            raise Problem(status, gone if 0 <= row < index.rows else known, "row", "see /v1/images")
        return row

    async def rows_where(self, where: tuple[str, ...]) -> np.ndarray:
        """The rows of the images that meet all conditions."""
        index = self.need_images()
        return np.flatnonzero(index.there & await self._mask(where)) if where else self.rows

    async def columns(self) -> list[Column]:
        """What conditions can ask for; nothing where the server has no images."""
        if self.columns_kept is None:
            found = [] if self.index is None else await self._in_thread(partial(list_columns, self.metadata))
            self.columns_kept = found
        return self.columns_kept

    def page(self, offset: int, limit: int) -> np.ndarray:
        """The rows of the images from number `offset` on."""
        self.need_images()
        return self.rows[offset : offset + limit]

    def describe(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Key, captions and label of these rows."""
        table = self.metadata.take(rows)
        labels = table["label"].to_pylist() if self.has_labels else [None] * len(rows)
        columns = (rows.tolist(), table["key"].to_pylist(), table["captions"].to_pylist(), labels)
        return [
            {"row": row, "key": str(key), "captions": captions or [], "label": None if label is None else str(label)}
            for row, key, captions, label in zip(*columns, strict=True)
        ]

    async def picture(self, row: int, size: int) -> bytes:
        """A thumbnail of the image in a row; no other file than the one that the store names is read."""
        self.check_row(row, 404)
        kept = self.pictures_kept.get((row, size))
        if kept is None:
            path = str(self.metadata["image_path"][row].as_py())
            try:
                kept = await self._in_thread(partial(thumbnail, path, size))
            except DataError as why:
                raise Problem(404, f"the picture of row {row} can't be shown: {why}", "row", "restore it") from None
            self.pictures_kept.put((row, size), kept, len(kept))
        return kept


def busy() -> Problem:
    """The answer where too many requests wait."""
    return Problem(429, "too many requests are waiting", "the queue", "try again in a second", {"Retry-After": "1"})


def _features(model: LiT, index: Index, rows: np.ndarray) -> Tensor:
    return model.encode_features(index.features(rows))


def _probabilities(scale: float, features: Tensor, weights: Tensor) -> Tensor:
    return (scale * features @ weights.T).softmax(1)


def _call(functions: list[Callable[[], Any]]) -> list[Any]:
    return [function() for function in functions]
