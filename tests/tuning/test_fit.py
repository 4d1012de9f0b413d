"""`litune fit` and tuning that starts from it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import interrupt, random_store

import litune
from litune.config import FitConfig, TuneConfig, to_json
from litune.errors import ConfigError, OutputExistsError
from litune.model.build import make_model, make_tokenizer
from litune.model.run_folder import load
from litune.store.selection import choose_mixture
from litune.store.store import FeatureStore
from litune.text.registry import parse_text_spec
from litune.tuning.closed_form import Moments, Sums, cca
from litune.tuning.fit import fit
from litune.tuning.start import FEW, SCALES, HeldOutPairs, encode, set_heads
from litune.tuning.tune import tune
from litune.vectors import normalize


@pytest.fixture
def fit_config(store: FeatureStore, tiny_bert: Path, tmp_path: Path) -> FitConfig:
    return FitConfig(store.path, f"hf:{tiny_bert}", tmp_path / "fitted", lang=("en",), max_tokens=16, device="cpu")


@pytest.mark.parametrize("method", ["cca", "ridge", "procrustes"])
def test_a_fit_is_a_run(fit_config: FitConfig, method: str) -> None:
    """It is opened as any other, and its heads are the only thing that is not as it was before."""
    model = fit.run(dataclasses.replace(fit_config, method=method))
    manifest = json.loads((fit_config.out / "manifest.json").read_text())
    assert manifest["fit"]["method"] == method
    assert manifest["steps"] == 0
    assert manifest["tuned_on"] == {"split": "train", "images": 18, "captions": 36, "held_out_images": 6}
    assert manifest["held_out"]["captions"] == 12
    assert manifest["model"]["image_head"] == ("none" if method == "ridge" else "linear")
    again = load(fit_config.out, device="cpu")
    assert torch.equal(again.encode_text("a red circle"), model.encode_text("a red circle"))
    figures = litune.eval(fit_config.out, store=fit_config.store, split="val", lang=("en",), device="cpu")
    assert figures["retrieval"]["text_to_image"] == manifest["held_out"]["text_to_image"]


def test_heads_are_those_of_a_reference(fit_config: FitConfig) -> None:
    """The run's scores are those of the formula, in float64, on the towers' own vectors."""
    config = dataclasses.replace(fit_config, image_shrinkage=1.0, text_shrinkage=0.5)
    model = fit.run(config)
    pairs = FeatureStore(config.store).select("train", lang=["en"])
    images = pairs.features().astype(np.float64)
    texts = encode(model, pairs.captions, bfloat16=False).astype(np.float64)
    x, t = np.repeat(images, pairs.counts, axis=0), texts
    mean_x, mean_t = x.mean(0), t.mean(0)
    xx, tt, xt = ((a - a.mean(0)).T @ (b - b.mean(0)) / len(a) for a, b in ((x, x), (t, t), (x, t)))

    def root(covariance: np.ndarray, shrinkage: float) -> np.ndarray:
        values, vectors = np.linalg.eigh(covariance)
        return (vectors / np.sqrt(np.maximum(values, 0) + shrinkage * values.mean())) @ vectors.T

    left, weights, right = np.linalg.svd(root(xx, 1.0) @ xt @ root(tt, 0.5), full_matrices=False)
    a, b = (images - mean_x) @ root(xx, 1.0) @ left * weights, (texts - mean_t) @ root(tt, 0.5) @ right.T * weights
    a, b = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (a, b))
    found = model.encode_features(images.astype(np.float32)) @ model.encode_text(pairs.captions).T
    assert np.allclose(found.numpy(), a @ b.T, atol=2e-3)


@pytest.mark.parametrize("image_map", ["none", "center", "whiten"])
def test_heads_fold_the_fixed_map_in(
    store: FeatureStore, tune_config: TuneConfig, image_map: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(tune_config, start="fit", image_map=image_map)
    train, _ = choose_mixture([store], config)
    spec = parse_text_spec(config.text_tower)
    model = make_model(train, spec, make_tokenizer(spec, config, ()), config)
    random = np.random.default_rng(0)
    texts = random.normal(size=(len(train), model.text.width))
    sums = Sums(store.width, model.text.width)
    sums.add(train.features(), texts, np.ones(len(train), int))
    maps = cca(Moments(sums), 0.5, 0.5).weighted(1.0, 0.0)
    set_heads(model, maps)
    assert maps.image is not None
    expected = normalize(torch.from_numpy((train.features() - maps.image_mean) @ maps.image))
    found = model.encode_features(train.features())
    assert torch.allclose(found[:, : expected.shape[1]], expected.float(), atol=1e-4)


def test_texts_are_encoded_once(fit_config: FitConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later fits read the texts' vectors from the store's folder, with the same result."""
    first = fit.run(fit_config)

    def refuse(*args: object, **more: object) -> np.ndarray:
        raise AssertionError("texts were encoded again")

    monkeypatch.setattr("litune.tuning.start.encode", refuse)
    again = fit.run(dataclasses.replace(fit_config, out=tmp_path / "again"))
    assert torch.equal(first.text_head.weight, again.text_head.weight)
    with pytest.raises(AssertionError, match="again"):
        fit.run(dataclasses.replace(fit_config, out=tmp_path / "longer", max_tokens=12))


