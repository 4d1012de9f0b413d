"""That each setting of the loop does what it says, and that an interruption leaves no trace."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import COLORS, draw, interrupt
from tests.forked import quick_python, wait_until_gone
from torch import nn

import litune
from litune.config import TuneConfig
from litune.errors import ConfigError, MissingExtraError, RunError, StoreError, TowerError
from litune.evaluation.evaluate import evaluate
from litune.model.build import make_model, make_tokenizer, text_spec
from litune.model.lit import LiT
from litune.model.run_folder import check_store, load, load_tensors, model_state
from litune.schedules import rate_share
from litune.store.embed import embed
from litune.store.selection import choose_pairs
from litune.store.store import FeatureStore
from litune.text.registry import HfTextTower, TextTower
from litune.text.vocabulary import TunedRows
from litune.towers.locking import train_unlocked
from litune.tuning.batches import Batch
from litune.tuning.batching import evaluation_steps
from litune.tuning.inputs import Inputs
from litune.tuning.losses import softmax_loss
from litune.tuning.optim import make_optimizer
from litune.tuning.run import Tuning
from litune.tuning.step import Reading
from litune.tuning.tune import tune


@pytest.fixture
def short(tune_config: TuneConfig) -> TuneConfig:
    """Ten steps, nothing held out is evaluated, no dropout."""
    return dataclasses.replace(tune_config, duration="10steps", evaluations=0, dropout=0.0)


@pytest.fixture
def unlocked(photos: Path, tune_config: TuneConfig, tmp_path: Path) -> TuneConfig:
    """Four steps with a small ResNet as the image tower, from a checkpoint of random weights."""
    import timm

    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=0).state_dict(), tmp_path / "resnet.pth")
    spec = f"timm:test_resnet?checkpoint={tmp_path / 'resnet.pth'}&size=32"
    store = embed(pairs=photos, image_tower=spec, out=tmp_path / "pixels", device="cpu")
    return dataclasses.replace(
        tune_config, store=store.path, duration="4steps", learning_rate=TuneConfig.learning_rate, locking="UU"
    )


def start(config: TuneConfig) -> Tuning:
    """The run of a config before its first step."""
    store, spec = FeatureStore(config.store), text_spec(config)
    train, val = choose_pairs(store, config)
    torch.manual_seed(config.seed)
    tokenizer = make_tokenizer(spec, config, train.captions)
    model = make_model(train, spec, tokenizer, config)
    return Tuning(config, train, val, model, torch.device("cpu"))


def first_batch(run: Tuning) -> Batch:
    return next(run.batches.from_step(0, 1))


def first_inputs(run: Tuning) -> Inputs:
    return run.prepare(0, first_batch(run), run.micro)


def facts_of(reading: Reading | None) -> dict[str, Any]:
    assert reading is not None
    return reading.facts()


def take_steps(run: Tuning, count: int) -> list[dict[str, float]]:
    facts = []
    for inputs in run.inputs(run.progress.step):
        facts.append(facts_of(run.step(inputs)))
        run.progress.step += 1
        if len(facts) == count:
            break
    return facts


def bytes_of(run: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in load_file(run / "model.safetensors").items()}


def state_of(model: LiT) -> dict[str, bytes]:
    return {name: value.clone().numpy().tobytes() for name, value in model_state(model).items()}


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# Locking


@pytest.mark.parametrize("locking", ["Lu", "LU", "Uu", "UU", "uU", "uu", "uL", "UL", "LL"])
def test_locking(locking: str, unlocked: TuneConfig, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is locked keeps its bytes, all else moves, and the run's folder alone gives the tuned model's features."""
    config = dataclasses.replace(unlocked, locking=locking)
    picture = draw("red", "ring")
    seen: dict[str, Any] = {}
    fit = Tuning.fit

    def watching(self: Tuning) -> None:
        seen["before"] = state_of(self.model)
        fit(self)
        seen["after"] = state_of(self.model)
        seen["text"] = self.model.encode_text(["a red box"])
        if self.model.image_tuned:
            seen["image"] = self.model.encode_image(picture)

    monkeypatch.setattr(Tuning, "fit", watching)
    tune.run(config)
    moved = {name: seen["before"][name] != after for name, after in seen["after"].items()}
    image = [value for name, value in moved.items() if name.startswith("image.")]
    text = [value for name, value in moved.items() if name.startswith("text.")]
    assert len(image) > 0 if locking[0] != "L" else not image
    assert all(image), [name for name in moved if name.startswith("image.") and not moved[name]]
    assert any("running_var" in name for name in moved) == (locking[0] != "L")
    assert not any(text) if locking[1] == "L" else np.mean(text) > 0.9
    assert all(moved[name] for name in moved if name.startswith(("text_head.", "image_head.", "logit_")))
    assert ("image_head.weight" in moved) == (locking[0] != "L")

    (config.out.parent / "resnet.pth").unlink()  # where the image tower was tuned, its weights are in the run
    model = litune.load(config.out, device="cpu")
    assert torch.equal(model.encode_text(["a red box"]), seen["text"])
    if locking[0] == "L":
        check_store(config.out, model, FeatureStore(config.store).made_with)
        return
    assert torch.equal(model.encode_image(picture), seen["image"])
    old = FeatureStore(config.store)
    with pytest.raises(StoreError, match=f"weights .* embed the images with run:{config.out}"):
        check_store(config.out, model, old.made_with)
    if locking != "UU":
        return
    new = embed(pairs=photos, image_tower=f"run:{config.out}", out=config.out.parent / "new", device="cpu")
    found = evaluate(run=config.out, store=new.path, split="val", lang="en", device="cpu")["retrieval"]
    assert found["images"] == 6
    with pytest.raises(ConfigError, match="can't be tuned further: name one with --image-tower"):
        tune.run(dataclasses.replace(config, store=new.path, out=config.out.parent / "again"))


