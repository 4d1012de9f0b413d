from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from litune.cli import main
from litune.config import ProbeConfig
from litune.errors import ConfigError, DataError, OutputExistsError, StoreError
from litune.store.selection import choose_pairs
from litune.store.store import FeatureStore, StoreWriter
from litune.studies import probe as module
from litune.studies.probe import probe, table

WORDS = ["red", "green", "blue", "yellow", "bar", "box", "ring", "really", *"bcdfghjkmnpqrtvwxz"]


def worded_store(path: Path, noise: float, *, width: int = 64, images: int = 240, splits: bool = True) -> FeatureStore:
    """Features that say which words an image's captions have, more or less clearly; the same pairs for every noise."""
    random = np.random.default_rng(0)
    held = [sorted(random.choice(len(WORDS), size=5, replace=False)) for _ in range(images)]
    directions = random.normal(size=(len(WORDS), width))
    features = np.stack([directions[words].sum(0) for words in held])
    features = features + noise * np.random.default_rng(1).normal(size=features.shape) + 2
    captions = [[" ".join(WORDS[w] for w in random.permutation(words)) for _ in range(2)] for words in held]
    columns: dict[str, Any] = {"key": [f"{i}.png" for i in range(images)], "captions": captions}
    columns |= {"image_path": columns["key"]} | (
        {"split": ["val" if i % 4 == 3 else "train" for i in range(images)]} if splits else {}
    )
    writer = StoreWriter(
        path, {"tower": {"spec": f"noise:{noise}"}, "images": images, "dtype": "float16", "pairs": None}
    )
    writer.write_shard(features.astype(np.float32), pa.table(columns), [], images)
    return writer.finish(images_per_second=50.0)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning is timed on a step or two."""
    monkeypatch.setattr(module, "MEASURE_SECONDS", 0.01)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same pairs seen by towers from good to useless."""
    folder = tmp_path_factory.mktemp("probed")
    return [worded_store(folder / name, noise).path for name, noise in (("c", 60.0), ("a", 0.5), ("b", 7.0))]


def test_ranks_towers_by_what_they_see(stores: list[Path], tiny_bert: Path, tmp_path: Path) -> None:
    results = probe(stores=stores, text_tower=f"hf:{tiny_bert}", json=tmp_path / "probe.json", device="cpu")
    with pytest.raises(OutputExistsError, match=r"probe\.json exists: choose another --json"):
        probe(stores=["nowhere"], json=tmp_path / "probe.json")
    best, middle, worst = results["stores"]
    assert [Path(one["store"]).name for one in results["stores"]] == ["a", "b", "c"]
    assert json.loads((tmp_path / "probe.json").read_text()) == json.loads(json.dumps(results))
    for figure in ("linear recall@10", "anchors recall@10", "neighbours"):
        assert best["figures"][figure] > 2 * best["chance"][figure]
        assert best["figures"][figure] > worst["figures"][figure]
        low, high = best["intervals"][figure]
        assert low <= best["figures"][figure] <= high
        assert low < high
    # A tower that sees nothing is at chance, which its interval holds.
    low, high = worst["intervals"]["linear recall@10"]
    assert low - 0.05 < worst["chance"]["linear recall@10"] == 10 / 60 < high + 0.05
    assert "to_the_first" not in best
    assert worst["to_the_first"]["high"] < 0
    assert middle["to_the_first"]["difference"] == pytest.approx(
        middle["figures"]["neighbours"] - best["figures"]["neighbours"]
    )
    assert (best["train_images"], best["images"], best["captions"]) == (180, 60, 120)
    assert best["storage"]["bytes_per_image"] == 2 * 64
    assert best["storage"]["embedding_hours_per_million"] == pytest.approx(1e6 / 50 / 3600, abs=0.01)
    assert best["tuning"]["pairs"] == 1800  # the default length of litune tune from a fit: 10 epochs
    assert best["tuning"]["seconds"] == pytest.approx(
        best["tuning"]["pairs"] / best["tuning"]["pairs_per_second"], rel=0.05, abs=0.1
    )
    shown = table(results)
    assert shown.index("| a (noise:0.5, 64)") < shown.index("| b (") < shown.index("| c (")
    assert "can't be compared" not in shown
    assert not [file for store in stores for file in store.rglob("*unused*")], "nothing is written into the stores"


def test_holds_out_what_tune_holds_out(tmp_path: Path, tiny_bert: Path) -> None:
    store = worded_store(tmp_path / "plain", 0.5, splits=False)
    config = ProbeConfig(stores=(store.path,), text_tower=f"hf:{tiny_bert}", holdout=0.1, device="cpu")
    found = probe.run(config)["stores"][0]
    assert (found["train_images"], found["images"]) == (216, 24)
    _, held = choose_pairs(store, module.tune_settings(config, store.path))
    assert held is not None
    assert len(held) == 24


def test_draws_the_same_images_of_every_store(stores: list[Path], tiny_bert: Path, tmp_path: Path) -> None:
    results = probe(stores=stores[1:], text_tower=f"hf:{tiny_bert}", train_images=60, val_images=30, device="cpu")
    assert results["comparable"]
    assert [(one["train_images"], one["images"]) for one in results["stores"]] == [(60, 30)] * 2
    other = worded_store(tmp_path / "other", 0.5, images=200)
    results = probe(stores=[stores[1], other.path], text_tower=f"hf:{tiny_bert}", device="cpu")
    assert not results["comparable"]
    assert all("to_the_first" not in one for one in results["stores"])
    assert "can't be compared" in table(results)


def test_from_the_command_line(stores: list[Path], tiny_bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["probe", str(stores[1]), "--text-tower", f"hf:{tiny_bert}", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "linear R@10" in out
    assert "chance" in out


def test_refuses(stores: list[Path], tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="was not tuned"):
        probe(stores=[stores[0]], text_tower="vit:Ti")
    with pytest.raises(StoreError, match="no feature store"):
        probe(stores=[tmp_path / "nowhere"], text_tower=f"hf:{tiny_bert}")
    small = worded_store(tmp_path / "small", 1.0, images=40)
    with pytest.raises(DataError, match="30 images to learn from and 10 held out"):
        probe(stores=[small.path], text_tower=f"hf:{tiny_bert}")
    with pytest.raises(ConfigError, match="no feature store was given"):
        ProbeConfig(stores=())
    with pytest.raises(ConfigError, match="holdout"):
        ProbeConfig(stores=(small.path,), holdout=0)
    with pytest.raises(SystemExit) as stop:
        main(["probe", str(tmp_path / "nowhere"), "--text-tower", f"hf:{tiny_bert}"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
