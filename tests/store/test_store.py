from __future__ import annotations

import errno
import json
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tests.conftest import random_store

from litune.errors import DataError, StoreError
from litune.pairs.pairs import Damage
from litune.store.store import FeatureStore, StoreWriter


def rows(names: list[str]) -> pa.Table:
    return pa.table({"key": names, "image_path": names, "captions": [[f"a {n}"] for n in names]})


def manifest(images: int) -> dict[str, object]:
    return {"tower": None, "images": images, "dtype": "float16", "pairs": None}


def test_rows_across_shards(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
    writer = StoreWriter(tmp_path, manifest(10))
    for start, end in ((0, 3), (3, 4), (4, 10)):
        writer.write_shard(np.asfortranarray(values[start:end]), rows([str(i) for i in range(start, end)]), [], end)
    store = writer.finish()
    assert (len(store), store.width) == (10, 4)
    order = np.array([9, 0, 3, 2, 4, 9])
    assert np.array_equal(store.features(order), values.astype(np.float16)[order].astype(np.float32))
    assert np.array_equal(store.features(slice(2, 5)), values.astype(np.float16)[2:5].astype(np.float32))
    assert np.array_equal(np.concatenate(list(store.blocks(order, 4))), store.features(order))
    assert store.metadata["key"].to_pylist() == [str(i) for i in range(10)]
    assert (tmp_path / "img_emb" / "img_emb_0002.npy").is_file()
    assert (tmp_path / "metadata" / "metadata_0002.parquet").is_file()
    assert np.load(tmp_path / "img_emb" / "img_emb_0000.npy").dtype == np.float16


def test_memory_mapped(tmp_path: Path) -> None:
    store = random_store(tmp_path, 5, 3)
    assert all(isinstance(part, np.memmap) for part in store._parts)


def clip_retrieval_folder(folder: Path) -> np.ndarray:
    """What clip-retrieval writes: unpadded numbers, image_path and caption, no store.json."""
    values = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float16)
    (folder / "img_emb").mkdir(parents=True)
    (folder / "metadata").mkdir()
    for part, (start, end) in enumerate([(0, 4), (4, 7)]):
        np.save(folder / "img_emb" / f"img_emb_{part}.npy", values[start:end])
        table = pa.table(
            {
                "image_path": [f"/data/{i}.jpg" for i in range(start, end)],
                "caption": [f"picture {i}" if i != 2 else None for i in range(start, end)],
                "url": ["https://example.org"] * (end - start),
            }
        )
        pa.parquet.write_table(table, folder / "metadata" / f"metadata_{part}.parquet")
    return values


def test_clip_retrievals_folder(tmp_path: Path) -> None:
    values = clip_retrieval_folder(tmp_path)
    store = FeatureStore(tmp_path)
    assert store.tower is None
    assert np.array_equal(store.features(slice(None)), values.astype(np.float32))
    pairs = store.select()
    assert len(pairs) == 6, "an image without a caption is no pair"
    assert pairs.captions[2] == "picture 3"
    assert pairs.keys[2] == "/data/3.jpg"


def test_selection(tmp_path: Path) -> None:
    store = random_store(tmp_path, 6, 3, captions=2)
    pairs = store.select()
    assert pairs.owner.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    some = pairs.subset(np.array([4, 1]))
    assert some.captions == ["picture 4 number 0", "picture 4 number 1", "picture 1 number 0", "picture 1 number 1"]
    assert some.rows.tolist() == [4, 1]
    assert np.array_equal(some.features(), store.features([4, 1]))
    assert np.array_equal(some.features(np.array([1])), store.features([1]))


def test_split_and_lang(store: FeatureStore) -> None:
    val = store.select("val", ["de"])
    assert len(val) == 6
    assert val.captions == [c for c in val.captions if " in " in c]
    with pytest.raises(StoreError, match=r"no split 'vla' \(perhaps you meant 'val'\)"):
        store.select("vla")
    with pytest.raises(StoreError, match="no captions in 'fr'"):
        store.select(lang=["fr"])