def test_tuning_starts_where_a_fit_ends(tune_config: TuneConfig, tmp_path: Path) -> None:
    """Before the first step the model has the fit's heads, whatever is tuned from there; and it goes on from a fit."""
    still = {"learning_rate": 1e-12, "weight_decay": 0.0, "duration": "1steps", "max_tokens": 16}
    config = dataclasses.replace(tune_config, start="fit", **still)
    tuned = tune.run(config)
    assert tuned.image_head.weight.shape[0] == 17 < min(tuned.image_width, tuned.text.width)  # 18 images
    random = tune.run(dataclasses.replace(config, start="random", out=tmp_path / "random"))
    assert random.image_head.state_dict() == {}
    place = tmp_path / "fit"
    fitted = fit.run(FitConfig(config.store, config.text_tower, place, lang=("en",), device="cpu", max_tokens=16))
    going_on = {"text_tower": f"run:{place}", "image_head": "linear", "dim": fitted.dim, "out": tmp_path / "on"}
    tuned = tune.run(dataclasses.replace(config, start="auto", **going_on))
    texts = ["a red circle", "a blue square"]
    assert torch.allclose(tuned.encode_text(texts), fitted.encode_text(texts), atol=1e-4)


def test_tuning_adds_to_the_fit(tune_config: TuneConfig, capsys: pytest.CaptureFixture[str]) -> None:
    config = dataclasses.replace(tune_config, start="fit", duration="240pairs", learning_rate=1e-3)
    tune.run(config)
    assert "18 images are few: `litune fit` alone is about as good" in capsys.readouterr().err
    lines = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


def test_features_are_dropped_in_steps_alone(tune_config: TuneConfig, tmp_path: Path) -> None:
    """From a fit by default; what is evaluated has all of them."""
    still = {"learning_rate": 1e-12, "weight_decay": 0.0, "duration": "1steps", "start": "fit", "dropout": 0.0}
    losses, evaluated = [], []
    for name, dropout in (("default", None), ("same", 0.3), ("none", 0.0)):
        tune.run(dataclasses.replace(tune_config, **still, feature_dropout=dropout, out=tmp_path / name))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append(lines[0]["loss"])
        evaluated.append(lines[-1]["val"])
    assert losses[0] == losses[1] > losses[2]
    assert evaluated[0] == evaluated[1] == evaluated[2]


