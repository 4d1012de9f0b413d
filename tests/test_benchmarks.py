"""The benchmarks run, from the command line and at their smallest, and print what they promise."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.forked import quick_python

from litune.store.store import FeatureStore

ROOT = Path(__file__).parent.parent


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    file = tmp_path / "captions.csv"
    rows = [f"{i}.png,train,en,a red box number {'x' * (i % 5)}" for i in range(20)]
    file.write_text("\n".join(["image,split,lang,caption", *rows, "20.png,val,de,leer"]), encoding="utf-8")
    return file


def run(script: str, *options: str) -> dict[str, Any]:
    command = [quick_python(), str(ROOT / "benchmarks" / script), *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert len(done.stdout.splitlines()) > 3  # a table for people comes first
    return found


def test_tune_speed(tiny_bert: Path, captions: Path) -> None:
    small = ["--text-tower", f"hf:{tiny_bert}", "--dim", "16", "--batch-size", "16", "--rounds", "2", "--threads", "1"]
    only = ["--captions", str(captions), "--split", "train", "--lang", "en"]
    found = run("tune_speed.py", *small, *only, "--peer-batch", "0")
    assert found["times_open_clip"] is None
    assert found["pairs_per_second"] > 0
    assert found["limit_pairs_per_second"] > found["pairs_per_second"]
    assert 0 < found["share_of_limit"] < found["share_of_limit_with_attention"] < 3
    assert sum(found["phases"].values()) == pytest.approx(1)
    assert list(found["phases"]) == ["loader", "encode images", "texts forward", "loss", "backward", "optimizer"]
    assert found["tokens_per_caption"] > 5
    assert found["seconds"]["litune_step"] > 0
    assert found["settings"]["batch_size"] == 16
    assert {"cpu", "torch", "precision", "rounds"} <= found.keys()
    assert found["threads"] == 1


def test_loss_precision() -> None:
    found = run("loss_precision.py", "--batch", "64", "--width", "32", "--scale", "20")["loss_precision"]
    assert [row["products"] for row in found] == ["float32", "TF32", "bfloat16"] * 2
    for exact, ten_bits, seven_bits in (found[:3], found[3:]):
        assert exact["to_texts"] < 1e-5 < ten_bits["to_texts"] < seven_bits["to_texts"] / 4 < 1e-2


def test_time_to_quality(store: FeatureStore, tiny_bert: Path) -> None:
    found = run(
        "time_to_quality.py", str(store.path), "--text-tower", f"hf:{tiny_bert}", "--goal", "0", "2", "--peer-rate"
    )
    first, never = found["seconds_to"]["0"], found["seconds_to"]["2"]
    assert 0 < first["fit"] < 60
    assert 0 < first["tune"] < 60
    assert never == {"fit": None, "tune": None, "open_clip": None}
    seconds = [at for at, _ in found["curves"]["tune"]]
    assert seconds == sorted(seconds)
    assert not (store.path / "text_emb").exists()  # texts were encoded anew, elsewhere


def test_tune_memory(tiny_bert: Path, captions: Path) -> None:
    small = ["--text-tower", f"hf:{tiny_bert}", "--dim", "16", "--batch-sizes", "32", "--threads", "1"]
    found = run("tune_memory.py", *small, "--captions", str(captions))
    assert 0 < found["imported_gb"] <= found["loaded_gb"] <= found["peak_gb"]["32"] < 4  # more pairs than captions
    assert found["seconds_per_step"]["32"] > 0
    assert found["fit"] is None
    assert {"cpu", "threads", "torch", "precision", "micro_batch"} <= found.keys()


def test_embed_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = "timm:test_resnet.r160_in1k?init=random&size=64"
    found = run("embed_speed.py", "--count", "40", "--rounds", "1", "--towers", spec)
    (tower,) = found["towers"].values()
    assert found["images"] == 40
    assert tower["images_per_second"] > 0
    parts = 1 / tower["ready_tensors_per_second"] + 1 / tower["decoded_per_second"]
    assert tower["limit_images_per_second"] == pytest.approx(1 / parts)
    assert tower["share_of_limit"] == pytest.approx(tower["images_per_second"] / tower["limit_images_per_second"])
    assert tower["times_plain_torch"] == pytest.approx(tower["images_per_second"] / tower["plain_torch_per_second"])
    assert tower["runtime"] == "torch float32"  # fewer pictures than are worth trying
    assert "torch float32" in tower["agreeing"]


def test_dedup_recall(tower_module: str, tmp_path: Path) -> None:
    found = run("dedup_recall.py", "--count", "6", "--others", "4", "--image-tower", tower_module, "--index", "500")
    assert found["images"] == 6 * 10 + 4
    assert found["recall"]["JPEG 95"] == found["recall"]["half size"] == 1
    assert len(found["recall"]) == 10
    assert found["least_recall"] == min(v for k, v in found["recall"].items() if k not in ("crop 10%", "text"))
    assert found["false_pairs_per_10k"] == 0
    assert found["index"][0]["recall_at_4"] > 0.99
    assert {"seconds", "cpu", "threads", "candidates_per_image"} <= found.keys()


def test_fit_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from tune_memory import fit_line

    assert fit_line({1000: 1.5, 2000: 2.0, 4000: 3.0}) == pytest.approx(
        {"gb_per_1000_pairs": 0.5, "gb_at_0": 1.0, "worst_relative_residual": 0.0}
    )
    assert fit_line({0: 1.0, 1000: 1.0, 2000: 4.0})["worst_relative_residual"] == pytest.approx(1.0)


def test_eval_speed(tiny_bert: Path) -> None:
    small = ["--dim", "16", "--images", "60", "--classes", "5", "--templates", "3", "--bare", "15", "--threads", "1"]
    found = run("eval_speed.py", "--text-tower", f"hf:{tiny_bert}", *small)
    assert found["precisions"].keys() == {"float32", "bfloat16"}
    for one in found["precisions"].values():
        assert one["texts"] == 15
        assert one["share_of_bare_tower"] == pytest.approx(one["texts_per_second"] / one["bare_tower_texts_per_second"])
        assert one["limit_seconds"] == pytest.approx(15 / one["bare_tower_texts_per_second"] + one["seconds_products"])
        assert one["seconds"] == pytest.approx(one["seconds_texts"] + one["seconds_scores"])
    assert 0 <= found["same_predictions"] <= 1
    assert {"cpu", "threads", "torch", "images", "classes"} <= found.keys()
