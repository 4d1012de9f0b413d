"""Every command that computes, on a pretend GPU: the figures that the processor finds."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import COLORS, draw
from tests.gpu.conftest import World
from tests.pretend_cuda import PretendGPU, pretend
from tests.studies.test_probe import worded_store

import litune
from litune.config import ServeConfig
from litune.index.index import Index
from litune.pairs.pairs import read_pairs
from litune.serve.serve import describe, open_images
from litune.studies import probe as probe_module


def on_both(command: Callable[[str], Any]) -> tuple[Any, Any, PretendGPU]:
    """What a command finds on the pretend GPU and on the processor."""
    with pretend() as gpu:
        ours = command("cuda")
    return ours, command("cpu"), gpu


def test_load_and_encode(world: World, gpu: PretendGPU) -> None:
    """Features are on the processor, those that it finds itself."""
    model, same = litune.load(world.run), litune.load(world.run, device="cpu")
    assert model.logit_scale.device.type == "cuda"
    texts, pictures = ["a red box", "the ring is blue, really", "x"], [draw("red", "box"), draw("blue", "ring")]
    for ours, theirs in (
        (model.encode_text(texts), same.encode_text(texts)),
        (model.encode_image(pictures), same.encode_image(pictures)),
        (model.zero_shot(["red", "blue"])(pictures), same.zero_shot(["red", "blue"])(pictures)),
    ):
        assert ours.device.type == "cpu"
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("text_precision", ["float32", "bfloat16"])
def test_eval_tasks(text_precision: str, world: World, class_tree: Path, tmp_path: Path) -> None:
    sets = tmp_path / "sets"
    (sets / "cifar10").mkdir(parents=True)
    class_tree.rename(sets / "cifar10" / "test")
    settings: dict[str, Any] = {"probes": True, "kshot": 2, "contamination": False, "text_precision": text_precision}

    def measure(device: str) -> Any:
        found = litune.eval(
            world.run, tasks="cifar10", data=sets, features=tmp_path / device, device=device, **settings
        )
        return found["tasks"][0]

    (sets / "cifar10" / "train").symlink_to(sets / "cifar10" / "test", target_is_directory=True)
    ours, theirs, _ = on_both(measure)
    assert ours["values"].keys() == theirs["values"].keys()
    for name, value in ours["values"].items():
        assert value == pytest.approx(theirs["values"][name], abs=1e-4 if text_precision == "float32" else 0.2), name


def test_eval_of_a_store_and_classes(world: World, class_tree: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"store": world.store, "classes": class_tree, "by_lang": True}

    def measure(device: str) -> Any:
        return litune.eval(world.run, features=tmp_path / device, device=device, **settings)

    ours, theirs, _ = on_both(measure)
    for part in ("retrieval", "zero_shot"):
        numbers = {name: value for name, value in theirs[part].items() if isinstance(value, float)}
        assert numbers == pytest.approx({name: ours[part][name] for name in numbers}, abs=1e-6)
    assert ours["retrieval"]["text_to_image"] == theirs["retrieval"]["text_to_image"]


def test_classify(world: World) -> None:
    images = sorted((world.photos / "images").glob("*.png"))[:5]
    ours, theirs, _ = on_both(lambda device: litune.classify(world.run, images, labels=tuple(COLORS), device=device))
    for one, other in zip(ours, theirs, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)


@pytest.mark.parametrize("settings", [
    {"query": "a red box"}, {"query": "at night", "image": "picture"}, {"query": "a blue ring", "captions": True},
    {"query": "a red box", "index": "approximate"},
    {"query": "a red box", "where": ("split=val",), "sheet": "sheet.png"},
])  # fmt: skip
def test_search(settings: dict[str, Any], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if settings.get("index"):
        pytest.importorskip("faiss")
        monkeypatch.setattr(Index, "file", tmp_path / "index", raising=False)
    picture = tmp_path / "picture.png"
    draw("green", "ring").save(picture)
    given = {**settings, **({"image": picture} if "image" in settings else {})}

    def look(device: str) -> Any:
        sheet = {"sheet": tmp_path / f"{device}.png"} if "sheet" in given else {}
        return litune.search(world.run, world.store, device=device, **{**given, **sheet})

    ours, theirs, _ = on_both(look)
    scores = [[one.score for one in found] for found in (ours, theirs)]
    assert len(scores[0]) == 5
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)


def test_index_with_queries_on_the_card(world: World, gpu: PretendGPU) -> None:
    """A query's feature may be wherever the model is."""
    model, index = litune.load(world.run), Index(world.store)
    query = model.encode_text("a red box")[0]
    expected = index.search(model, image=query)
    found = index.search(model, image=query.to("cuda"))
    assert [one.key for one in found] == [one.key for one in expected]