def test_an_interrupted_start_is_made_again(
    tune_config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the first checkpoint, and after one, a run ends with the bytes of one that was not."""
    config = dataclasses.replace(tune_config, start="fit", checkpoint_seconds=0.0, duration="60pairs")
    tune.run(config)
    whole = load_file(config.out / "model.safetensors")
    settings = json.loads((config.out / "manifest.json").read_text())["fit"]
    assert settings["method"] == "cca"
    for name, step in (("early", 0), ("late", 4)):
        again = dataclasses.replace(config, out=tmp_path / name)
        if step:
            interrupt(step, again, monkeypatch)
        else:
            again.out.mkdir()
            (again.out / "config.json").write_text(json.dumps(to_json(again)))
        tune.run(again)
        found = load_file(again.out / "model.safetensors")
        assert all(torch.equal(found[key], value) for key, value in whole.items())
        assert json.loads((again.out / "manifest.json").read_text())["fit"] == settings


def test_several_stores_are_fitted_together(fit_config: FitConfig, tmp_path: Path) -> None:
    """Two stores of half the pairs each give what one store of all gives."""
    for name in ("one", "two"):
        random_store(tmp_path / name, 40, 12, captions=2)
    settings = {"text_tower": fit_config.text_tower, "holdout": 0.0, "device": "cpu", "max_tokens": 16}
    twice = litune.fit(tmp_path / "one", out=tmp_path / "a", more_stores=[tmp_path / "two"], **settings)
    once = litune.fit(tmp_path / "one", out=tmp_path / "b", **settings)
    assert torch.allclose(twice.center, once.center, atol=1e-5)
    assert (tmp_path / "two" / "text_emb").is_dir()


def test_what_stands_in_the_way(fit_config: FitConfig, tune_config: TuneConfig, tmp_path: Path) -> None:
    fit.run(fit_config)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        fit.run(fit_config)
    fit.run(dataclasses.replace(fit_config, overwrite=True))
    with pytest.raises(ConfigError, match="needs a text tower that is pre-trained: use --start random"):
        tune.run(dataclasses.replace(tune_config, start="fit", text_tower="vit:Ti"))
    with pytest.raises(ConfigError, match="makes linear heads"):
        tune.run(dataclasses.replace(tune_config, start="fit", image_head="mlp"))
    with pytest.raises(ConfigError, match="--dim 1000 is more than the"):
        fit.run(dataclasses.replace(fit_config, dim=1000, out=tmp_path / "other"))


@pytest.mark.parametrize(("images", "chosen_on"), [(150, None), (250, 5 * 25), (1600, 3 * 160)])
def test_on_how_many_images_settings_are_chosen(
    images: int, chosen_on: int | None, tiny_bert: Path, tmp_path: Path
) -> None:
    """On several tenths where a tenth is few; on none where it is next to nothing."""
    random_store(tmp_path / "store", images, 12, captions=2)
    litune.fit(tmp_path / "store", f"hf:{tiny_bert}", tmp_path / "run", holdout=0.0, device="cpu", max_tokens=16)
    settings = json.loads((tmp_path / "run" / "manifest.json").read_text())["fit"]
    assert settings.get("chosen_on_images") == chosen_on
    if chosen_on is None:
        assert settings["image_shrinkage"] == FEW[0]


def test_the_scale_has_the_lowest_loss() -> None:
    """Of features that agree only roughly, a low scale; of such as are far apart, the highest."""
    random = np.random.default_rng(0)
    images = random.normal(size=(50, 8))
    owner = np.arange(50)
    sums = Sums(8, 8)
    sums.add(images, images, np.ones(50, int))
    maps = cca(Moments(sums), 0.0, 0.0).weighted(0.0, 0.0)
    assert HeldOutPairs(images, images, owner).scale(maps) == SCALES[-1]
    assert HeldOutPairs(images, images + 2 * random.normal(size=images.shape), owner).scale(maps) < 16


def test_pairs_without_anything_in_common(tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal features give no direction: a fit says so in a line, and tuning begins at random."""
    store = random_store(tmp_path / "store", 1, 4)
    features = store.path / "img_emb" / "img_emb_0000.npy"
    one = random_store(tmp_path / "equal", 30, 4)
    np.save(one.path / "img_emb" / features.name, np.ones((30, 4), np.float16))
    tower = {"text_tower": f"hf:{tiny_bert}", "holdout": 0.0, "device": "cpu"}
    with pytest.raises(ConfigError, match="nothing in common that varies"):
        litune.fit(one.path, out=tmp_path / "fit", **tower)
    litune.tune(one.path, out=tmp_path / "run", duration="2steps", evaluations=0, **tower)
    assert "heads begin at random" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="contrastive tuning needs two or more"):
        litune.fit(store.path, out=tmp_path / "lone", **tower)


def test_a_fit_keeps_a_bank_and_decides(tiny_bert: Path, tmp_path: Path) -> None:
    """The bank's features are those of the run, half as wide; whether it is used follows from the held-out recalls."""
    store = random_store(tmp_path / "store", 900, 12, captions=2)
    config = FitConfig(
        store.path, f"hf:{tiny_bert}", tmp_path / "fitted", image_shrinkage=1.0, text_shrinkage=0.1, device="cpu"
    )
    model = fit.run(config)
    manifest = json.loads((config.out / "manifest.json").read_text())
    facts = manifest["hub_correction"]
    assert facts["bank"] == {"captions": 1710, "images": 855}
    for way in ("text_to_image", "image_to_text"):
        assert facts["held_out"]["bare"][way] == manifest["held_out"][way]
    means = {
        name: [np.mean(list(figures[way].values())) for way in ("text_to_image", "image_to_text")]
        for name, figures in facts["held_out"].items()
    }
    assert facts["on"] == all(np.greater(means["corrected"], means["bare"]))
    assert (model.bank is not None) == facts["on"]
    kept = load_file(config.out / "bank.safetensors")
    train, _ = choose_mixture([store], TuneConfig(store.path, "", tmp_path))
    assert kept["texts"].dtype == torch.float16
    assert torch.allclose(kept["texts"].float(), model.encode_text(train.captions), atol=1e-3)
    assert torch.equal(kept["images"], model.encode_features(train.features()).half())
    for on in (True, False):
        manifest["hub_correction"]["on"] = on
        (config.out / "manifest.json").write_text(json.dumps(manifest))
        assert (load(config.out, device="cpu").bank is not None) == on


def test_too_few_captions_make_no_bank(fit_config: FitConfig) -> None:
    model = fit.run(fit_config)
    assert model.bank is None
    assert not (fit_config.out / "bank.safetensors").exists()
    assert "hub_correction" not in json.loads((fit_config.out / "manifest.json").read_text())
