from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tests.forked import quick_python, wait_until_gone

from litune.config import EmbedConfig
from litune.errors import DataError, OutputExistsError, StoreError
from litune.image.registry import load_image_tower
from litune.store.embed import embed
from litune.store.store import FeatureStore


def test_features_are_the_towers(photos: Path, tower_module: str, tmp_path: Path) -> None:
    store = embed(pairs=photos, image_tower=tower_module, out=tmp_path / "s", batch_size=5, store_dtype="float32")
    tower = load_image_tower(tower_module)
    from litune.image.pictures import decode_file

    for i, key in enumerate(store.metadata["key"].to_pylist()):
        import torch

        pixels = decode_file(0, key, photos / "images" / key, tower.preprocess).pixels
        assert pixels is not None
        expected = tower.encode(torch.from_numpy(np.stack([pixels]))).numpy()
        assert np.array_equal(store.features([i]), expected), key


def test_what_a_store_says(store: FeatureStore, photos: Path) -> None:
    facts = json.loads((store.path / "store.json").read_text())
    assert facts["complete"]
    assert facts["rows"] == 24
    assert facts["dtype"] == "float16"
    assert facts["tower"]["spec"] == "python:colortower:make"
    assert len(facts["tower"]["weights"]) == 64
    assert set(facts["libraries"]) >= {"torch", "timm", "transformers", "litune"}
    table = store.metadata
    assert table.column_names == [
        "key", "image_path", "caption", "captions", "langs", "split", "width", "height", "sha256",
    ]  # fmt: skip
    assert table["image_path"][0].as_py() == str(photos / "images" / "red-bar-0.png")
    assert table["captions"][0].as_py() == ["a red bar", "the bar is red, really", "bar in red"]
    assert (table["width"][0].as_py(), table["height"][1].as_py()) == (48, 56)


def test_no_shard_is_larger_than_asked(photos: Path, tower_module: str, tmp_path: Path) -> None:
    store = embed(pairs=photos, image_tower=tower_module, out=tmp_path / "s", batch_size=4, shard_size=8)
    assert [len(part) for part in store._parts] == [8, 8, 8]


