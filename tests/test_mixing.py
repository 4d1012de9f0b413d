"""Tuning on several stores, and on texts from files of their own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import interrupt
from tests.test_tuning import bytes_of, log_of

from litune import distributed
from litune.config import TuneConfig
from litune.errors import ConfigError, DataError, RunError, StoreError
from litune.model.build import make_model, make_tokenizer, text_spec
from litune.store.selection import choose_mixture
from litune.store.store import FeatureStore, StoreWriter
from litune.studies.plan import read_plan
from litune.tuning.batches import Batch
from litune.tuning.run import Tuning
from litune.tuning.tune import tune

WIDTH = 12
VALUES = np.random.default_rng(0).normal(size=(60, WIDTH)).astype(np.float32)
WORDS = ("red", "green", "blue", "yellow", "bar", "box", "ring")


def file_of(image: int) -> int:
    """Every tenth image is of the same file as the one before, the fiftieth as the first."""
    return 0 if image == 50 else image - (image % 10 == 9)


def write_store(path: Path, rows: range, tower: dict[str, Any] | None = None, val: int = 5) -> FeatureStore:
    """Some of 60 images, each with one to three captions; one of six is held out."""
    writer = StoreWriter(path, {"tower": tower, "images": len(rows), "dtype": "float16", "pairs": None})
    table = pa.table(
        {
            "key": [f"{i}.png" for i in rows],
            "image_path": [f"/nowhere/{i}.png" for i in rows],
            "captions": [[f"the {WORDS[i % 7]} {WORDS[(i + c) % 5]}" for c in range(1 + i % 3)] for i in rows],
            "sha256": [hashlib.sha256(b"%d" % file_of(i)).hexdigest() for i in rows],
            "split": ["val" if i % 6 == val else "train" for i in rows],
        }
    )
    writer.write_shard(VALUES[rows.start : rows.stop], table, [], len(rows))
    return writer.finish()


@pytest.fixture
def config(tiny_bert: Path, tmp_path: Path) -> TuneConfig:
    """A run on two stores of 36 and 24 images, 30 and 20 of them to tune on, for nine steps of ten."""
    write_store(tmp_path / "large", range(36))
    write_store(tmp_path / "small", range(36, 60))
    return TuneConfig(
        store=tmp_path / "large", more_stores=(tmp_path / "small",), text_tower=f"hf:{tiny_bert}", out=tmp_path / "run",
        duration="9steps", batch_size=10, evaluations=0, image_map="none", precision="float32", device="cpu",
        start="random",
    )  # fmt: skip


def start(config: TuneConfig) -> Tuning:
    """The run of a config before its first step."""
    stores, spec = [FeatureStore(path) for path in config.stores], text_spec(config)
    train, val = choose_mixture(stores, config)
    torch.manual_seed(config.seed)
    model = make_model(train, spec, make_tokenizer(spec, config, train.captions), config)
    return Tuning(config, train, val, model, torch.device("cpu"))


def test_proportional_is_one_store_of_all(config: TuneConfig, tmp_path: Path) -> None:
    """The same bytes as a run on one store that holds the images of both; all are once in an epoch."""
    write_store(tmp_path / "whole", range(60))
    one = dataclasses.replace(config, store=tmp_path / "whole", more_stores=(), out=tmp_path / "one")
    tune.run(config)
    tune.run(one)
    assert bytes_of(config.out) == bytes_of(one.out)
    losses = [[line["loss"] for line in log_of(out)] for out in (config.out, one.out)]
    assert losses[0] == losses[1]
    run = start(config)
    images = np.concatenate([batch.images for batch in run.batches.from_step(0, 5)])
    assert sorted(images) == list(range(50))
    assert run.train.keys == start(one).train.keys
    assert np.array_equal(run.train.features(images), start(one).train.features(images))


@pytest.mark.parametrize("mix", [("proportional",), ("alternate",), ("0.7", "0.3")])
@pytest.mark.parametrize("shuffle", ["full", "window"])
def test_interrupted_in_an_epoch(
    config: TuneConfig, mix: tuple[str, ...], shuffle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litune.tuning.batches.BLOCK", 4)
    monkeypatch.setattr("litune.tuning.batches.WINDOW", 3)
    monkeypatch.setattr("litune.tuning.setup.TOKENIZED_MOST", 0 if shuffle == "window" else 10**6)
    config = dataclasses.replace(config, mix=mix, shuffle=shuffle, checkpoint_seconds=0.0, evaluations=1)
    tune.run(config)
    broken = dataclasses.replace(config, out=tmp_path / "broken")
    for step in (2, 7):
        interrupt(step, broken, monkeypatch)
    tune.run(broken)
    assert bytes_of(broken.out) == bytes_of(config.out)
    assert [line["loss"] for line in log_of(broken.out)[:9]] == [line["loss"] for line in log_of(config.out)[:9]]


@pytest.mark.parametrize("mix", [("proportional",), ("alternate",), ("1", "1/3")])
def test_ranks_share_the_same_batch(config: TuneConfig, mix: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    run = start(dataclasses.replace(config, mix=mix))
    whole = list(run.batches.from_step(0, 9))
    parts: list[list[Batch]] = []
    for rank in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "world_size", lambda: 2)
            patch.setattr(distributed, "rank", lambda rank=rank: rank)
            parts.append([inputs.batch for inputs in run.inputs(0)])
    for batch, one, two in zip(whole, *parts, strict=True):
        assert np.array_equal(batch.images, np.concatenate([one.images, two.images]))
        assert np.array_equal(batch.captions[0], np.concatenate([one.captions[0], two.captions[0]]))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mix", [("proportional",), ("alternate",), ("3", "1")])
def test_metrics_of_sources(config: TuneConfig, mix: tuple[str, ...], loss: Any) -> None:
    """Each source's loss, weighted by its pairs, gives the whole; each is evaluated by itself, and all together."""
    more = 5 if loss == "softmax" else 0
    config = dataclasses.replace(config, mix=mix, evaluations=2, loss=loss, image_negatives=more, logit_bias=-3.0)
    tune.run(config)
    lines = log_of(config.out)
    counts = [{name: one["pairs"] for name, one in line["sources"].items()} for line in lines if "loss" in line]
    assert all(sum(one.values()) == 10 for one in counts)
    if mix == ("alternate",):
        assert counts == [{"large": 10} if step % 2 == 0 else {"small": 10} for step in range(9)]
    if mix == ("3", "1"):
        assert {(one["large"], one["small"]) for one in counts} == {(8, 2), (7, 3)}
    for line in lines:
        if "loss" in line:
            total = sum(one["pairs"] * one["loss"] for one in line["sources"].values())
            assert total / 10 == pytest.approx(line["loss"], rel=1e-5)
    found = [line for line in lines if "val" in line]
    assert [line["step"] for line in found] == [5, 9]
    for line in found:
        assert line["val"]["images"] == 10
        assert {name: one["val"]["images"] for name, one in line["sources"].items()} == {"large": 6, "small": 4}
    manifest = json.loads((config.out / "manifest.json").read_text())
    assert {name: one["images"] for name, one in manifest["sources"].items()} == {"large": 30, "small": 20}
    assert manifest["tuned_on"]["images"] == 50


