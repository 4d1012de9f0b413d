"""Vectors of a store's captions from a text tower that is locked: encoded once, and kept beside the features.

    STORE/text_emb/FINGERPRINT/part-0.npy    rows of two fields: a text's hash, and its vector

Every distinct text is there once, for all commands that read this tower. A part is written when its texts are encoded:
an interrupted pass goes on with the next one. Two commands at once may write the same part, and the later one's stays:
what is lost is encoded again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from litune.files import atomic
from litune.progress import say, track
from litune.store.captions import hash_texts
from litune.store.selection import Selection

FOLDER = "text_emb"
PART = 32_768
"""Texts of a part: what an interruption can cost."""
BLOCK = 8192
"""Captions that are looked at together."""

Encode = Callable[[list[str]], Float[np.ndarray, "n W"]]


class TextVectors:
    """The vectors of texts from one text tower, in a folder of a store, or in memory where it can't be written to."""

    def __init__(self, store: Path, fingerprint: str) -> None:
        """A part that is damaged is said, and its texts are encoded again."""
        self.folder = store / FOLDER / fingerprint
        self.hashes: Int[np.ndarray, " U"] = np.zeros(0, np.int64)
        self._parts: list[np.ndarray] = []
        self._writable = True
        while self._open(self.folder / f"part-{len(self._parts)}.npy"):
            pass
        self._sort()

    def _open(self, file: Path) -> bool:
        if not file.exists():
            return False
        try:
            rows = np.load(file, mmap_mode="r")
            hashes, vectors = np.array(rows["hash"]), rows["vector"]
        except (OSError, ValueError, EOFError, IndexError) as why:
            say(f"{file} is damaged ({why}): its texts are encoded again")
            return False
        self.hashes = np.concatenate([self.hashes, hashes])
        self._parts.append(vectors)
        return True

    def _sort(self) -> None:
        self._order = np.argsort(self.hashes, kind="stable")
        self._starts = np.cumsum([0, *map(len, self._parts)])

    def rows(self, hashes: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Where the texts of these hashes are; −1: not here."""
        if not len(self.hashes):
            return np.full(len(hashes), -1)
        place = np.searchsorted(self.hashes, hashes, sorter=self._order).clip(max=len(self.hashes) - 1)
        rows = self._order[place]
        return np.where(self.hashes[rows] == hashes, rows, -1)

    def take(self, texts: pa.Array) -> Float[np.ndarray, "n W"]:
        """The float32 vectors of these texts, all of which are here."""
        rows = self.rows(hash_texts(texts))
        part = np.searchsorted(self._starts, rows, side="right") - 1
        vectors = np.empty((len(rows), self._parts[0].shape[1]), np.float32)
        for number in np.unique(part):
            own = part == number
            vectors[own] = self._parts[number][rows[own] - self._starts[number]]
        return vectors

    def add(self, hashes: Int[np.ndarray, " n"], vectors: Float[np.ndarray, "n W"]) -> None:
        """Keep the vectors of further texts."""
        if self._writable:
            rows = np.empty(len(hashes), [("hash", np.int64), ("vector", np.float32, vectors.shape[1:])])
            rows["hash"], rows["vector"] = hashes, vectors
            try:
                file = self.folder / f"part-{len(self._parts)}.npy"
                with atomic(file) as temporary, open(temporary, "wb") as out:
                    np.save(out, rows)
                written = np.load(file, mmap_mode="r")
                if np.array_equal(written["hash"], hashes):  # else another command has written there since
                    vectors = written["vector"]
            except OSError as why:
                say(f"{self.folder} can't be written ({why.strerror or why}): texts are encoded for this run alone")
                self._writable = False
        self.hashes = np.concatenate([self.hashes, hashes])
        self._parts.append(vectors)
        self._sort()

    def encode(self, pairs: Selection, encode: Encode) -> None:
        """Encode those captions of the pairs that are not here yet, each distinct one once."""
        waiting: dict[int, str] = {}
        missing = self._count_missing(pairs)
        if not missing:
            return
        with track("encoding captions, once", "texts", missing) as task:

            def flush() -> None:
                texts = list(waiting.values())
                self.add(np.fromiter(waiting, np.int64, len(waiting)), encode(texts))
                task.advance(len(texts))
                waiting.clear()

            for texts, hashes in _blocks(pairs):
                new = np.flatnonzero(self.rows(hashes) < 0)
                for number, text in zip(hashes[new].tolist(), texts.take(pa.array(new)).to_pylist(), strict=True):
                    waiting.setdefault(number, text)
                    if len(waiting) >= PART:
                        flush()
            if waiting:
                flush()

    def _count_missing(self, pairs: Selection) -> int:
        missing = [hashes[self.rows(hashes) < 0] for _, hashes in _blocks(pairs)]
        return len(np.unique(np.concatenate(missing))) if missing else 0


def _blocks(pairs: Selection) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """The captions of the pairs with their hashes, few at a time."""
    count = int(pairs.offsets[-1])
    for start in range(0, count, BLOCK):
        texts = pairs.take_captions(np.arange(start, min(start + BLOCK, count)))
        yield texts, hash_texts(texts)