def test_few_damaged_images_are_skipped_by_name(photos: Path, tower_module: str, tmp_path: Path) -> None:
    (photos / "images" / "red-box-0.png").write_bytes(b"<html>")
    whole = (photos / "images" / "blue-box-1.png").read_bytes()
    (photos / "images" / "blue-box-1.png").write_bytes(whole[: len(whole) // 2])
    (photos / "images" / "green-bar-0.png").unlink()
    with pytest.raises(
        DataError, match=r"3 of 24 images can't be used \(at most 1.0% may\), as red-box-0.png: not an image"
    ):
        embed(pairs=photos, image_tower=tower_module, out=tmp_path / "s")
    store = embed(pairs=photos, image_tower=tower_module, out=tmp_path / "t", max_damaged=0.2, batch_size=4)
    assert len(store) == 21
    assert store.manifest["damaged"] == 3
    lines = [json.loads(line) for line in (tmp_path / "t" / "damaged.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["red-box-0.png", "green-bar-0.png", "blue-box-1.png"]
    keys = store.metadata["key"].to_pylist()
    assert len(keys) == 21
    assert "red-box-0.png" not in keys


def test_finished_stores_are_not_touched(store: FeatureStore, photos: Path, tower_module: str) -> None:
    before = (store.path / "store.json").read_bytes()
    with pytest.raises(OutputExistsError, match="is finished"):
        embed(pairs=photos, image_tower=tower_module, out=store.path)
    assert (store.path / "store.json").read_bytes() == before
    again = embed(pairs=photos, image_tower=tower_module, out=store.path, overwrite=True)
    assert len(again) == 24


def test_another_tower_names_both_sides(store: FeatureStore, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "colortower.py"
    file.write_text(file.read_text().replace("(32, 32)", "(16, 16)").replace(", 8)", ", 4)"))
    sys.modules.pop("colortower")
    with pytest.raises(
        StoreError,
        match=r"was made with the image tower python:colortower:make, not with .* \(weights \w{12} and \w{12}",
    ):
        embed(pairs=photos, image_tower="python:colortower:make", out=store.path)


SLOW_TOWER = """
import time, colortower
def encode(pixels):
    with open("encoded.log", "a") as log:
        log.write(f"{len(pixels)}\\n")
    time.sleep(0.25)
    return colortower.encode(pixels)
def make():
    return encode, colortower.preprocess
"""


def test_goes_on_after_a_kill_without_encoding_again(
    photos: Path, tower_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slowtower.py").write_text(SLOW_TOWER)
    out = tmp_path / "s"
    code = (
        "import litune.store.build as b; import litune.store.embed as e; b.SHARD_SECONDS = 0.0\n"
        f"e.embed(pairs={str(photos)!r}, image_tower='python:slowtower:make', out={str(out)!r}, batch_size=2)"
    )
    process = subprocess.Popen([quick_python(), "-c", code], cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if (out / "store.json").exists() and json.loads((out / "store.json").read_text())["seen"] >= 8:
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until_gone()
    done = json.loads((out / "store.json").read_text())["seen"]
    assert 8 <= done < 24
    with pytest.raises(StoreError, match="is incomplete"):
        FeatureStore(out)
    (out / "img_emb" / ".img_emb_0099.npy.1.tmp").write_text("half a file")

    (tmp_path / "encoded.log").unlink()
    sys.modules.pop("slowtower", None)
    monkeypatch.setattr("time.sleep", lambda _: None)
    store = embed(pairs=photos, image_tower="python:slowtower:make", out=out, batch_size=2)
    encoded = sum(int(line) for line in (tmp_path / "encoded.log").read_text().split())
    assert encoded == 24 - done, "nothing that was done is encoded again"
    assert not list(out.rglob("*.tmp"))
    whole = embed(pairs=photos, image_tower=tower_module, out=tmp_path / "undisturbed", batch_size=2)
    assert np.array_equal(store.features(slice(None)), whole.features(slice(None)))
    assert store.metadata.equals(whole.metadata)


def test_unfinished_store_of_other_pairs(photos: Path, tower_module: str, tmp_path: Path) -> None:
    store = embed(pairs=photos, image_tower=tower_module, out=tmp_path / "s")
    facts = json.loads((store.path / "store.json").read_text())
    (store.path / "store.json").write_text(json.dumps(facts | {"complete": False}))
    table = photos / "captions.csv"
    table.write_text(table.read_text().replace("a red bar", "a scarlet bar"))
    with pytest.raises(StoreError, match=r"begun with other pairs"):
        embed(pairs=photos, image_tower=tower_module, out=store.path)


def test_class_tree_and_captionless(class_tree: Path, tower_module: str, tmp_path: Path) -> None:
    store = embed(pairs=class_tree, image_tower=tower_module, out=tmp_path / "s")
    assert store.metadata["label"].to_pylist()[:3] == ["blue"] * 3
    bare = embed(pairs=class_tree / "red", image_tower=tower_module, out=tmp_path / "t")
    with pytest.raises(StoreError, match="has no captions"):
        bare.select()


def test_file_size_limit_keeps_what_is_finished(photos: Path, tower_module: str, tmp_path: Path) -> None:
    """A disk that fills up: one line, exit code 2, and the same command goes on once there is room."""
    out = tmp_path / "s"
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "from litune.cli import main\n"
        "main(sys.argv[1:])"
    )
    command = ["embed", str(photos), "--image-tower", tower_module, "--out", str(out), "--batch-size", "12"]
    full = subprocess.run(
        [quick_python(), "-c", code, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert full.returncode == 2, full.stderr
    assert "the disk is full" in full.stderr
    assert "Traceback" not in full.stderr
    assert not list(out.rglob("*.tmp"))
    assert len(embed(pairs=photos, image_tower=tower_module, out=out, batch_size=12)) == 24


def test_each_of_several_processes_builds_one_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one chooses and keeps what it has built; the others build what it has chosen."""
    from litune import distributed
    from litune.image.runtimes import Runtime
    from litune.store import build

    built: list[tuple[str, str]] = []

    def pick(*_: object, name: str, precision: str, batch_size: int) -> Runtime:
        built.append((name, precision))
        chosen = {"auto": "onnxruntime"}.get(name, name), {"auto": "float32"}.get(precision, precision)
        return Runtime(*chosen, run=lambda pixels: pixels)

    monkeypatch.setattr(build, "pick_runtime", pick)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    config = EmbedConfig(pairs=tmp_path, image_tower="x", out=tmp_path / "s")
    monkeypatch.setattr(distributed, "from_main", lambda function: function())
    first = build._pick_runtime(config, None, [], {})
    assert built == [("auto", "auto")]
    monkeypatch.setattr(distributed, "from_main", lambda function: (first.name, first.precision, 64))
    second = build._pick_runtime(config, None, [], {})
    assert built == [("auto", "auto"), ("onnxruntime", "float32")]
    assert (second.name, second.precision) == (first.name, first.precision)


BROKEN_TOWER = """
import colortower
def encode(pixels):
    found = colortower.encode(pixels)
    red, green, blue = pixels.float().mean((2, 3)).T
    found[red - green - blue > -150] *= {factor}
    return found
def make():
    return encode, colortower.preprocess
"""


@pytest.mark.parametrize(
    ("factor", "dtype", "said"),
    [
        ("float('nan')", "float32", "its features are not finite in torch in float32"),
        ("1e6", "float16", "its features reach 9.9e+05, too much for float16"),
        ("1e6", "float32", None),
    ],
)
def test_pictures_without_usable_features_are_skipped_by_name(
    photos: Path, tower_module: str, tmp_path: Path, factor: str, dtype: str, said: str | None
) -> None:
    (tmp_path / "brokentower.py").write_text(BROKEN_TOWER.format(factor=factor))
    sys.modules.pop("brokentower", None)
    settings = {"pairs": photos, "image_tower": "python:brokentower:make", "store_dtype": dtype, "batch_size": 5}
    if said is None:
        assert len(embed(**settings, out=tmp_path / "s")) == 24
        return
    message = f"red-ring-0.png: {said}; give another --out with --precision float32 and --store-dtype float32, or raise"
    with pytest.raises(DataError, match=re.escape(message)):
        embed(**settings, out=tmp_path / "s")
    store = embed(**settings, out=tmp_path / "s", max_damaged=0.1)  # the same command goes on
    lines = [json.loads(line) for line in (tmp_path / "s" / "damaged.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["red-ring-0.png", "red-ring-1.png"]
    assert lines[0]["reason"] == said
    assert len(store) == 22
    assert np.isfinite(store.features(slice(None))).all()


def test_an_unfinished_store_stays_on_its_kind_of_device(photos: Path, tower_module: str, tmp_path: Path) -> None:
    store = embed(pairs=photos, image_tower=tower_module, out=tmp_path / "s")
    file = store.path / "store.json"
    facts = json.loads(file.read_text())
    assert facts["tower"]["device"] == "cpu"
    file.write_text(json.dumps(facts | {"complete": False, "tower": facts["tower"] | {"device": "cuda"}}))
    with pytest.raises(StoreError, match=r"was made with .* \(device cuda and cpu\): choose another --out"):
        embed(pairs=photos, image_tower=tower_module, out=store.path, device="cpu")
    del facts["tower"]["device"]  # as older stores
    file.write_text(json.dumps(facts | {"complete": False}))
    assert len(embed(pairs=photos, image_tower=tower_module, out=store.path)) == 24


def test_what_was_begun_on_the_processor_goes_on_there(
    photos: Path, tower_module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where there is a GPU, which would be taken for another store."""
    import importlib

    import torch

    module, asked = importlib.import_module("litune.store.embed"), []
    monkeypatch.setattr(module, "pick_device", lambda name: asked.append(name) or torch.device("cpu"))
    store = embed(pairs=photos, image_tower=tower_module, out=tmp_path / "s")
    facts = json.loads((store.path / "store.json").read_text())
    (store.path / "store.json").write_text(json.dumps(facts | {"complete": False}))
    embed(pairs=photos, image_tower=tower_module, out=store.path)
    assert asked == ["auto", "cpu"]