def test_locking_wants_what_there_is(unlocked: TuneConfig, tune_config: TuneConfig) -> None:
    with pytest.raises(ConfigError, match="--locking LU wants a pre-trained text tower"):
        tune.run(dataclasses.replace(unlocked, locking="LU", text_tower="vit:Ti"))
    with pytest.raises(ConfigError, match="--locking UU wants a pre-trained image tower"):
        tune.run(dataclasses.replace(unlocked, image_tower="timm:test_resnet?init=random"))
    with pytest.raises(ConfigError, match="two letters"):
        dataclasses.replace(unlocked, locking="UX")
    with pytest.raises(ConfigError, match="--flip is for an unlocked image tower"):
        dataclasses.replace(tune_config, flip=True)
    with pytest.raises(TowerError, match="can't be unlocked"):
        tune.run(dataclasses.replace(tune_config, locking="UU"))
    with pytest.raises(ConfigError, match="everything is locked"):
        tune.run(dataclasses.replace(tune_config, rates=("text*=0",)))


def test_locked_parts_stay_in_eval_mode(unlocked: TuneConfig) -> None:
    """Also after an evaluation, which puts all of the model in eval mode for a while."""
    run = start(dataclasses.replace(unlocked, locking="UL", dropout=0.5, rates=("image.*layer1*=0",)))
    assert run.model.image is not None
    run.model.train()
    train_unlocked(run.model)
    before = {name: part.training for name, part in run.model.named_modules()}
    assert not before["text"]
    assert not before["image.network.model.layer1"]
    assert before["image.network.model.layer2"]
    assert before["text_head"]
    run.evaluate()
    assert {name: part.training for name, part in run.model.named_modules()} == before
    assert not any(name.startswith("text.") for group in run.optimizer.param_groups for name in group["names"])


