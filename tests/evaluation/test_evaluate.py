from __future__ import annotations

import dataclasses
from pathlib import Path

import fsspec  # type: ignore[import-untyped]
import pytest
import torch
from tests.test_tuning import unlocked

import litune
from litune.config import TuneConfig
from litune.errors import DataError, StoreError
from litune.evaluation.evaluate import evaluate
from litune.index.search import search
from litune.store import build
from litune.store.embed import embed
from litune.store.store import FeatureStore
from litune.studies.compare import compare
from litune.tuning.tune import tune

__all__ = ["unlocked"]


def test_an_unlocked_run_on_its_start_towers_store(
    unlocked: TuneConfig, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The store's pictures are encoded again with the run's own tower: the figures of a store made with it."""
    tune.run(unlocked)
    own = embed(pairs=photos, image_tower=f"run:{unlocked.out}", out=tmp_path / "own", store_dtype="float32")
    capsys.readouterr()
    stores = (unlocked.store, own.path)
    found = [evaluate(unlocked.out, store=s, lang="en", features=tmp_path / "f")["retrieval"] for s in stores]
    assert capsys.readouterr().err.count("has the features of another tower") == 1
    for way in ("text_to_image", "image_to_text"):
        assert found[0][way] == found[1][way]
    assert [f["damaged"] for f in found] == [0, 0]
    model = litune.load(unlocked.out)
    files = FeatureStore(unlocked.store).select().image_files
    assert torch.allclose(model.encode_image(files[:3]), model.encode_features(own.features([0, 1, 2])), atol=1e-5)


def test_pictures_that_are_gone(unlocked: TuneConfig, tmp_path: Path) -> None:
    tune.run(unlocked)
    Path(FeatureStore(unlocked.store).select().image_files[3]).unlink()
    with pytest.raises(DataError, match=r"1 of 24 images can't be read .* does not exist.*--max-damaged"):
        evaluate(unlocked.out, store=unlocked.store, features=tmp_path / "f")
    found = evaluate(unlocked.out, store=unlocked.store, features=tmp_path / "f", max_damaged=0.1)["retrieval"]
    assert (found["images"], found["captions"], found["damaged"]) == (23, 69, 1)


def test_a_locked_run_keeps_to_its_stores(tune_config: TuneConfig, unlocked: TuneConfig) -> None:
    tune.run(dataclasses.replace(tune_config, duration="2steps", evaluations=0))
    with pytest.raises(StoreError, match="embed the images with python:colortower:make"):
        evaluate(run=tune_config.out, store=unlocked.store)


def test_compare_lockings(unlocked: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of designs: locked and unlocked towers, measured on one store."""
    monkeypatch.setattr("litune.evaluation.evaluate.cache_folder", lambda: tmp_path / "cache")
    (tmp_path / "designs.toml").write_text(
        f"""
        [base]
        store = "{unlocked.store}"
        text_tower = "{unlocked.text_tower}"
        lang = ["en"]
        duration = "2steps"
        batch_size = 6
        evaluations = 0
        precision = "float32"
        device = "cpu"
        """
        + '[grid]\nlocking = ["LU", "UU", "uu"]'
    )
    found = compare(tmp_path / "designs.toml", out=tmp_path / "designs")
    assert not found["failed"]
    assert [len(row["runs"][0]["figures"]) > 0 for row in found["rows"]] == [True] * 3
    assert found["measured_on"]["retrieval"]["images"] == 6


def test_pictures_behind_addresses_are_encoded_again(unlocked: TuneConfig, photos: Path, tmp_path: Path) -> None:
    """A store of pictures elsewhere, evaluated with a run's own tower, gives what one of files gives."""
    tune.run(unlocked)
    fsspec.filesystem("memory").put(f"{photos}/images/", "/again/images/", recursive=True)
    rows = (photos / "captions.csv").read_text().splitlines()
    (tmp_path / "elsewhere.csv").write_text("\n".join([rows[0], *(f"memory://again/images/{row}" for row in rows[1:])]))
    tower = str(FeatureStore(unlocked.store).manifest["tower"]["spec"])
    elsewhere = embed(pairs=tmp_path / "elsewhere.csv", image_tower=tower, out=tmp_path / "elsewhere")
    figures = [
        evaluate(unlocked.out, store=store, features=tmp_path / "f")["retrieval"]
        for store in (unlocked.store, elsewhere.path)
    ]
    for way in ("text_to_image", "image_to_text"):
        assert figures[0][way] == figures[1][way]
    assert len(list((tmp_path / "f").iterdir())) == 2


def test_a_task_on_another_towers_store(unlocked: TuneConfig, class_tree: Path, tmp_path: Path) -> None:
    """Stores of captions and of classes, as tasks or not: a run that has tuned its tower embeds their pictures anew."""
    tune.run(unlocked)
    tower = str(FeatureStore(unlocked.store).manifest["tower"]["spec"])
    tree = embed(pairs=class_tree, image_tower=tower, out=tmp_path / "tree")
    tasks = tmp_path / "my.yaml"
    tasks.write_text(
        f"- name: pairs\n  folder: {unlocked.store}\n  kind: retrieval\n"
        f"- name: kinds\n  folder: {tree.path}\n  templates: ['a {{}} box']\n"
    )
    given = {"store": unlocked.store, "classes": tree.path, "templates": "a {} box", "features": tmp_path / "f"}
    figures = evaluate(unlocked.out, tasks=str(tasks), calibration=False, contamination=False, **given)
    assert not figures["failed"]
    pairs, kinds = figures["tasks"]
    assert pairs["values"]["text_to_image recall@5"] == figures["retrieval"]["text_to_image"]["recall@5"]
    assert kinds["values"]["accuracy"] == figures["zero_shot"]["accuracy"]
    of_files = evaluate(unlocked.out, classes=class_tree, templates="a {} box", features=tmp_path / "f")["zero_shot"]
    assert of_files["accuracy"] == figures["zero_shot"]["accuracy"]


def test_class_folders_are_embedded_once(
    tune_config: TuneConfig, class_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features of --classes are kept in an ordinary store, which others open."""
    tune.run(dataclasses.replace(tune_config, duration="20steps", evaluations=0))
    given = {"classes": class_tree, "features": tmp_path / "f"}
    first = evaluate(tune_config.out, **given)["zero_shot"]
    monkeypatch.setattr(build, "encode_images", None)
    assert evaluate(tune_config.out, **given)["zero_shot"] == first
    (kept,) = (tmp_path / "f").iterdir()
    assert kept.name.startswith("classes-")
    assert FeatureStore(kept).manifest["dtype"] == "float16"
    matches = search(tune_config.out, kept, "a red box", top=3)
    assert {Path(match.path).parent.parent for match in matches} == {class_tree}


def test_class_names_as_they_are(tune_config: TuneConfig, class_tree: Path, tmp_path: Path) -> None:
    """--no-canonical leaves the names of --classes, too."""
    tune.run(dataclasses.replace(tune_config, duration="2steps", evaluations=0))
    (class_tree / "red").rename(class_tree / "Dark-Red")
    for canonical, name in ((True, "darkred"), (False, "Dark-Red")):
        figures = evaluate(tune_config.out, classes=class_tree, canonical=canonical, features=tmp_path / "f")
        assert name in figures["zero_shot"]["class_names"]
