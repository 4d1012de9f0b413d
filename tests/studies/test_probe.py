from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.conftest import COLORS, SHAPES, draw

from litune.cli import main
from litune.config import ProbeConfig
from litune.errors import ConfigError, DataError, OutputExistsError, StoreError, TowerError
from litune.image.registry import load_image_tower
from litune.store.embed import embed
from litune.store.selection import choose_pairs
from litune.store.store import FeatureStore, StoreWriter
from litune.studies import probe as module
from litune.studies.probe import Pairs, fitted_ranks, probe, table

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


def pictures(folder: Path, count: int) -> Path:
    """Colored shapes in other sizes on other grounds, with two captions each, a fourth of them held out."""
    random = np.random.default_rng(0)
    lines = ["image,split,caption"]
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        color, shape = list(COLORS)[i % len(COLORS)], SHAPES[i // len(COLORS) % len(SHAPES)]
        picture = draw(color, shape, int(random.integers(32, 64)))
        values = np.asarray(picture).astype(int) - random.integers(0, 60, 3)
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{i}.png")
        split = "val" if i % 4 == 3 else "train"
        lines += [f"{i}.png,{split},a {color} {shape}", f"{i}.png,{split},the {shape} is {color} really"]
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder


def test_features_of_a_tower_are_compared_on_a_sample(tiny_bert: Path, tmp_path: Path) -> None:
    """The figures are those of stores that were embedded with these features; nothing is left behind."""
    weights = tmp_path / "weights.safetensors"
    save_file(load_image_tower("timm:test_vit?init=random").network.model.state_dict(), weights)
    spec = f"timm:test_vit?checkpoint={weights}&size=32"
    pairs = pictures(tmp_path / "pictures", 120)
    names = ["pooled", "cls+mean", "layers:2+views:2"]
    text = {"text_tower": f"hf:{tiny_bert}", "device": "cpu"}
    found = probe(stores=[pairs], features=names, image_tower=spec, **text)
    assert [one["features"] for one in found["stores"]] == names
    assert [one["width"] for one in found["stores"]] == [64, 128, 64]
    assert [(one["train_images"], one["images"]) for one in found["stores"]] == [(90, 30)] * 3
    assert found["comparable"]
    assert found["stores"][1]["to_the_first"]["difference"] == pytest.approx(
        found["stores"][1]["figures"]["fit recall@10"] - found["stores"][0]["figures"]["fit recall@10"]
    )
    assert not any(Path(one["store"]).exists() for one in found["stores"])
    shown = table(found)
    assert shown.index("| pooled (64)") < shown.index("| cls+mean (128)") < shown.index("| layers:2+views:2 (64)")
    assert " h at " in shown
    store = embed(pairs=pairs, image_tower=spec, features=names[1], out=tmp_path / "store")
    other = probe(stores=[store.path], **text)["stores"][0]
    assert other["figures"] == pytest.approx(found["stores"][1]["figures"], abs=0.02)
    # A store knows where its pictures are, and its tower.
    plain = embed(pairs=pairs, image_tower=spec, out=tmp_path / "plain")
    again = probe(stores=[plain.path], features=names[:2], train_images=60, val_images=24, **text)
    assert [(one["train_images"], one["images"]) for one in again["stores"]] == [(60, 24)] * 2
    assert again["stores"][1]["tower"] == f"{spec}&features=cls+mean"
    with pytest.raises(ConfigError, match="does not know its image tower: name the one to try with --image-tower"):
        probe(stores=[pairs], features=names, **text)
    with pytest.raises(TowerError, match="names features already"):
        probe(stores=[store.path], features=names, **text)


def test_fitted_ranks() -> None:
    """Where texts are a linear map of images their own image ranks first; of shuffled pairs at chance."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(400, 24, generator=random)
    owner = torch.arange(400).repeat_interleave(2)
    texts = (images @ torch.randn(24, 16, generator=random))[owner] + 0.1 * torch.randn(800, 16, generator=random)

    def ranks(texts: torch.Tensor) -> np.ndarray:
        learned, measured = object.__new__(Pairs), object.__new__(Pairs)
        for pairs, there in ((learned, slice(0, 300)), (measured, slice(300, 400))):
            pairs.images = images[there]
            pairs.texts = texts[2 * there.start : 2 * there.stop]
            pairs.owner = owner[: 2 * len(pairs.images)]
        return fitted_ranks(learned, measured, seed=0)

    assert (ranks(texts) < 1).mean() > 0.9
    assert 0.02 < (ranks(texts[torch.randperm(800, generator=random)]) < 10).mean() < 0.2


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
    with pytest.raises(ConfigError, match="--features are compared on one set of pairs"):
        ProbeConfig(stores=(small.path, small.path), features=("cls",))
    with pytest.raises(ConfigError, match="--image-tower is for --features"):
        ProbeConfig(stores=(small.path,), image_tower="vit-s14")
    with pytest.raises(SystemExit) as stop:
        main(["probe", str(tmp_path / "nowhere"), "--text-tower", f"hf:{tiny_bert}"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