def test_both_sources_of_turns_are_logged(config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litune.tuning.run.LOG_LINES", 4)
    tune.run(dataclasses.replace(config, mix=("alternate",), duration="16steps"))
    lines = log_of(config.out)
    assert len(lines) < 16
    assert {name for line in lines for name in line["sources"]} == {"large", "small"}


def test_the_same_file_in_two_stores_is_one_image(config: TuneConfig) -> None:
    """Of all pairs in the batch, only those of equal texts or of equal files are no negatives."""
    run = start(config)
    assert run.prepare.image_ids is not None
    keys = [int(key.split(".")[0]) for key in run.train.keys]
    same = np.array([file_of(key) for key in keys])
    assert np.array_equal(run.prepare.image_ids[:, None] == run.prepare.image_ids, same[:, None] == same)
    captions = np.arange(len(run.train.captions))
    ids = run.prepare.ids(np.zeros(len(captions), np.int64), captions)
    assert ids is not None
    words = np.array(run.train.captions)
    assert np.array_equal((ids.texts[:, None] == ids.texts).numpy(), words[:, None] == words)


def test_wrong_mixtures(config: TuneConfig, tmp_path: Path) -> None:
    wrong = {
        "--mix is 'both'": {"mix": ("both",)},
        "--mix is '1 -1'": {"mix": ("1", "-1")},
        "--mix is '1 1 1': give a weight for each of the 2 stores": {"mix": ("1", "1", "1")},
    }
    for message, settings in wrong.items():
        with pytest.raises(ConfigError, match=message):
            dataclasses.replace(config, **settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="small has 20 images to tune on, fewer than the 24 that a batch takes"):
        tune.run(dataclasses.replace(config, mix=("1", "4"), batch_size=30))
    with pytest.raises(StoreError, match="large is given twice"):
        tune.run(dataclasses.replace(config, more_stores=(config.store,)))
    towers = [{"spec": spec, "weights": spec, "pooling": "avg", "preprocess": {}} for spec in ("a", "b")]
    for path, tower in zip(("a", "b"), towers, strict=True):
        write_store(tmp_path / path, range(12), tower)
    with pytest.raises(StoreError, match=r"b was made with the image tower b, not with a as .*a \(weights b and a\)"):
        tune.run(dataclasses.replace(config, store=tmp_path / "a", more_stores=(tmp_path / "b",)))
    assert not config.out.exists()


def test_going_on_with_a_run_of_an_older_version(config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that it did not have yet were as they are by default."""
    config = dataclasses.replace(config, more_stores=(), checkpoint_seconds=0.0)
    interrupt(3, config, monkeypatch)
    file = config.out / "config.json"
    known = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in known.items() if k not in ("more_stores", "mix", "texts", "shuffle")}))
    with pytest.raises(RunError, match=r"another config \(shuffle was None, is 'window'\)"):
        tune.run(dataclasses.replace(config, shuffle="window"))
    tune.run(config)


def test_in_a_comparison(config: TuneConfig, tmp_path: Path) -> None:
    """Its rows may mix stores; paths are relative to the file."""
    (tmp_path / "c.toml").write_text(
        '[base]\nstore = "large"\nmore-stores = ["small"]\ntext-tower = "minilm"\n'
        '[[row]]\nmix = ["0.7", "0.3"]\n[[row]]\nmix = "alternate"\n'
    )
    weighted, turns = read_plan(tmp_path / "c.toml", tmp_path / "out").runs
    assert weighted.tune.stores == config.stores
    assert (weighted.tune.mix, turns.tune.mix) == (("0.7", "0.3"), ("alternate",))


# Texts


def write_texts(file: Path, **columns: Any) -> Path:
    pa.parquet.write_table(pa.table(columns), file)
    return file


def test_texts_of_the_store_itself(config: TuneConfig, tmp_path: Path) -> None:
    """Its own captions, written out by row and by key, in order and shuffled, give the run on the store."""
    own = dataclasses.replace(config, more_stores=(), evaluations=1)
    tune.run(own)
    store = FeatureStore(config.store)
    pairs = store.select()
    rows, words = pairs.rows[pairs.owner], pairs.captions
    keys = [pairs.keys[i] for i in pairs.owner]
    folder = tmp_path / "shards"
    folder.mkdir()
    write_texts(folder / "0.parquet", caption=words[42:], key=keys[42:])
    write_texts(folder / "1.parquet", caption=words[:42], row=rows[:42], key=keys[:42])
    arrow = tmp_path / "all.arrow"
    pa.feather.write_feather(pa.table({"caption": words, "row": rows}), arrow, compression="uncompressed")
    for name, texts in (("folder", folder), ("arrow", arrow)):
        other = dataclasses.replace(own, texts=(texts,), out=tmp_path / name)
        tune.run(other)
        assert bytes_of(other.out) == bytes_of(own.out)
        assert log_of(other.out)[-1]["val"] == log_of(own.out)[-1]["val"]


def test_held_out_images_that_are_tuned_on(
    config: TuneConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Equal files on both sides, of one store or of two, are told of in one line; or left out, when asked to."""
    stores = [FeatureStore(path) for path in config.stores]
    train, val = choose_mixture(stores, config)
    assert val is not None
    files = {key: file_of(int(key.removesuffix(".png"))) for key in (*train.keys, *val.keys)}
    held_out = {files[key] for key in val.keys}
    both = [key for key in train.keys if files[key] in held_out]
    assert both == ["28.png", "58.png"]  # 29.png and 59.png are held out
    said = " ".join(capsys.readouterr().err.split())
    assert f"2 of 50 images to tune on are held out too, as equal files (the first: 28.png in {stores[0].path})" in said
    assert "--exclude-held-out" in said

    less, _ = choose_mixture(stores, dataclasses.replace(config, exclude_held_out=True))
    assert less.keys == [key for key in train.keys if key not in both]
    assert "2 images are left out of tuning: their files are held out too" in capsys.readouterr().err

    # What one store holds out, the other one has in its split to tune on.
    same = [stores[0], write_store(tmp_path / "same", range(36), val=0)]
    train, val = choose_mixture(same, config)
    assert val is not None
    assert (len(train), len(val)) == (60, 12)
    held_out = {file_of(int(key.removesuffix(".png"))) for key in val.keys}
    left = [key for key in train.keys if file_of(int(key.removesuffix(".png"))) not in held_out]
    assert "16 of 60 images to tune on are held out too" in " ".join(capsys.readouterr().err.split())
    less, _ = choose_mixture(same, dataclasses.replace(config, exclude_held_out=True))
    assert less.keys == left
    assert len(left) == 44  # 12 of the other store's held-out images, and 19 and 28 of both, copies of 18 and 29
    copies = [stores[0], write_store(tmp_path / "copies", range(28, 30), val=1)]
    with pytest.raises(ConfigError, match="copies has 0 images to tune on"):
        choose_mixture(copies, dataclasses.replace(config, exclude_held_out=True))


def test_texts_of_several_stores(config: TuneConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Other texts than the stores': some images without, some with many, languages, rows of either store by name."""
    texts = write_texts(
        tmp_path / "t.parquet",
        caption=["a", "b", "c", "d", "e", "", None, "f", "g"],
        row=[1, 0, 1, 99, 2, 3, 4, 0, 1],
        store=["large", "small", "large", "large", "large", "small", "small", "nowhere", "small"],
    )
    config = dataclasses.replace(config, texts=(texts,), max_damaged=0.5)
    train, val = choose_mixture([FeatureStore(path) for path in config.stores], config)
    assert train.captions == ["a", "c", "e", "b", "g"]
    assert val is not None
    assert val.captions == [c for store in config.stores for c in FeatureStore(store).select("val").captions]
    assert train.keys == ["1.png", "2.png", "36.png", "37.png"]
    assert train.owner.tolist() == [0, 0, 1, 2, 3]
    said = " ".join(capsys.readouterr().err.split())
    assert "texts: 5 captions for 4 images out of 1 files" in said
    assert "4 of the 9 captions" in said
    assert "t.parquet row 3 (store 'large', row 99); t.parquet row 5 (store 'small', row 3, no text)" in said
    assert said.count("has no texts of the split 'val': its own captions are evaluated") == 2
    with pytest.raises(DataError, match=r"4 of the 9 captions in .* \(at most 1.0% may be\), as t.parquet row 3"):
        tune.run(dataclasses.replace(config, max_damaged=0.01))


def test_texts_with_fields_and_languages(config: TuneConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, more_stores=(), lang=("en",), fields=("title", "tags"), batch_size=4)
    rows = np.repeat(np.arange(36), 3)
    texts = write_texts(
        tmp_path / "t.parquet",
        caption=[f"{WORDS[i % 7]} {kind}" for i in range(36) for kind in ("bar", "box", "german")],
        row=np.random.default_rng(0).permutation(rows),
        lang=["en", "en", "de"] * 36,
        field=["title", "tags", "title"] * 36,
    )
    run = start(dataclasses.replace(config, texts=(texts,)))
    assert not any("german" in caption for caption in run.train.captions)
    fields = np.array(run.train.fields)
    for batch in run.batches.from_step(0, 6):
        for captions, name in zip(batch.captions, ("title", "tags"), strict=True):
            there = captions >= 0
            assert (fields[captions[there]] == name).all()
            assert np.array_equal(run.train.owner[captions[there]], batch.images[there])


def test_texts_of_any_type(config: TuneConfig, tmp_path: Path) -> None:
    """Texts as dictionaries, as large strings, with and without languages, rows of any kind of whole number."""
    words = pa.array(["one", "two", "one", "two"])
    first = write_texts(
        tmp_path / "0.parquet", caption=words.dictionary_encode(), row=pa.array([0, 1, 2, None], pa.uint16())
    )
    second = write_texts(
        tmp_path / "1.parquet",
        caption=words.cast(pa.large_string()),
        key=pa.array(["0.png", "1.png", None, "3.png"]).dictionary_encode(),
        lang=["en", None, "en", "en"],
        field=[None, None, None, "title"],
    )
    config = dataclasses.replace(config, more_stores=(), texts=(first, second), max_damaged=0.5, batch_size=2)
    stores = [FeatureStore(config.store)]
    train, _ = choose_mixture(stores, config)
    assert train.captions == ["one", "one", "two", "two", "one", "two"]
    assert train.keys == ["0.png", "1.png", "2.png", "3.png"]
    assert train.fields == [None, None, None, None, None, "title"]
    assert train.of_field("title").tolist() == [5]
    english, val = choose_mixture(stores, dataclasses.replace(config, lang=("en",)))
    assert val is None  # neither these texts nor the store have English ones
    assert (english.keys, english.captions) == (["0.png", "3.png"], ["one", "two"])


def test_wrong_texts(config: TuneConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.csv").write_text("caption,row")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    wrong = {
        "there are no texts at": tmp_path / "nothing.parquet",
        "has no shards of captions": tmp_path / "empty",
        "is no file of captions": tmp_path / "x.csv",
        "can't be read as captions": tmp_path / "torn.parquet",
        "has no column 'caption'": write_texts(tmp_path / "a.parquet", text=["a"], row=[0]),
        "needs a column 'key' or 'row'": write_texts(tmp_path / "b.parquet", caption=["a"]),
        "no column 'store', and there are 2 stores": write_texts(tmp_path / "c.parquet", caption=["a"], row=[0]),
        "'row' holds string, expected whole": write_texts(tmp_path / "d.parquet", caption=["a"], row=["0"], key=["0"]),
        "1 of the 2 captions": write_texts(
            tmp_path / "e.parquet", caption=["a", "b"], row=[0, 1], key=["0.png", "7.png"], store=["large", "large"]
        ),
    }
    for message, texts in wrong.items():
        with pytest.raises(DataError, match=message):
            tune.run(dataclasses.replace(config, texts=(texts,)))
    assert not config.out.exists()


def test_tokens_made_ahead_change_nothing(config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenised before the first step or ahead of each: the same losses, and the same weights to rounding."""
    tune.run(config)
    monkeypatch.setattr("litune.tuning.setup.TOKENIZED_MOST", 10)
    later = dataclasses.replace(config, out=tmp_path / "later")
    tune.run(later)
    losses = [[line["loss"] for line in log_of(out)] for out in (config.out, later.out)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    weights = [load_file(out / "model.safetensors") for out in (config.out, later.out)]
    for name, value in weights[0].items():
        if not name.endswith("key.bias"):
            assert torch.allclose(value, weights[1][name], atol=2e-5), name
