from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import interrupt, random_store, random_timm_tower
from tests.forked import quick_python
from tests.store.test_store import clip_retrieval_folder

import litune
from litune.claims import claim
from litune.config import TuneConfig, to_json
from litune.errors import ConfigError, OutputBusyError, OutputExistsError, RunError, StoreError
from litune.image.registry import weights_hash
from litune.model.build import make_model, make_tokenizer
from litune.model.run_folder import load, load_tensors
from litune.store.selection import choose_pairs
from litune.store.store import FeatureStore
from litune.text import registry as text_towers
from litune.text.registry import parse_text_spec
from litune.tuning.interrupt import after_the_step
from litune.tuning.losses import softmax_loss
from litune.tuning.run import Tuning
from litune.tuning.tune import tune


def test_learns(tune_config: TuneConfig) -> None:
    """Held-out colors and shapes are found far above chance, and the manifest says how the run came about."""
    tune_config = dataclasses.replace(tune_config, duration="480pairs")
    tune.run(tune_config)
    lines = [json.loads(line) for line in (tune_config.out / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, 81))
    evaluations = [line["val"] for line in lines if "val" in line]
    assert len(evaluations) == 2
    found = evaluations[-1]
    assert (found["images"], found["captions"]) == (6, 12)
    assert found["text_to_image"]["recall@1"] > found["chance"]["text_to_image"]["recall@1"]
    manifest = json.loads((tune_config.out / "manifest.json").read_text())
    assert manifest["tuned_on"] == {"split": "train", "images": 18, "captions": 36, "held_out_images": 6}
    assert manifest["store"]["tower"]["spec"] == "python:colortower:make"
    assert manifest["held_out"] == found
    assert manifest["seed"] == 0
    assert json.loads((tune_config.out / "config.json").read_text()) == to_json(tune_config)
    assert sorted(p.name for p in tune_config.out.iterdir()) == [
        "README.md", "best", "config.json", "manifest.json", "metrics.jsonl", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


def bytes_of(run: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in load_file(run / "model.safetensors").items()}


def test_same_seed_same_bytes(tune_config: TuneConfig, tmp_path: Path) -> None:
    tune_config = dataclasses.replace(tune_config, precision="auto", duration="60pairs", evaluations=1)
    again = dataclasses.replace(tune_config, out=tmp_path / "again")
    other = dataclasses.replace(tune_config, out=tmp_path / "other", seed=1)
    for config in (tune_config, again, other):
        tune.run(config)
    assert bytes_of(tune_config.out) == bytes_of(again.out)
    assert bytes_of(tune_config.out) != bytes_of(other.out)


def test_interrupted_anywhere_ends_with_the_same_bytes(
    tune_config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at several steps, with dropout on, the finished run equals an undisturbed one bit for bit."""
    config = dataclasses.replace(tune_config, dropout=0.2, checkpoint_seconds=0.0)
    tune.run(config)
    broken = dataclasses.replace(config, out=tmp_path / "broken")
    for stop_at in (1, 7, 22, 39):
        interrupt(stop_at, broken, monkeypatch)
        with pytest.raises(RunError, match="tuning has not finished"):
            load(broken.out)
    tune.run(broken)
    assert bytes_of(broken.out) == bytes_of(config.out)
    lines = [json.loads(line) for line in (broken.out / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "pairs_per_second")
    assert [{k: v for k, v in x.items() if k not in timed} for x in lines] == [
        {k: v for k, v in x.items() if k not in timed} for x in whole
    ]


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as Python has it; several test processes leave it to their parent."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_a_step_that_is_interrupted_is_finished_and_kept(
    tune_config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune.run(tune_config)
    broken = dataclasses.replace(tune_config, out=tmp_path / "broken")
    take = Tuning.step

    def pressing(self: Tuning, *batch: Any) -> dict[str, Any]:
        if self.progress.step == 6:
            signal.raise_signal(signal.SIGINT)
        return take(self, *batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tuning, "step", pressing)
        tune.run(broken)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert load_tensors(broken.out / "state.safetensors")[1]["step"] == 7
    tune.run(broken)
    assert bytes_of(broken.out) == bytes_of(tune_config.out)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_twice_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), after_the_step() as interrupted:
        assert not interrupted()
        signal.raise_signal(signal.SIGINT)
        assert interrupted()
        signal.raise_signal(signal.SIGINT)


def test_a_run_that_is_being_tuned_is_left_alone(tune_config: TuneConfig) -> None:
    with claim(tune_config.out), pytest.raises(OutputBusyError, match="is being written by process"):
        tune.run(tune_config)
    assert not tune_config.out.exists()


def test_what_is_already_there(tune_config: TuneConfig) -> None:
    tune.run(tune_config)
    with pytest.raises(OutputExistsError, match="holds a finished run"):
        tune.run(tune_config)
    (tune_config.out / "manifest.json").unlink()
    with pytest.raises(RunError, match=r"another config \(seed was 0, is 5\)"):
        tune.run(dataclasses.replace(tune_config, seed=5))
    tune.run(dataclasses.replace(tune_config, seed=5, overwrite=True))


def test_locked_is_locked(store: FeatureStore, tune_config: TuneConfig) -> None:
    """With an image tower in the model: no byte of it moves, nothing in it trains, the optimizer has none of it."""
    tower = random_timm_tower()
    torch.manual_seed(0)
    train, _ = choose_pairs(store, tune_config)
    spec = parse_text_spec(tune_config.text_tower)
    wide = random_store(tune_config.out.parent / "wide", 24, 512)
    model = make_model(wide.select(), spec, make_tokenizer(spec, tune_config, train.captions), tune_config)
    model.image = tower
    run = Tuning(tune_config, wide.select(), None, model, torch.device("cpu"))
    in_optimizer = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
    assert in_optimizer
    assert not in_optimizer & {id(p) for p in tower.parameters()}
    before = weights_hash(tower)
    model.train()
    assert model.text.training
    assert not any(module.training for module in tower.modules())
    pixels = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    first = tower.encode(pixels)
    text_before = weights_hash(model.text)
    for batch in run.batches.from_step(0, 3):
        run.step(run.prepare(0, batch, run.micro))
        images = model.image_features(tower.encode(pixels))
        loss = softmax_loss(images, model.text_features(run.tokens.take(batch.captions[0])), model.scale)
        loss.backward()
        run.optimizer.step()
    assert weights_hash(model.text) != text_before
    assert weights_hash(tower) == before
    assert torch.equal(tower.encode(pixels), first)
    assert all(p.grad is None for p in tower.parameters())


def test_tower_folder_keeps_its_bytes(tune_config: TuneConfig, tiny_bert: Path) -> None:
    before = {p.name: p.read_bytes() for p in tiny_bert.iterdir()}
    tune.run(tune_config)
    assert {p.name: p.read_bytes() for p in tiny_bert.iterdir()} == before


def test_vit_from_scratch_with_its_own_tokenizer(tune_config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(text_towers.VIT_SIZES, "Ti", (24, 2, 48, 2))
    config = dataclasses.replace(tune_config, text_tower="vit:Ti", max_tokens=8, vocab_size=60)
    model = tune.run(config)
    assert model.tokenizer.vocab_size <= 60
    assert model.encode_text(["a red box"]).shape == (1, 48)


def test_random_init_and_heads(tune_config: TuneConfig, tiny_bert: Path) -> None:
    for kind in ("linear", "mlp"):
        config = dataclasses.replace(
            tune_config,
            text_tower=f"hf:{tiny_bert}?init=random",
            image_head=kind,
            dim=16,
            out=tune_config.out.parent / kind,
        )
        model = tune.run(config)
        assert model.encode_text(["a red box"]).shape == (1, 16)
        assert model.encode_features(FeatureStore(config.store).features([0, 1])).shape == (2, 16)


def test_clip_retrievals_folder_is_tuned_on_as_it_is(tiny_bert: Path, tmp_path: Path) -> None:
    clip_retrieval_folder(tmp_path / "clip")
    model = litune.tune(
        store=tmp_path / "clip", text_tower=f"hf:{tiny_bert}", out=tmp_path / "run", duration="12pairs", batch_size=4
    )
    assert model.encode_text("picture 1").shape == (1, 5)  # of 6 pictures
    with pytest.raises(litune.LituneError, match="does not know its image tower"):
        model.encode_image([tmp_path / "x.png"])


def test_image_maps(tune_config: TuneConfig) -> None:
    """none: the tower's features as they are; center: less the tuned images' mean; whiten: by W (C + s·I) W = I."""
    short = dataclasses.replace(tune_config, duration="12pairs", evaluations=0)
    raw = FeatureStore(short.store).select("train").features().astype(np.float64)
    for kind in ("none", "center", "whiten"):
        config = dataclasses.replace(short, image_map=kind, shrinkage=0.5, out=short.out.parent / kind)
        model = tune.run(config)
        mapped = raw if kind == "none" else raw - raw.mean(0)
        if kind == "whiten":
            covariance = np.cov(raw.T, bias=True)
            shrunk = covariance + 0.5 * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
            assert model.whitening is not None
            found = model.whitening.double().numpy()
            assert np.allclose(found @ shrunk @ found, np.eye(len(found)), atol=1e-3)
            mapped = mapped @ np.linalg.cholesky(np.linalg.inv(shrunk))  # another root: equal up to a rotation
        expected = mapped / np.linalg.norm(mapped, axis=1, keepdims=True)
        features = model.encode_features(raw.astype(np.float32)).double().numpy()
        assert np.allclose(features @ features.T, expected @ expected.T, atol=1e-4), kind
        if kind != "whiten":
            assert np.allclose(features, expected, atol=1e-5)


def test_holdout_without_splits(tmp_path: Path, tune_config: TuneConfig) -> None:
    store = random_store(tmp_path / "s", 100, 4)
    for seed in (0, 1):
        config = dataclasses.replace(tune_config, store=store.path, lang=(), holdout=0.1, seed=seed)
        train, val = choose_pairs(store, config)
        assert val is not None
        assert (len(train), len(val)) == (90, 10)
        assert not set(train.keys) & set(val.keys)
        held = val.keys
        assert held == choose_pairs(store, dataclasses.replace(config, seed=9))[1].keys, "the same whatever the seed"
    assert choose_pairs(store, dataclasses.replace(config, holdout=0.0))[1] is None


def test_bad_input(tune_config: TuneConfig, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="there is no feature store"):
        tune.run(dataclasses.replace(tune_config, store=tmp_path / "nothing"))
    with pytest.raises(StoreError, match="no split"):
        tune.run(dataclasses.replace(tune_config, split="trian"))
    with pytest.raises(ConfigError, match="trained with its own"):
        tune.run(dataclasses.replace(tune_config, tokenizer="x.json"))
    for wrong in ({"batch_size": 1}, {"learning_rate": 0.0}, {"warmup": "200%"}, {"duration": "1"}):
        with pytest.raises(ConfigError):
            dataclasses.replace(tune_config, **wrong)


def test_a_folder_of_others_is_never_removed(tune_config: TuneConfig, tiny_bert: Path, tmp_path: Path) -> None:
    """A Hugging Face checkpoint has a config.json too: --overwrite does not touch it."""
    mine = tmp_path / "my-bert"
    mine.mkdir()
    for file in tiny_bert.iterdir():
        (mine / file.name).write_bytes(file.read_bytes())
    config = dataclasses.replace(tune_config, text_tower=f"hf:{mine}", out=mine)
    for overwrite in (False, True):
        with pytest.raises(OutputExistsError, match="not a run of litune"):
            tune.run(dataclasses.replace(config, overwrite=overwrite))
    assert {p.name for p in mine.iterdir()} == {p.name for p in tiny_bert.iterdir()}


def test_a_failing_command_touches_nothing(tune_config: TuneConfig) -> None:
    tune.run(dataclasses.replace(tune_config, duration="12pairs", evaluations=0))
    before = bytes_of(tune_config.out)
    for wrong in ({"text_tower": "hf:/nowhere"}, {"split": "trian"}, {"max_tokens": 4000}):
        with pytest.raises(litune.LituneError):
            tune.run(dataclasses.replace(tune_config, overwrite=True, **wrong))
    assert bytes_of(tune_config.out) == before
    fresh = dataclasses.replace(tune_config, out=tune_config.out.parent / "fresh", text_tower="hf:/nowhere")
    with pytest.raises(litune.LituneError):
        tune.run(fresh)
    assert not fresh.out.exists()


def test_going_on_wants_the_same_store(tune_config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(tune_config, checkpoint_seconds=0.0)
    interrupt(5, config, monkeypatch)
    manifest = Path(config.store) / "store.json"
    facts = json.loads(manifest.read_text())
    facts["tower"]["weights"] = "0" * 64
    manifest.write_text(json.dumps(facts))
    with pytest.raises(RunError, match=r"begun on another store \(tower differ"):
        tune.run(config)


def test_overwrite_goes_on_too(
    tune_config: TuneConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = dataclasses.replace(tune_config, checkpoint_seconds=0.0, overwrite=True)
    interrupt(5, config, monkeypatch)
    tune.run(config)
    assert "from step 5 of 40" in capsys.readouterr().err


def test_stopped_before_the_first_checkpoint(tune_config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(5, tune_config, monkeypatch)
    tune.run(tune_config)
    steps = [json.loads(line)["step"] for line in (tune_config.out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps.count(3) == 1


def test_full_disk(tune_config: TuneConfig) -> None:
    """One line, exit code 2, and the same command finishes once there is room."""
    code = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))\n"
        "from litune.cli import main\n"
        "main(sys.argv[1:])"
    )
    command = [
        "tune", str(tune_config.store), "--text-tower", tune_config.text_tower, "--out", str(tune_config.out),
        "--duration", "60pairs", "--batch-size", "6", "--evaluations", "0",
    ]  # fmt: skip
    full = subprocess.run([quick_python(), "-c", code, *command], capture_output=True, text=True, check=False)
    assert full.returncode == 2, full.stderr
    assert "the disk is full" in full.stderr
    assert "Traceback" not in full.stderr
    done = subprocess.run([quick_python(), "-m", "litune", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_val_split(store: FeatureStore, tune_config: TuneConfig) -> None:
    with pytest.raises(StoreError, match="no split 'tset'"):
        choose_pairs(store, dataclasses.replace(tune_config, val_split="tset"))
    train, val = choose_pairs(store, dataclasses.replace(tune_config, split="val", holdout=0.4))
    assert val is not None
    assert (len(train), len(val)) == (4, 2)
    with pytest.raises(ConfigError, match="needs two or more"):
        choose_pairs(store, dataclasses.replace(tune_config, split="val", holdout=0.9))
