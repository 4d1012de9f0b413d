from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tests.test_tuning import unlocked

import litune
from litune.config import TuneConfig
from litune.errors import DataError, StoreError
from litune.evaluation.evaluate import evaluate
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
    found = [evaluate(run=unlocked.out, store=s, lang="en")["retrieval"] for s in (unlocked.store, own.path)]
    assert capsys.readouterr().err.count("has the features of another tower") == 1
    for way in ("text_to_image", "image_to_text"):
        assert found[0][way] == found[1][way]
    assert [f["damaged"] for f in found] == [0, 0]
    model = litune.load(unlocked.out)
    files = FeatureStore(unlocked.store).select().image_files
    assert torch.allclose(model.encode_image(files[:3]), model.encode_features(own.features([0, 1, 2])), atol=1e-5)


def test_pictures_that_are_gone(unlocked: TuneConfig) -> None:
    tune.run(unlocked)
    Path(FeatureStore(unlocked.store).select().image_files[3]).unlink()
    with pytest.raises(DataError, match=r"1 of 24 images can't be read .* does not exist.*--max-damaged"):
        evaluate(run=unlocked.out, store=unlocked.store)
    found = evaluate(run=unlocked.out, store=unlocked.store, max_damaged=0.1)["retrieval"]
    assert (found["images"], found["captions"], found["damaged"]) == (23, 69, 1)


def test_a_locked_run_keeps_to_its_stores(tune_config: TuneConfig, unlocked: TuneConfig) -> None:
    tune.run(dataclasses.replace(tune_config, duration="2steps", evaluations=0))
    with pytest.raises(StoreError, match="embed the images with python:colortower:make"):
        evaluate(run=tune_config.out, store=unlocked.store)


def test_compare_lockings(unlocked: TuneConfig, tmp_path: Path) -> None:
    """A table of designs: locked and unlocked towers, measured on one store."""
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