def test_probe(tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "MEASURE_SECONDS", 0.01)
    monkeypatch.setattr(probe_module, "pick_bfloat16", lambda *_: False)
    store = worded_store(tmp_path / "store", 0.5, images=160).path

    def look(device: str) -> Any:
        return litune.probe(stores=[store], text_tower=f"hf:{tiny_bert}", device=device)["stores"][0]

    ours, theirs, _ = on_both(look)
    assert ours["figures"] == pytest.approx(theirs["figures"], abs=0.02)
    assert ours["tuning"]["pairs_per_second"] > 0


def test_serve(world: World, gpu: PretendGPU) -> None:
    """Texts, pictures, classes and searches, encoded by the server's own thread."""
    pytest.importorskip("starlette")
    from starlette.testclient import TestClient

    from litune.serve.app import make_app
    from litune.serve.engine import Engine

    model, same = litune.load(world.run), litune.load(world.run, device="cpu")
    config = ServeConfig(run=world.run)
    index = open_images(world.run, world.store, model, config.index)
    engine = Engine(model, index, config, "run", describe(world.run, model))
    picture = io.BytesIO()
    draw("red", "ring").save(picture, "PNG")
    try:
        client = TestClient(make_app(engine))
        found = client.post("/v1/encode/text", json={"texts": ["a red box", "x"]}).json()["features"]
        assert np.allclose(found, same.encode_text(["a red box", "x"]).numpy(), atol=1e-5)
        answer = client.post("/v1/encode/image", files=[("images", ("a.png", picture.getvalue(), "image/png"))])
        assert answer.status_code == 200, answer.text
        assert client.post("/v1/search", json={"text": "a red box", "top": 3}).status_code == 200
        assert client.get("/v1/model").json()["temperature"] == pytest.approx(float(same.scale.detach()))
    finally:
        engine.stop()


def test_filter_by_agreement(world: World, tmp_path: Path) -> None:
    def keep(device: str) -> Any:
        litune.filter_data(
            pairs=str(world.store), agree=world.run, min_agreement=0.0, out=tmp_path / f"{device}.jsonl", device=device
        )
        return read_pairs(tmp_path / f"{device}.jsonl").table["captions"].to_pylist()

    ours, theirs, _ = on_both(keep)
    assert ours == theirs


@pytest.mark.parametrize("target", ["npz", "hf"])
def test_export(target: str, world: World, tmp_path: Path, gpu: PretendGPU) -> None:
    """Exports compute on the processor, also where there is a GPU."""
    try:
        about = litune.export(world.run, to=target, out=tmp_path / "out")
    except litune.LituneError as why:  # what a target can't express is said before anything is computed
        pytest.skip(str(why))
    assert about["complete"]


def test_mps(world: World, tiny_bert: Path, tmp_path: Path) -> None:
    """Apple's device knows no float64 and no pinned memory: embed, tune, eval and search once."""
    with pretend("mps") as device:
        store = litune.embed(pairs=world.photos, image_tower=world.tower, out=tmp_path / "store")
        litune.tune.run(world.config(tmp_path / "run", tiny_bert, optimizer="adafactor", loss="sigmoid"))
        found = litune.eval(world.run, store=world.store)
        best = litune.search(world.run, store.path, "a red box")
    assert device.peak > 0
    assert found["retrieval"]["images"] == 24
    assert len(best) == 5