@pytest.mark.parametrize("unlock", ["after:50%", "cycles:2", "ramp:50%"])
def test_unlocking(unlocked: TuneConfig, unlock: str) -> None:
    """Until it is unlocked the image tower keeps its bytes, running statistics included, and is in eval mode."""
    run = start(dataclasses.replace(unlocked, unlock=unlock, duration="8steps"))
    train_unlocked(run.model)
    assert run.model.image is not None
    locked = {"after:50%": {0, 1, 2, 3}, "cycles:2": {0, 1, 4, 5}, "ramp:50%": {0, 1, 2}}[unlock]
    for step in range(8):
        before = state_of(run.model)
        take_steps(run, 1)
        moved = {name.split(".")[0] for name, value in state_of(run.model).items() if value != before[name]}
        assert ("image" not in moved) == (step in locked), step
        assert {"text", "image_head", "text_head"} <= moved
        assert run.model.image.training == (step not in locked)


def test_interrupted_while_unlocked_late(unlocked: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after the image tower is unlocked, with micro-batches, crops, flips and dropout."""
    config = dataclasses.replace(
        unlocked, duration="6steps", unlock="after:50%", micro_batch=4, flip=True, checkpoint_seconds=0.0
    )
    tune.run(config)
    broken = dataclasses.replace(config, out=tmp_path / "broken")
    for stop_at in (1, 3, 5):
        interrupt(stop_at, broken, monkeypatch)
    tune.run(broken)
    assert bytes_of(broken.out) == bytes_of(config.out)
    assert bytes_of(broken.out / "best") == bytes_of(config.out / "best")


# Learning rates, optimizers, schedules


def test_rates(short: TuneConfig) -> None:
    """0 locks, the first pattern that matches counts, and the groups hold rate and the paper's decay."""
    rates = ("text.*layer.0.*=0", "text.*attention*=0.25", "text.*=0.5", "logit_scale=3")
    run = start(dataclasses.replace(short, rates=rates, head_rate=2.0, weight_decay=0.01))
    peaks = {n: g["peak"] for g in run.optimizer.param_groups for n in g["names"]}
    decays = {n: g["peak"] * g["weight_decay"] for g in run.optimizer.param_groups for n in g["names"]}
    rate = short.learning_rate
    assert not any("layer.0." in name for name in peaks)
    assert peaks["text.model.encoder.layer.1.attention.self.query.weight"] == 0.25 * rate
    assert peaks["text.model.encoder.layer.1.output.dense.bias"] == 0.5 * rate
    assert peaks["text_head.weight"] == 2 * rate
    assert peaks["logit_scale"] == 3 * rate
    assert decays["text_head.weight"] == pytest.approx(0.01)
    assert decays["text.model.encoder.layer.1.output.dense.weight"] == pytest.approx(0.01)
    for name in ("text_head.bias", "logit_scale", "text.model.embeddings.word_embeddings.weight"):
        assert decays[name] == 0
    before = state_of(run.model)
    take_steps(run, 3)
    moved = {name for name, value in state_of(run.model).items() if value != before[name]}
    assert moved <= peaks.keys()
    with pytest.raises(ConfigError, match=r"no parameter's name matches 'txt\.\*'; names are as .*text"):
        start(dataclasses.replace(short, rates=("txt.*=0",)))


def test_decay_does_not_depend_on_the_learning_rate(short: TuneConfig) -> None:
    """At a learning rate of next to nothing, weights still shrink by the decay times the schedule (METHOD, 6)."""
    config = dataclasses.replace(short, learning_rate=1e-12, weight_decay=0.1, schedule="constant", warmup="2steps")
    run = start(config)
    before = run.model.text_head.weight.detach().clone()
    take_steps(run, 3)  # shares of the peak: 1/2, 1, 1
    assert torch.allclose(run.model.text_head.weight, before * 0.95 * 0.9 * 0.9, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["lion", "adafactor"])
def test_optimizers_go_on(short: TuneConfig, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(short, optimizer=optimizer, learning_rate=1e-3, checkpoint_seconds=0.0)
    tune.run(config)
    broken = dataclasses.replace(config, out=tmp_path / "broken")
    for stop_at in (1, 6):
        interrupt(stop_at, broken, monkeypatch)
    tune.run(broken)
    assert bytes_of(broken.out) == bytes_of(config.out)
    losses = [line["loss"] for line in log_of(config.out)]
    assert losses[-1] < losses[0]


SCHEDULES: list[dict[str, Any]] = [
    {"schedule": "cosine", "warmup": "20%"},
    {"schedule": "constant", "warmup": "12pairs", "cooldown": "30%"},
    {"schedule": "rsqrt", "warmup": "1epochs", "timescale": "2steps"},
]


@pytest.mark.parametrize("settings", SCHEDULES)
def test_schedules(short: TuneConfig, settings: dict[str, Any]) -> None:
    """The logged learning rates are the schedule's; three steps are an epoch here, six pairs a step."""
    config = dataclasses.replace(short, **settings)
    tune.run(config)
    found = [line["learning_rate"] / config.learning_rate for line in log_of(config.out)]
    lengths = {"20%": 2, "12pairs": 2, "1epochs": 3}
    expected = [
        rate_share(
            step,
            10,
            warmup=lengths[config.warmup],
            decay=config.schedule,
            timescale=2,
            cooldown=3 if config.cooldown == "30%" else 0,
        )
        for step in range(10)
    ]
    assert found == pytest.approx(expected)
    if config.schedule == "constant":
        assert found == pytest.approx([0.5, *[1.0] * 7, 2 / 3, 1 / 3])


def test_durations(short: TuneConfig) -> None:
    for duration, steps in (("7steps", 7), ("2epochs", 6), ("60pairs", 10), ("0.06kpairs", 10), ("1steps", 1)):
        run = start(dataclasses.replace(short, duration=duration))
        assert (run.steps, run.size) == (steps, 6), duration
    assert start(dataclasses.replace(short, duration=None)).steps == 30_000 // 6
    assert start(dataclasses.replace(short, batch_size=1000)).size == 18


# Losses


def scores_of(run: Tuning, batch: Batch, captions: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Scaled scores [images, captions] in float64, before a step."""
    with torch.no_grad():
        run.model.eval()
        texts = run.model.text_features(run.tokens.take(captions)).double()
        pictures = run.model.image_features(torch.from_numpy(run.train.features(images))).double()
    return (run.model.scale.item() * pictures @ texts.T).numpy()


def cross_entropy(scores: np.ndarray, left_out: np.ndarray, weight: float = 0.5) -> float:
    """The softmax loss of square scores, image by image; `left_out` pairs are in no sum."""
    kept = np.where(left_out, -np.inf, scores)
    own = np.diag(kept)
    there = np.log(np.exp(kept).sum(1)) - own
    back = np.log(np.exp(kept).sum(0)) - own
    return float((weight * there + (1 - weight) * back).mean())


def same_text_or_image(run: Tuning, captions: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Which [image, caption] pairs are no negatives, by the captions' words and the images' numbers."""
    words = [run.train.captions[c] for c in captions]
    size = len(captions)
    return np.array([[i != j and words[i] == words[j] for j in range(size)] for i in range(size)])


@pytest.mark.parametrize("weight", [0.5, 0.2, 1.0])
@pytest.mark.parametrize("masked", [True, False])
def test_softmax_loss(short: TuneConfig, masked: bool, weight: float) -> None:
    """The first step's loss, with and without equal captions as negatives; every caption here is of two images."""
    config = dataclasses.replace(short, batch_size=18, mask_duplicates=masked, image_to_text=weight)
    run = start(config)
    batch = first_batch(run)
    (captions,) = batch.captions
    same = same_text_or_image(run, captions, batch.images)
    assert same.any()
    expected = cross_entropy(scores_of(run, batch, captions, batch.images), same & masked, weight)
    assert facts_of(run.step(first_inputs(run)))["loss"] == pytest.approx(expected, rel=1e-5)


def test_sigmoid_loss(short: TuneConfig) -> None:
    config = dataclasses.replace(short, loss="sigmoid", logit_bias=-5.0, mask_duplicates=False)
    run = start(config)
    batch = first_batch(run)
    signed = (scores_of(run, batch, batch.captions[0], batch.images) - 5.0) * (2 * np.eye(6) - 1)
    facts = facts_of(run.step(first_inputs(run)))
    assert facts["loss"] == pytest.approx(np.log1p(np.exp(-signed)).sum() / 6, rel=1e-5)
    assert facts["bias"] != -5.0
    model = tune.run(config)
    assert model.logit_bias is not None
    assert model.logit_bias.item() == log_of(config.out)[-1]["bias"]


@pytest.mark.parametrize("more", [5, 1000])
@pytest.mark.parametrize("masked", [True, False])
def test_image_negatives(short: TuneConfig, more: int, masked: bool) -> None:
    """Every text's own image is sought among the batch's and others drawn from outside it, at most all of them."""
    run = start(dataclasses.replace(short, image_negatives=more, mask_duplicates=masked))
    batch = first_batch(run)
    (captions,) = batch.captions
    found = first_inputs(run).more_images
    assert found is not None
    drawn = found.images.numpy()  # no two pictures are equal: their ids are their numbers
    assert len(set(drawn)) == min(more, 12)
    assert not set(drawn) & set(batch.images)
    assert torch.equal(found.features, torch.from_numpy(run.train.features(drawn)))
    later = run.prepare(1, batch, run.micro).more_images
    assert later is not None
    assert more == 1000 or set(later.images.tolist()) != set(drawn)

    scores = scores_of(run, batch, captions, np.concatenate([batch.images, drawn]))
    first = np.concatenate([[0], np.cumsum(run.train.counts)])
    words = run.train.captions
    for column, caption in enumerate(captions):
        for row, image in enumerate([*batch.images, *drawn]):
            own = [words[batch_caption] for batch_caption in captions[row : row + 1]]
            texts = own if row < 6 else words[first[image] : first[image + 1]]
            if masked and row != column and words[caption] in texts:
                scores[row, column] = -np.inf
    own = np.diag(scores)
    there = np.log(np.exp(scores[:6]).sum(1)) - own
    back = np.log(np.exp(scores).sum(0)) - own
    assert facts_of(run.step(first_inputs(run)))["loss"] == pytest.approx((there + back).mean() / 2, rel=1e-5)


@pytest.fixture
def fields_store(tower_module: str, tmp_path: Path) -> FeatureStore:
    """Twelve pictures with a title, tags or both: the first two have no tags, the third no title."""
    folder = tmp_path / "titled"
    folder.mkdir()
    with open(folder / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "title", "tags", "note"])
        for i in range(12):
            color, shape = list(COLORS)[i % 4], ("bar", "box", "ring")[i % 3]
            draw(color, shape, 40 + i).save(folder / f"{i}.png")
            title, tags = f"the {color} {shape} no {chr(97 + i)}", f"{color}, {chr(97 + i)}"
            writer.writerow([f"{i}.png", "" if i == 2 else title, "" if i < 2 else tags, "x" if i == 1 else ""])
    return embed(
        pairs=folder, image_tower=tower_module, caption_column=("title", "tags", "note"), out=tmp_path / "fields"
    )


def test_fields(fields_store: FeatureStore, short: TuneConfig) -> None:
    """The loss is the sum over fields, each over the images that have it; captions of other fields are left out."""
    assert (fields_store.path / "damaged.jsonl").exists() is False
    config = dataclasses.replace(
        short, store=fields_store.path, lang=(), fields=("title", "tags"), batch_size=12, holdout=0.0
    )
    run = start(config)
    assert "x" not in run.train.captions
    batch = first_batch(run)
    expected = 0.0
    for captions, missing in zip(batch.captions, ({2}, {0, 1}), strict=True):
        there = captions >= 0
        assert set(batch.images[~there]) == missing
        owners = run.train.owner[captions[there]]
        assert np.array_equal(owners, batch.images[there])
        scores = scores_of(run, batch, captions[there], owners)
        expected += cross_entropy(scores, np.zeros_like(scores, dtype=bool))
    assert facts_of(run.step(first_inputs(run)))["loss"] == pytest.approx(expected, rel=1e-5)
    assert tune.run(config).encode_text("a").shape == (1, 48)

    one = start(dataclasses.replace(config, fields=("tags",)))
    assert len(one.train) == 10  # two pictures have no tags
    with pytest.raises(StoreError, match=r"no text field 'titel' \(perhaps you meant 'title'"):
        start(dataclasses.replace(config, fields=("titel",)))
    with pytest.raises(StoreError, match="has one text field, title asked for"):
        start(dataclasses.replace(short, fields=("title",)))


def test_not_finite_stops_with_the_step(tune_config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = torch.tensor(float("nan"), requires_grad=True)
    monkeypatch.setattr("litune.tuning.step.softmax_loss", lambda *_, **__: broken)
    with pytest.raises(RunError, match=r"the loss is nan at step 0 \(images .*\.png.*lower --learning-rate"):
        tune.run(tune_config)


def break_gradients(monkeypatch: pytest.MonkeyPatch, steps: range) -> None:
    """Have the loss of these steps stay as it is, with an infinite gradient."""
    calls = itertools.count()

    def broken(images: torch.Tensor, texts: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        loss = softmax_loss(images, texts, *rest, **more)
        return loss + (texts - texts.detach()).abs().sum().sqrt() if next(calls) in steps else loss

    monkeypatch.setattr("litune.tuning.step.softmax_loss", broken)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_move(
    tune_config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is written: the same command goes on, and ends as if nothing had been."""
    tune.run(tune_config)
    config = dataclasses.replace(tune_config, out=tmp_path / "broken", checkpoint_seconds=0.0)
    with monkeypatch.context() as patch:
        break_gradients(patch, range(3, 4))
        with pytest.raises(RunError, match=r"gradient's norm is nan at step 3 \(images .*\.png.*lower --learning-rate"):
            tune.run(config)
    tensors, facts = load_tensors(config.out / "state.safetensors")
    assert facts["step"] == 3
    assert all(value.isfinite().all() for value in tensors.values())
    tune.run(config)
    assert bytes_of(config.out) == bytes_of(tune_config.out)


def test_steps_that_are_not_finite_are_skipped_where_asked(
    tune_config: TuneConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(tune_config, not_finite="skip")
    break_gradients(monkeypatch, range(3, 6))
    tune.run(config)
    assert {3, 4, 5} == {step - 1 for step in range(1, 41)} - {line["step"] - 1 for line in log_of(config.out)}
    assert capsys.readouterr().err.count("the step is skipped") == 3
    assert all(value.isfinite().all() for value in load_file(config.out / "model.safetensors").values())


def test_too_many_skipped_steps_stop(tune_config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    break_gradients(monkeypatch, range(2, 40))
    with pytest.raises(RunError, match="at step 12 "):
        tune.run(dataclasses.replace(tune_config, not_finite="skip"))


# Heads and the token table


@pytest.mark.parametrize(
    ("text_head", "image_head", "dim", "expected"),
    [
        ("linear", "none", None, 48),
        ("gated", "auto", None, 48),
        ("mlp", "linear", 20, 20),
        ("linear", "gated", None, 48),
        ("none", "mlp", None, 32),
        ("none", "linear", 32, 32),
    ],
)
def test_heads(
    short: TuneConfig,
    text_head: str,
    image_head: str,
    dim: int | None,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Heads are tuned, saved and loaded; the shared dimension is that of the side without one."""
    config = dataclasses.replace(short, text_head=text_head, image_head=image_head, dim=dim, duration="2steps")
    tuned = []
    monkeypatch.setattr(Tuning, "finish", lambda self, finish=Tuning.finish: (finish(self), tuned.append(self.model)))
    model = tune.run(config)
    raw = FeatureStore(config.store).features([0, 5])
    assert model.encode_text(["a red box"]).shape == (1, expected)
    assert torch.equal(model.encode_features(raw), tuned[0].encode_features(raw))
    assert torch.equal(model.encode_text(["a red box"]), tuned[0].encode_text(["a red box"]))


def test_heads_that_do_not_fit(short: TuneConfig) -> None:
    with pytest.raises(ConfigError, match=r"widths must be equal, they are 48 \(image\) and 32 \(text\)"):
        tune.run(dataclasses.replace(short, text_head="none"))
    with pytest.raises(ConfigError, match="--dim 16 needs a head on the text side: without one it is 32"):
        tune.run(dataclasses.replace(short, text_head="none", image_head="linear", dim=16))
    with pytest.raises(ConfigError, match="--dim 16 needs a head on the image side: without one it is 48"):
        tune.run(dataclasses.replace(short, dim=16))


@pytest.mark.parametrize("kind", ["adamw", "lion", "adafactor"])
def test_tuned_rows_are_exact(kind: str) -> None:
    """Steps on the rows in use give the table that steps on all of it give; the state dict is that of the whole."""
    torch.manual_seed(0)
    whole = nn.Embedding(120, 40)
    used = np.sort(np.random.default_rng(0).permutation(120)[:50])
    rows = TunedRows(whole, used)
    first = whole.weight.detach().clone()
    assert torch.equal(rows.state_dict()["weight"], first)
    assert list(rows.state_dict()) == ["weight"]
    assert [tuple(p.shape) for p in rows.parameters()] == [(50, 40)]
    for table in (whole, rows):
        group = {"params": list(table.parameters()), "lr": 0.01, "weight_decay": 0.0}
        optimizer = make_optimizer(kind, [group])
        optimizer.param_groups[0]["lr"] = 0.01
        for step in range(4):
            ids = torch.from_numpy(used)[torch.arange(step, 40 + step)]
            target = torch.linspace(-1, 1, 40 * 40).view(40, 40)
            optimizer.zero_grad()
            (table(ids) - target).square().sum().backward()
            optimizer.step()
    tuned = rows.state_dict()["weight"]
    assert torch.allclose(tuned, whole.weight, atol=1e-6)
    others = np.setdiff1d(np.arange(120), used)
    assert torch.equal(tuned[others], first[others])
    assert not torch.allclose(tuned[used], first[used])
    mixed = torch.tensor([[int(others[0]), int(used[0])], [int(used[3]), int(others[-1])]])
    assert torch.equal(rows.eval()(mixed), tuned[mixed])
    again = TunedRows(nn.Embedding(120, 40), used)
    again.load_state_dict(rows.state_dict())
    assert torch.equal(again.eval()(torch.arange(120)), tuned)


@pytest.mark.parametrize("optimizer", ["adamw", "lion"])
def test_a_run_with_the_whole_table(short: TuneConfig, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(short, optimizer=optimizer, learning_rate=1e-3)
    run = start(config)
    assert isinstance(run.model.text, HfTextTower)
    table = run.model.text.model.get_input_embeddings()
    assert isinstance(table, TunedRows)
    joined: list[Any] = []
    monkeypatch.setattr(torch, "cat", lambda *args, cat=torch.cat, **more: (joined.append(args), cat(*args, **more))[1])
    train_unlocked(run.model)
    run.take.encode_texts(first_inputs(run).texts)
    monkeypatch.undo()
    assert not any(table.rest is part for args in joined for part in args[0]), "tuning reads only the rows in use"
    rows = tune.run(config)
    monkeypatch.setattr(TextTower, "tune_only", lambda *_: None)
    whole = tune.run(dataclasses.replace(config, out=config.out.parent / "whole"))
    for (name, a), b in zip(rows.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name
    assert torch.allclose(rows.encode_text(["quiz, jvkw"]), whole.encode_text(["quiz, jvkw"]), atol=1e-6)


# What a run writes


def test_best(short: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """best/ holds the model of the best evaluation, as a run folder, and is replaced only by a better one."""
    recalls = iter([0.2, 0.5, 0.5, 0.4])
    states: list[dict[str, bytes]] = []
    folders: list[int] = []

    def scripted(self: Tuning) -> dict[str, Any]:
        states.append(state_of(self.model))
        folders.append(self.config.out.joinpath("best", "model.safetensors").stat().st_ino if states[1:] else 0)
        found = {"recall@10": next(recalls)}
        self.last_evaluation = {"text_to_image": found, "image_to_text": found}
        return self.last_evaluation

    monkeypatch.setattr(Tuning, "evaluate", scripted)
    config = dataclasses.replace(short, evaluations=4, duration="8steps")
    tune.run(config)
    best = config.out / "best"
    assert bytes_of(best) == states[1]
    assert bytes_of(config.out) == states[3]
    assert folders[1] != folders[2] == folders[3] == (best / "model.safetensors").stat().st_ino
    assert json.loads((best / "manifest.json").read_text())["best_at_step"] == 4
    assert load(best).encode_text("a red box").shape == (1, 48)
    assert not list(config.out.glob("*.tmp"))


def test_on_log(tune_config: TuneConfig) -> None:
    lines: list[dict[str, Any]] = []
    config = dataclasses.replace(tune_config, duration="4steps")
    tune.run(config, lines.append)
    assert lines == log_of(config.out)
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4]


def test_tensorboard(short: TuneConfig) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tune.run(dataclasses.replace(short, tensorboard=True, evaluations=1))
    found = EventAccumulator(str(short.out / "tensorboard"))
    found.Reload()
    losses = [line["loss"] for line in log_of(short.out) if "loss" in line]
    assert [event.value for event in found.Scalars("loss")] == pytest.approx(losses)
    assert found.Scalars("val/text_to_image/recall@10")[0].step == 10


def test_no_tensorboard(short: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"--tensorboard needs the package.*litune\[tensorboard\]"):
        tune.run(dataclasses.replace(short, tensorboard=True))
    assert not short.out.exists()


def test_evaluation_steps() -> None:
    assert evaluation_steps(10, 3) == {4, 7, 10}
    assert evaluation_steps(10, 0) == set()
    assert evaluation_steps(2, 5) == {1, 2}


# Kills


def command_line(config: TuneConfig, out: Path, steps: int) -> list[str]:
    return [
        "tune", str(config.store), "--text-tower", config.text_tower, "--out", str(out), "--lang", "en",
        "--duration", f"{steps}steps", "--batch-size", "6", "--checkpoint-seconds", "0", "--evaluations", "4",
        "--precision", "float32", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture
def launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[str]], subprocess.Popen[bytes]]]:
    """Starts litune's command line in a process of its own."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = []

    def launch(arguments: list[str]) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([quick_python(), "-m", "litune", *arguments]))
        return started[-1]

    yield launch
    for process in started:
        process.kill()


def logged_steps(run: Path) -> int:
    """How many steps the log of a run has; a line may be half written."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_killed_again_and_again(tune_config: TuneConfig, tmp_path: Path, launch: Callable[[list[str]], Any]) -> None:
    """kill -9 at 20 random moments: at the start, in steps, evaluations and checkpoints. The bytes are the same."""
    steps = 300
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = launch(command_line(tune_config, whole, steps))
    began = time.monotonic()
    while not (whole / "state.safetensors").exists() and undisturbed.poll() is None:
        time.sleep(0.01)
    until_first_step = time.monotonic() - began
    undisturbed.wait()
    per_step = (time.monotonic() - began - until_first_step) / steps
    moments = random.Random(0)
    for kill in range(20):
        process = launch(command_line(tune_config, killed, steps))
        if kill % 5 == 0:
            time.sleep(moments.uniform(0, 0.7) * until_first_step)
        else:
            enough = logged_steps(killed) + moments.randint(1, 15)
            while logged_steps(killed) < enough and process.poll() is None:
                time.sleep(per_step / 4)
            time.sleep(moments.uniform(0, 1) * per_step)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "the run was over before it was killed"
        wait_until_gone()
    assert not (killed / "manifest.json").exists()
    finishing = launch(command_line(tune_config, killed, steps))
    assert finishing.wait() == 0
    assert bytes_of(killed) == bytes_of(whole)
    assert bytes_of(killed / "best") == bytes_of(whole / "best")
    assert sorted(p.name for p in killed.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert [line["step"] for line in log_of(killed)] == [line["step"] for line in log_of(whole)]
