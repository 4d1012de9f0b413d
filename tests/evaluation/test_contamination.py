from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tests.conftest import random_store

from litune.errors import DataError, StoreError
from litune.evaluation import contamination
from litune.store.store import FeatureStore, StoreWriter


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """Sixty images in three files, all features positive, as after a ReLU; files 50 to 59 are those of 0 to 9."""
    values = np.abs(np.random.default_rng(0).normal(size=(60, 16))).astype(np.float32)
    writer = StoreWriter(
        tmp_path_factory.mktemp("tuned") / "store", {"tower": None, "images": 60, "dtype": "float32", "pairs": None}
    )
    for start in (0, 20, 40):
        rows = range(start, start + 20)
        table = pa.table(
            {
                "key": [f"t{i}" for i in rows],
                "captions": [["a"]] * 20,
                "sha256": [f"hash{i % 50}" for i in rows],
            }
        )
        writer.write_shard(values[start : start + 20], table, [], start + 20)
    return writer.finish()


@pytest.mark.parametrize("block", [7, 4096])
def test_finds_copies(tuned: FeatureStore, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "BLOCK", block)
    there = tuned.features(slice(None))
    center, random = there.mean(0), np.random.default_rng(1)
    fresh = np.abs(random.normal(size=(3, 16))).astype(np.float32)
    near = there[33] + 0.02 * random.normal(size=16).astype(np.float32)
    features = np.stack([there[5], fresh[0], near, fresh[1], fresh[2]])
    found = contamination.overlap(
        tuned, ["hash5", "", "other", "hash44", "unseen"], features, keys=list("abcde"), threshold=0.95
    )
    assert found["exact"] == [{"image": "a", "tuned": "t5"}, {"image": "d", "tuned": "t44"}]
    mapped, own = near - center, there[33] - center
    cosine = mapped @ own / np.linalg.norm(mapped) / np.linalg.norm(own)
    assert found["near"] == [{"image": "c", "tuned": "t33", "cosine": pytest.approx(cosine, abs=1e-4)}]
    assert found["warning"].startswith("3 of 5 evaluation images may have been tuned on (2 have the same bytes, 1 more")
    assert found["hashes_compared"] == 4


def test_only_the_rows_that_were_tuned_on(tuned: FeatureStore) -> None:
    """The evaluation's own images may be in the same store."""
    rows = np.arange(10, 60)
    own = tuned.features(np.arange(10))
    found = contamination.overlap(tuned, [f"hash{i + 20}" for i in range(10)], None, rows=rows)
    assert [one["tuned"] for one in found["exact"]] == [f"t{i + 20}" for i in range(10)]
    found = contamination.overlap(tuned, ["new"] * 10, own, rows=rows[:40])
    assert (found["exact"], found["near"], found["warning"]) == ([], [], "")
    assert found["tuned_images"] == 40


def test_every_positive_cosine_is_no_copy(tuned: FeatureStore) -> None:
    """Raw features that are all positive have high cosines: the mean is taken off first."""
    fresh = 10 + np.abs(np.random.default_rng(5).normal(size=(30, 16))).astype(np.float32)
    there = tuned.features(slice(None)) + 10
    raw = (fresh @ there.T) / np.linalg.norm(fresh, axis=1)[:, None] / np.linalg.norm(there, axis=1)
    assert raw.min() > 0.97
    assert not contamination.overlap(tuned, [""] * 30, fresh - 10)["near"]


def test_a_store_without_hashes(tmp_path: Path) -> None:
    store = random_store(tmp_path / "plain", 30, 8)
    found = contamination.overlap(store, ["abc"], store.features([4]))
    assert found["hashes_compared"] == 0
    assert found["near"][0]["tuned"] == "4.png"


def test_refuses(tuned: FeatureStore) -> None:
    with pytest.raises(StoreError, match="width 16, the evaluation of 3: near"):
        contamination.overlap(tuned, ["a"], np.zeros((1, 3)))
    with pytest.raises(DataError, match="one hash"):
        contamination.overlap(tuned, ["a"], np.zeros((2, 16)))
