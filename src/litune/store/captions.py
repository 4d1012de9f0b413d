"""Many captions in little memory: one Arrow array, their hashes, and their tokens, at once or as they are needed."""

from __future__ import annotations

import io
import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from litune.files import cache_folder
from litune.progress import say
from litune.text.tokenizers import Tokenizer, Tokens

BLOCK = 16384
"""Texts that are made Python strings at once."""
IN_MEMORY = 2**26
"""The most bytes of text that are held in memory: of more, the system keeps what is in use (a file, memory-mapped)."""
TOKENIZED_MOST = 2**20
"""The most captions that are tokenised before the first step: beyond, each batch is, ahead of its step."""


@dataclass(frozen=True)
class Captions:
    """C captions of N images: those of image i are `texts[offsets[i] : offsets[i + 1]]`."""

    offsets: np.ndarray
    texts: pa.Array
    labels: Callable[[str], pa.DictionaryArray | None]
    """A label of each caption, [C]: `langs` its language, `fields` its text field; None where they have none."""


class TextJoin:
    """Texts, put together chunk by chunk into one array of large strings.

    One array, since Arrow takes rows out of many chunks by first joining them all. Where it is large (`size` is about
    how many bytes there will be), offsets and letters are in files without a name, memory-mapped: the system drops
    from memory what is not in use.
    """

    def __init__(self, size: int) -> None:
        self._letters, self._offsets = _Bytes(size), _Bytes(size)
        self._count = self._end = 0
        self._offsets.write(np.zeros(1, np.int64))

    def add(self, chunk: pa.Array) -> None:
        """Take up more texts; null becomes empty."""
        texts = chunk.cast(pa.large_string()).fill_null("")
        if not len(texts):
            return
        _, places, values = texts.buffers()
        starts = np.frombuffer(places, np.int64, len(texts) + 1, 8 * texts.offset)
        if values is not None:
            self._letters.write(memoryview(values)[starts[0] : starts[-1]])
        self._offsets.write(starts[1:] + (self._end - starts[0]))
        self._count, self._end = self._count + len(texts), self._end + int(starts[-1] - starts[0])

    def array(self) -> pa.Array:
        """All texts [N]."""
        return pa.LargeStringArray.from_buffers(self._count, self._offsets.buffer(), self._letters.buffer())


def join_texts(chunks: Iterable[pa.Array], size: int) -> pa.Array:
    """All texts of the chunks as one array of large strings [N], of about `size` bytes (see `TextJoin`)."""
    joined = TextJoin(size)
    for chunk in chunks:
        joined.add(chunk)
    return joined.array()


class _Bytes:
    """Bytes that are written one part after the other, in memory or, where there will be many, in a file."""

    def __init__(self, size: int) -> None:
        small = size <= IN_MEMORY
        self.file: Any = io.BytesIO() if small else tempfile.TemporaryFile(dir=cache_folder())  # noqa: SIM115

    def write(self, part: Any) -> None:
        self.file.write(part)

    def buffer(self) -> pa.Buffer:
        if isinstance(self.file, io.BytesIO):
            return pa.py_buffer(self.file.getvalue())
        with self.file:  # the mapping outlives it
            self.file.flush()
            size = self.file.tell()  # nothing can't be mapped
            return pa.py_buffer(mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_READ) if size else b"")


def integers(count: int) -> type[np.signedinteger[Any]]:
    """The smaller kind of whole numbers that holds `count`."""
    return np.int32 if count < 2**31 else np.int64


def offsets_of(counts: np.ndarray) -> np.ndarray:
    """Where each of N lists begins, and the end, [N + 1]."""
    total = int(counts.sum())
    found = np.zeros(len(counts) + 1, integers(total))
    np.cumsum(counts, out=found[1:])
    return found


class Source(Protocol):
    """Texts by number."""

    def take_captions(self, numbers: np.ndarray) -> pa.Array:
        """The texts with these numbers, in this order."""


def blocks(captions: Source, count: int) -> Iterator[list[str]]:
    """`count` texts as Python strings, a block of them at a time."""
    for start in range(0, count, BLOCK):
        yield captions.take_captions(np.arange(start, min(start + BLOCK, count))).to_pylist()


class LaterTokens:
    """Captions that are tokenised when they are asked for."""

    def __init__(self, tokenizer: Tokenizer, captions: Source) -> None:
        self.tokenizer, self.captions = tokenizer, captions

    def take(self, texts: np.ndarray) -> Tokens:
        """The tokens of the captions with these numbers, in this order."""
        return self.tokenizer(self.captions.take_captions(texts).to_pylist())


def tokenize(tokenizer: Tokenizer, captions: Source, count: int) -> Tokens:
    """The tokens of all `count` captions; a block of them at a time is in the making."""
    if count > BLOCK:
        say(f"tokenising {count:,} captions")
    parts = [(found.ids.astype(np.int32), found.lengths) for found in map(tokenizer, blocks(captions, count))]
    ids, lengths = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return Tokens(ids, lengths)


def hash_texts(texts: pa.Array) -> np.ndarray:
    """Numbers [N] from 0 to 2⁶³ − 1 that are equal for equal texts; for two that differ, with a chance of 2⁻⁵⁴ or less.

    Multilinear hashing: the sum of all bytes (+ 1), each times its place's own random 64-bit number, and the length's,
    without the last bit (Lemire and Kaser, arXiv 1202.4961). Vectorised, and the same in every process.
    """
    texts = texts.cast(pa.large_string()) if texts.type != pa.large_string() else texts
    if not len(texts):
        return np.zeros(0, np.int64)
    _, places, values = texts.buffers()
    starts = np.frombuffer(places, np.int64, len(texts) + 1, 8 * texts.offset)
    lengths = np.diff(starts)
    letters = np.frombuffer(values, np.uint8)[starts[0] : starts[-1]] if values is not None else np.zeros(0, np.uint8)
    begins = starts[:-1] - starts[0]
    multipliers = np.random.default_rng(0).integers(2**64, size=int(lengths.max()) + 1, dtype=np.uint64)
    within = np.arange(len(letters)) - np.repeat(begins, lengths)
    terms = (letters.astype(np.uint64) + np.uint64(1)) * multipliers[within + 1]
    found = lengths.astype(np.uint64) * multipliers[0]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms)])  # modulo 2⁶⁴, and so are their differences
    found += sums[begins + lengths] - sums[begins]
    halved: np.ndarray = found >> np.uint64(1)
    return halved.astype(np.int64)


def hash_digests(digests: pa.Array) -> np.ndarray:
    """Numbers [N] as those of `hash_texts`, of texts that are hashes already (64 hex digits of SHA-256).

    Their first 16 digits are random enough, and read as two words: a hundred times as fast.
    """
    heads = pc.binary_slice(digests.cast(pa.large_binary()), 0, 16)
    if not pc.all(pc.equal(pc.binary_length(heads), 16)).as_py():
        return hash_texts(digests)
    words = np.frombuffer(heads.buffers()[2], np.uint64, 2 * len(heads)).reshape(-1, 2)
    mixed: np.ndarray = (words[:, 0] * np.uint64(0x9E3779B97F4A7C15) + words[:, 1]) >> np.uint64(1)
    return mixed.astype(np.int64)


def first_of_equal(numbers: np.ndarray) -> np.ndarray | None:
    """For each of N numbers the place of the first that is equal; None where no two are."""
    ordered = np.sort(numbers)
    if (ordered[1:] != ordered[:-1]).all():
        return None
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    new = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    found = np.empty(len(numbers), np.int64)
    found[order] = order[new][np.cumsum(new) - 1]
    return found