def test_incomplete_and_damaged(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no feature store"):
        FeatureStore(tmp_path / "nothing")
    with pytest.raises(StoreError, match="it is not a feature store"):
        FeatureStore(tmp_path)
    writer = StoreWriter(tmp_path / "s", manifest(10))
    writer.write_shard(np.zeros((4, 2), np.float32), rows(list("abcd")), [], 4)
    with pytest.raises(StoreError, match=r"incomplete \(4 of 10 images\): run the same litune embed again"):
        FeatureStore(tmp_path / "s")
    writer.write_shard(np.zeros((6, 2), np.float32), rows(list("efghij")), [], 10)
    writer.finish()
    first = tmp_path / "s" / "img_emb" / "img_emb_0000.npy"
    whole = first.read_bytes()
    first.write_bytes(whole[:-3])
    with pytest.raises(StoreError, match="is damaged"):
        FeatureStore(tmp_path / "s")
    first.unlink()
    with pytest.raises(StoreError, match="not the same of metadata"):
        FeatureStore(tmp_path / "s")


def test_other_format(tmp_path: Path) -> None:
    random_store(tmp_path, 3, 2)
    facts = json.loads((tmp_path / "store.json").read_text())
    (tmp_path / "store.json").write_text(json.dumps(facts | {"format": 99}))
    with pytest.raises(StoreError, match="store format 99, this litune reads 1"):
        FeatureStore(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(StoreError, match="not valid JSON"):
        FeatureStore(tmp_path)


def test_features_that_do_not_fit_float16(tmp_path: Path) -> None:
    writer = StoreWriter(tmp_path, manifest(2))
    with (
        np.errstate(over="ignore"),
        pytest.raises(DataError, match=r"the features of b do not fit float16 .* --store-dtype float32"),
    ):
        writer.write_shard(np.array([[1.0], [1e6]], np.float32), rows(["a", "b"]), [], 2)
    assert not (tmp_path / "img_emb").exists()


def test_pickles_are_refused(tmp_path: Path) -> None:
    random_store(tmp_path, 3, 2)
    np.save(tmp_path / "img_emb" / "img_emb_0000.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(StoreError, match="is damaged"):
        FeatureStore(tmp_path)


def test_parts_are_joined_after_any_interruption(tmp_path: Path) -> None:
    """A join that stopped between any two of its renames is finished by doing it again."""
    begun = {"images": 6, "dtype": "float32", "tower": None, "pairs": None}
    parts = [tmp_path / "a", tmp_path / "b", tmp_path / "empty"]
    for first, part in ((0, parts[0]), (3, parts[1])):
        writer = StoreWriter(part, begun)
        for row in range(first, first + 3):
            damaged = [Damage(f"{row}.png", "torn")] if row == 1 else []
            table = pa.table({"key": [f"{row}"], "captions": [["x"]]})
            writer.write_shard(np.full((1, 2), row, np.float32), table, damaged, row - first + 1)
    StoreWriter(parts[2], begun)
    for stop_at in range(12):
        copy = tmp_path / f"{stop_at}"
        for part in parts:
            shutil.copytree(part, copy / part.name)
        rename, left = Path.replace, iter(range(stop_at))

        def stopping(self: Path, target: Path, rename: Any = rename, left: Any = left) -> Path:
            if "img_emb_" in target.name or "metadata_" in target.name:
                next(left)
            return rename(self, target)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(StopIteration):
            patch.setattr(Path, "replace", stopping)
            StoreWriter(copy / "s", begun).join([copy / part.name for part in parts])
        writer = StoreWriter(copy / "s", begun)
        writer.join([copy / part.name for part in parts])
        store = writer.finish()
        assert store.features(slice(None))[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
        assert store.metadata["key"].to_pylist() == list("012345")
        assert (store.manifest["seen"], store.manifest["shards"], store.manifest["damaged"]) == (6, 6, 1)
        assert (store.path / "damaged.jsonl").read_text().count("torn") == 1


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path) -> None:
    """What NumPy's own writing of arrays raises there has no errno, and can't be told from a defect."""
    writer = StoreWriter(tmp_path, manifest(100))
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        with pytest.raises(OSError, match="too large") as why:
            writer.write_shard(np.ones((100, 64)), rows([str(i) for i in range(100)]), [], 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert why.value.errno == errno.EFBIG
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize("row", [-1, 6, 10**9])
def test_rows_that_there_are_none_of(tmp_path: Path, row: int) -> None:
    store = random_store(tmp_path, 6, 3, captions=2)
    for rows in ([row], [0, row, 1], np.array([5, row])):
        with pytest.raises(IndexError, match=rf"{row} is out of range: there are 6 rows, from 0"):
            store.features(rows)
    some = store.select().subset(np.array([4, 1]))
    wrong = np.array([row])
    for function in (some.features, some.subset):
        with pytest.raises(IndexError, match=rf"{row} is out of range: there are 2 images"):
            function(wrong)
    with pytest.raises(IndexError, match=rf"{row} is out of range: there are 4 captions"):
        some.take_captions(wrong)
    assert store.features([]).shape == (0, 3)
