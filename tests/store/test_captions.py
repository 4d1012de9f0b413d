from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from litune.store.captions import LaterTokens, first_of_equal, hash_digests, hash_texts, join_texts, tokenize
from litune.text.tokenizers import Tokenizer

TEXTS = ["a dog", "", "zwei Hunde", "狗", "a dog", "a  dog", "dog a", "\x00", "ab", "ba"] * 7


class Source:
    """Texts in memory."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = pa.array(texts, pa.large_string())

    def take_captions(self, numbers: np.ndarray) -> pa.Array:
        return self.texts.take(pa.array(numbers))


@pytest.mark.parametrize("in_memory", [10**6, 0])
def test_texts_in_one_array(in_memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory or in a file, out of chunks of either kind, of parts of chunks, with nulls, or out of none."""
    monkeypatch.setattr("litune.store.captions.IN_MEMORY", in_memory)
    chunks = [
        pa.array(["x", *TEXTS[:4], "y"]).slice(1, 4),
        pa.array([], pa.string()),
        pa.array(TEXTS[4:7], pa.large_string()),
        pa.array([None, "ende"], pa.string()),
    ]
    found = join_texts(iter(chunks), 1000)
    found.validate(full=True)
    assert found.to_pylist() == [*TEXTS[:7], "", "ende"]
    assert found.take(pa.array([8, 0, 3])).to_pylist() == ["ende", "a dog", "狗"]
    assert join_texts([], 1000).to_pylist() == []
    assert join_texts([pa.array([""])], 1000).to_pylist() == [""]


def test_hashes_are_equal_where_texts_are() -> None:
    random = np.random.default_rng(0)
    words = [bytes(random.integers(97, 100, random.integers(0, 9)).astype(np.uint8)).decode() for _ in range(20_000)]
    for texts in (pa.array(words), pa.array(words, pa.large_string()), pa.array(["x", *words]).slice(1)):
        found = hash_texts(texts)
        assert found.min() >= 0
        of_words = dict(zip(words, found.tolist(), strict=True))
        assert [of_words[word] for word in words] == found.tolist()
        assert len(set(of_words.values())) == len(of_words)
    assert hash_texts(pa.array([], pa.string())).tolist() == []


def test_a_hash_is_the_formula() -> None:
    """The sum, modulo 2⁶⁴, of (byte + 1) times its place's number, and of the length times its own."""
    text = "a dög"
    numbers = [int(n) for n in np.random.default_rng(0).integers(2**64, size=7, dtype=np.uint64)]
    letters = text.encode()
    total = len(letters) * numbers[0] + sum((byte + 1) * n for byte, n in zip(letters, numbers[1:], strict=True))
    assert hash_texts(pa.array(["other", text])).tolist()[1] == total % 2**64 >> 1


def test_first_of_equal() -> None:
    assert first_of_equal(np.array([5, 3, 9])) is None
    found = first_of_equal(np.array([5, 3, 5, 9, 3, 5]))
    assert found is not None
    assert found.tolist() == [0, 1, 0, 3, 1, 0]


def test_tokens_at_once_and_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks or as they are asked for, the tokens are those of all texts at once."""
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "a": 2, "dog": 3, "ab": 4}
    backend = Backend(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer, source = Tokenizer(backend, "bert", 3), Source(TEXTS)
    expected = tokenizer(TEXTS)
    monkeypatch.setattr("litune.store.captions.BLOCK", 8)
    at_once, later = tokenize(tokenizer, source, len(TEXTS)), LaterTokens(tokenizer, source)
    asked = np.array([8, 0, 0, 69, 3])
    for found in (at_once.take(asked), later.take(asked)):
        assert np.array_equal(found.ids, expected.take(asked).ids)
        assert np.array_equal(found.lengths, expected.take(asked).lengths)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_hashes_of_files(kind: pa.DataType) -> None:
    """Equal where digests are; what is no digest is hashed as any text."""
    hashes = [hashlib.sha256(b"%d" % (i // 2)).hexdigest() for i in range(20_000)]
    numbers = hash_digests(pa.array(["x", *hashes], kind).slice(1))
    assert numbers.min() >= 0
    found = first_of_equal(numbers)
    assert found is not None
    assert np.array_equal(found, np.arange(20_000) // 2 * 2)
    short = pa.array(["a", "b", "a"], kind)
    assert np.array_equal(hash_digests(short), hash_texts(short))
