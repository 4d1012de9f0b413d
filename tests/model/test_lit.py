from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import draw

import litune
from litune.config import TuneConfig
from litune.errors import DataError, RunError, TowerError
from litune.model.lit import LiT
from litune.model.run_folder import MANIFEST, load
from litune.store.store import FeatureStore
from litune.tuning.tune import tune


@pytest.fixture
def run(tune_config: TuneConfig) -> Path:
    tune.run(dataclasses.replace(tune_config, duration="12pairs", evaluations=0))
    return tune_config.out


def test_features_have_length_one(run: Path, store: FeatureStore) -> None:
    model = litune.load(run)
    texts = model.encode_text(["a red box", "a blue ring", "a red box"])
    assert texts.dtype == torch.float32
    assert torch.allclose(texts.norm(dim=1), torch.ones(3), atol=1e-6)
    assert torch.equal(texts[0], texts[2])
    images = model.encode_features(store.features(slice(None)))
    assert torch.allclose(images.norm(dim=1), torch.ones(24), atol=1e-6)


def test_pictures_give_the_stores_features(run: Path, store: FeatureStore) -> None:
    """encode_image of a file, of a PIL image, and of the stored features agree (to float16)."""
    model = litune.load(run)
    path = store.metadata["image_path"][5].as_py()
    from_file = model.encode_image(path)
    assert torch.equal(model.encode_image([Image.open(path)]), from_file)
    assert torch.allclose(model.encode_features(store.features([5])), from_file, atol=1e-3)


def test_batching_does_not_matter(run: Path) -> None:
    model = litune.load(run)
    texts = [
        f"{c} {s} {'really ' * i}" for i, (c, s) in enumerate([("red", "box"), ("blue", "bar"), ("green", "ring")] * 5)
    ]
    assert torch.allclose(model.encode_text(texts, batch_size=2), model.encode_text(texts), atol=1e-6)


def test_loading_draws_nothing_at_random(run: Path) -> None:
    one, two = litune.load(run), litune.load(run)
    assert torch.equal(one.encode_text("a red box"), two.encode_text("a red box"))
    assert not one.training


def test_zero_shot_by_hand(run: Path) -> None:
    model = litune.load(run)
    classifier = model.zero_shot(["Red_Box!", "blue ring"], ["a {}", "the {}."])
    assert classifier.templates == ["a {}", "the {}."]
    texts = model.encode_text(["a red box", "the red box", "a blue ring", "the blue ring"]).double()
    expected = []
    for pair in (texts[:2], texts[2:]):
        mean = (pair[0] + pair[1]) / 2
        expected.append(mean / mean.norm())
    assert torch.allclose(classifier.weights.double(), torch.stack(expected), atol=1e-6)
    features = torch.nn.functional.normalize(torch.randn(3, model.dim))
    scores = features.double() @ torch.stack(expected).T
    scale = model.logit_scale.detach().double().exp()
    assert torch.allclose(classifier.probabilities(features).double(), (scale * scores).softmax(1), atol=1e-5)
    probabilities = classifier([draw("red", "box"), draw("blue", "ring")])
    assert probabilities.shape == (2, 2)
    assert torch.allclose(probabilities.sum(1), torch.ones(2))


def test_another_image_tower_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "othertower.py").write_text(
        "from colortower import encode, preprocess\ndef make():\n    return encode, preprocess"
    )
    with pytest.raises(
        TowerError,
        match=r"the run was made with .*colortower:make, not with .*othertower:make \(weights .*: name the run's own",
    ):
        litune.load(run, image_tower="python:othertower:make").encode_image(draw("red", "box"))


def test_bad_input(run: Path, tmp_path: Path) -> None:
    model = litune.load(run)
    with pytest.raises(DataError, match="a text is 3, expected a string"):
        # Past the tests' own type checks, which look at one random item of a list.
        inspect.unwrap(LiT.encode_text)(model, ["a", 3])
    with pytest.raises(DataError, match=r"shape \(2, 3\), expected \[images, 48\]"):
        model.encode_features(np.zeros((2, 3)))
    with pytest.raises(DataError, match=r"nothing.png can't be read: No such file"):
        model.encode_image(tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"text.png can't be read: not an image"):
        model.encode_image(tmp_path / "text.png")
    with pytest.raises(DataError, match="at least one class name"):
        model.zero_shot([])


def test_damaged_runs(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no run"):
        load(tmp_path / "nothing")
    with pytest.raises(RunError, match="it is not a run folder"):
        load(tmp_path)
    weights = run / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RunError, match="is damaged"):
        load(run)
    weights.unlink()
    with pytest.raises(RunError, match=r"model.safetensors is missing"):
        load(run)
    weights.write_bytes(whole)
    manifest = (run / MANIFEST).read_text()
    (run / MANIFEST).write_text(manifest.replace('"format": 1', '"format": 7', 1))
    with pytest.raises(RunError, match="run format 7, this litune reads 1"):
        load(run)
