from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tests.interop.released import layout, random_values, write

import litune
from litune.cli import main
from litune.errors import DataError, OutputExistsError, TowerError


def test_image_tower() -> None:
    found = litune.inspect("timm:resnet18?init=random&size=64")
    assert found["kind"] == "image tower"
    assert found["parameters"] == 11_176_512  # torchvision's 11,689,512 without its classifier of 513,000
    assert sum(found["parts"].values()) == found["parameters"]
    assert (found["width"], found["pooling"], found["locked"]) == (512, "avg", True)
    assert found["preprocess"]["size"] == [64, 64]
    assert len(found["fingerprint"]) == 64


def test_text_towers(tiny_bert: Path) -> None:
    found = litune.inspect(f"hf:{tiny_bert}")
    assert found["kind"] == "text tower"
    assert found["parameters"] == sum(found["parts"].values())
    assert set(found["parts"]) == {"embeddings", "encoder"}
    found = litune.inspect("vit:Ti")
    width, depth, mlp, vocabulary, tokens = 192, 12, 768, 32_000, 16
    block = 4 * (width + 1) * width + (width + 1) * mlp + (mlp + 1) * width + 4 * width
    assert found["parameters"] == vocabulary * width + tokens * width + depth * block + 2 * width
    assert found["pooling"] == "last"


def test_store_run_and_pair(
    store: litune.FeatureStore, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = litune.inspect(str(store.path))
    assert (found["kind"], found["images"], found["width"]) == ("feature store", len(store), store.width)
    run = tmp_path / "run"
    litune.tune(store.path, text_tower=f"hf:{tiny_bert}", out=run, duration="2steps", evaluations=1)
    known = litune.inspect(str(run))
    assert known["kind"] == "run"
    assert known["locked"] == ["image tower"]
    assert known["parts"]["image head"] == 49 * 17  # to one dimension less than images, with a bias
    assert known["last"]["step"] == 2
    file = tmp_path / "pair.json"
    main(["inspect", str(store.path), "--text-tower", f"hf:{tiny_bert}", "--images", "18", "--json", str(file)])
    tuning = json.loads(file.read_text())["tuning"]
    # The run's parameters: the tower, the heads and the temperature.
    assert tuning["tuned_parameters"] == known["parameters"]
    assert tuning["bytes_stored"] == 18 * 2 * store.width
    assert tuning["bytes_of_weights_gradients_and_moments"] == 16 * known["parameters"]
    assert "tuned parameters" in capsys.readouterr().out
    with pytest.raises(OutputExistsError, match=r"pair\.json exists: choose another --json"):
        litune.inspect("nothing", json=file)
    litune.inspect(str(store.path), json=file, overwrite=True)
    assert "tuning" not in json.loads(file.read_text())


def test_released_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "LiT-tiny.npz"
    shapes = layout(
        (48, 2, 100, 3), (64, 2, 160, 2), bert=True, patch=8, size=16, vocabulary=70, positions=40, dim=48
    )  # fmt: skip
    write(file, random_values(shapes))
    found = litune.inspect(str(file))
    count = {side: sum(math.prod(v) for k, v in shapes.items() if k.split("/")[0] == side) for side in ("img", "txt")}
    assert found["kind"] == "released checkpoint"
    assert found["parts"] == {**count, "t": 1}
    assert found["parameters"] == sum(found["parts"].values())
    assert (found["image"]["size"], found["image"]["patch"], found["image"]["head"]) == (16, 8, False)
    assert (found["text"]["kind"], found["text"]["vocabulary"], found["dim"]) == ("BERT", 70, 48)


def test_what_is_nothing(tmp_path: Path, store: litune.FeatureStore) -> None:
    with pytest.raises(DataError, match=r"is no run, no feature store and no \.npz file"):
        litune.inspect(str(tmp_path))
    with pytest.raises(TowerError, match="unknown image tower"):
        litune.inspect("nothing")
    with pytest.raises(DataError, match="--text-tower goes with an image tower or a store"):
        litune.inspect("vit:Ti", text_tower="vit:Ti")
