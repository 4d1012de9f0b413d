from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tests.conftest import random_store

from litune.store import text_vectors
from litune.store.text_vectors import TextVectors


def vector_of(text: str) -> list[float]:
    return [len(text), sum(map(ord, text)), text.count("1")]


def encode(texts: list[str]) -> np.ndarray:
    return np.array([vector_of(text) for text in texts], np.float32)


def test_each_text_is_encoded_once_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_vectors, "PART", 7)
    pairs = random_store(tmp_path / "store", 10, 4, captions=3).select()
    seen: list[str] = []
    vectors = TextVectors(pairs.store.path, "tower")
    vectors.encode(pairs, lambda texts: (seen.extend(texts), encode(texts))[1])
    assert sorted(seen) == sorted(set(pairs.captions))
    assert np.array_equal(vectors.take(pairs.caption_array), encode(pairs.captions))
    again = TextVectors(pairs.store.path, "tower")
    again.encode(pairs, lambda texts: pytest.fail("encoded again"))
    assert np.array_equal(again.take(pa.array(pairs.captions[::-2])), encode(pairs.captions[::-2]))
    assert len(TextVectors(pairs.store.path, "another").hashes) == 0


def test_an_interrupted_pass_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_vectors, "PART", 7)
    pairs = random_store(tmp_path / "store", 10, 4, captions=3).select()
    calls = []

    def interrupted(texts: list[str]) -> np.ndarray:
        calls.append(len(texts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(texts)

    with pytest.raises(KeyboardInterrupt):
        TextVectors(pairs.store.path, "tower").encode(pairs, interrupted)
    vectors = TextVectors(pairs.store.path, "tower")
    assert len(vectors.hashes) == 14
    vectors.encode(pairs, encode)
    assert np.array_equal(vectors.take(pairs.caption_array), encode(pairs.captions))


def test_a_damaged_part_is_named_and_encoded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(text_vectors, "PART", 7)
    pairs = random_store(tmp_path / "store", 10, 4, captions=3).select()
    vectors = TextVectors(pairs.store.path, "tower")
    vectors.encode(pairs, encode)
    (vectors.folder / "part-1.npy").write_bytes(b"x")
    again = TextVectors(pairs.store.path, "tower")
    assert "part-1.npy is damaged" in capsys.readouterr().err
    assert len(again.hashes) == 7
    again.encode(pairs, encode)
    whole = TextVectors(pairs.store.path, "tower")
    whole.encode(pairs, lambda texts: pytest.fail("encoded again"))
    assert np.array_equal(whole.take(pairs.caption_array), encode(pairs.captions))


def test_a_store_that_cannot_be_written_to_is_read_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = random_store(tmp_path / "store", 3, 4).select()
    (pairs.store.path / "text_emb").write_text("in the way")
    vectors = TextVectors(pairs.store.path, "tower")
    vectors.encode(pairs, encode)
    assert np.array_equal(vectors.take(pairs.caption_array), encode(pairs.captions))
    assert "texts are encoded for this run alone" in capsys.readouterr().err


def test_two_commands_at_once_never_mix_their_texts(tmp_path: Path) -> None:
    """Both begin without the other's texts: each has its own vectors, and a third finds right ones or none."""
    pairs = random_store(tmp_path / "store", 12, 4).select()
    halves = [pairs.subset(np.arange(6)), pairs.subset(np.arange(6, 12))]
    both = [TextVectors(pairs.store.path, "tower") for _ in halves]
    for vectors, half in zip(both, halves, strict=True):
        vectors.encode(half, encode)
    for vectors, half in zip(both, halves, strict=True):
        assert np.array_equal(vectors.take(half.caption_array), encode(half.captions))
    third = TextVectors(pairs.store.path, "tower")
    third.encode(pairs, encode)
    assert np.array_equal(third.take(pairs.caption_array), encode(pairs.captions))
