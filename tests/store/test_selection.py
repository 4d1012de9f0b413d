"""Selections of several stores as one, and what a large store costs."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from tests.conftest import random_store

from litune.config import TuneConfig
from litune.errors import StoreError
from litune.store.selection import Mixture, Selection, choose_pairs, source_names
from litune.store.store import FeatureStore
from litune.tuning.batching import make_batches


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    """30 images with two captions each, then 20 with one, of which the tenth to the last."""
    first = random_store(tmp_path / "first", 30, 4, captions=2).select()
    second = random_store(tmp_path / "second", 20, 4).select()
    return Mixture([first, second.subset(np.arange(10, 20))])


def test_it_is_one_after_the_other(mixture: Mixture) -> None:
    one, two = mixture.sources
    assert len(mixture) == 40
    assert mixture.keys == one.keys + two.keys
    assert mixture.image_files == one.image_files + two.image_files
    assert mixture.captions == one.captions + two.captions
    assert mixture.counts.tolist() == [2] * 30 + [1] * 10
    assert mixture.caption_array.to_pylist() == mixture.captions == list(mixture.iterate_captions())
    asked = np.array([69, 0, 61, 59, 60, 0])
    assert mixture.take_captions(asked).to_pylist() == [mixture.captions[i] for i in asked]
    assert len(mixture.take_captions(np.zeros(0, np.int64))) == 0
    everything = np.concatenate([one.features(), two.features()])
    assert np.array_equal(mixture.features(), everything)
    places = np.array([35, 2, 39, 30, 29, 2])
    assert np.array_equal(mixture.features(places), everything[places])
    assert np.array_equal(np.concatenate(list(mixture.blocks())), everything)
    part = mixture.subset(np.array([3, 28, 31, 39]))
    assert part.keys == [mixture.keys[i] for i in (3, 28, 31, 39)]
    assert part.owner.tolist() == [0, 0, 1, 1, 2, 3]
    assert mixture.image_hashes() is None


def test_names(tmp_path: Path) -> None:
    stores = [random_store(tmp_path / folder / name, 3, 2) for folder, name in (("a", "x"), ("a", "y"), ("b", "x"))]
    assert source_names(stores[:2]) == ["x", "y"]
    assert source_names(stores) == [str(store.path) for store in stores]


def test_reading_ahead(mixture: Mixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is asked for as rows of its store; one that is of two stores, of both."""
    asked: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        FeatureStore, "read_ahead", lambda self, first, last: asked.append((self.path.name, first, last))
    )
    mixture.read_ahead([range(5, 10), range(28, 33), range(36, 40)])
    assert sorted(asked) == [("first", 5, 10), ("first", 28, 30), ("second", 10, 13), ("second", 16, 20)]


def test_asking_the_system_to_read_changes_nothing(tmp_path: Path) -> None:
    """Whatever rows are named, of one file or several, the features are those that they were."""
    store = random_store(tmp_path / "s", 5000, 3)
    (tmp_path / "s" / "store.json").unlink()
    for folder, kind in (("img_emb", "npy"), ("metadata", "parquet")):
        file = tmp_path / "s" / folder / f"{folder}_0000.{kind}"
        file.with_name(f"{folder}_0001.{kind}").write_bytes(file.read_bytes())
    several = FeatureStore(tmp_path / "s")
    for first, last in ((0, 1), (4999, 5001), (10, 9000), (9999, 10000)):
        several.read_ahead(first, last)
    several.touch(np.array([9999, 0, 4999, 5000, 0]))
    assert np.array_equal(several.features(slice(None)), np.tile(store.features(slice(None)), (2, 1)))


def test_memory_per_image(tmp_path: Path, tiny_bert: Path) -> None:
    """Splitting off what is held out and ordering an epoch takes numbers, not objects: some dozen bytes an image."""

    def peak(rows: int) -> int:
        store = random_store(tmp_path / str(rows), rows, 2)
        config = TuneConfig(store=store.path, text_tower=f"hf:{tiny_bert}", out=tmp_path / "run")
        opened = FeatureStore(store.path)
        tracemalloc.start()
        train, val = choose_pairs(opened, config)
        assert val is not None
        batch = next(iter(make_batches(train, config, 64).from_step(0, 1)))
        train.take_captions(batch.captions[0])
        train.features(batch.images)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(100)  # what is imported and kept at the first time
    few, many = peak(30_000), peak(60_000)
    assert (many - few) / 30_000 < 100


def test_texts_are_shared_by_all_selections(tmp_path: Path) -> None:
    """A selection of some images copies no text."""
    pairs = random_store(tmp_path, 100, 2, captions=3).select()
    part: Any = pairs.subset(np.arange(50)).subset(np.array([7, 3]))
    assert part._captions.texts.buffers()[2].address == pairs.caption_array.buffers()[2].address
    assert part.captions == pairs.captions[21:24] + pairs.captions[9:12]


def test_a_selection_of_captions(tmp_path: Path) -> None:
    """Languages are chosen caption by caption, null ones never; images without any drop out."""
    from litune.store.store import StoreWriter

    writer = StoreWriter(tmp_path, {"tower": None, "images": 4, "dtype": "float32", "pairs": None})
    table = pa.table(
        {
            "key": list("abcd"),
            "captions": [["a0", "a1"], [], ["c0"], ["d0", "d1", "d2"]],
            "langs": [["en", "de"], [], ["de"], ["en", None, "en"]],
        }
    )
    writer.write_shard(np.zeros((4, 2), np.float32), table, [], 4)
    store = writer.finish()
    english = store.select(lang=["en"])
    assert (english.keys, english.captions) == (["a", "d"], ["a0", "d0", "d2"])
    assert english.owner.tolist() == [0, 1, 1]
    assert store.select().keys == ["a", "c", "d"]
    assert isinstance(english, Selection)


@pytest.mark.parametrize("number", [-1, 100])
def test_images_that_there_are_none_of(tmp_path: Path, number: int) -> None:
    stores = [random_store(tmp_path / name, 5, 3) for name in "ab"]
    both = Mixture([store.select() for store in stores])
    for function, what in ((both.features, "images"), (both.subset, "images"), (both.take_captions, "captions")):
        with pytest.raises(IndexError, match=rf"{number} is out of range: there are 10 {what}"):
            function(np.array([2, number]))


def test_other_names_of_splits(tmp_path: Path) -> None:
    """--val-split val is the split validation where there is no val; a store keeps its own names."""
    store = random_store(tmp_path / "s", 6, 4)
    for file in (store.path / "metadata").glob("*.parquet"):
        table = pa.parquet.read_table(file)
        splits = ["training"] * 3 + ["Validation"] * (len(table) - 3)
        pa.parquet.write_table(table.append_column("split", pa.array(splits)), file)
    store = FeatureStore(store.path)
    assert store.splits == ["Validation", "training"]
    assert (len(store.select("train")), len(store.select("val")), len(store.select("dev"))) == (3, 3, 3)
    with pytest.raises(StoreError, match="no split 'test'"):
        store.select("test")
