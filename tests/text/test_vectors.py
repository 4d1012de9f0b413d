from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import interrupt, random_store

from litune.config import TuneConfig
from litune.model.build import make_model, make_tokenizer
from litune.store.selection import choose_mixture
from litune.text.registry import HfTextTower, parse_text_spec
from litune.tuning.start import encode, text_vectors
from litune.tuning.tune import tune


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_locked_text_tower_encodes_each_caption_once(
    tune_config: TuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses are those of encoding them anew in each step."""
    texts: list[int] = []
    forward = HfTextTower.forward

    def counting(self: HfTextTower, packed: object) -> torch.Tensor:
        texts.append(len(packed.lengths))  # type: ignore[attr-defined]
        return forward(self, packed)  # type: ignore[arg-type]

    monkeypatch.setattr(HfTextTower, "forward", counting)
    config = dataclasses.replace(tune_config, locking="LL", evaluations=0)
    tune.run(config)
    once = sum(texts)
    texts.clear()
    tune.run(dataclasses.replace(config, out=config.out.with_name("again"), head_rate=2.0))
    assert not texts  # they are kept in the store
    monkeypatch.setattr("litune.tuning.run.kept_texts", lambda _: None)
    anew = dataclasses.replace(config, out=config.out.with_name("anew"))
    tune.run(anew)
    assert once < sum(texts) == 240
    assert losses(config.out) == pytest.approx(losses(anew.out), abs=1e-5)


def test_vectors_of_captions_of_several_stores(tiny_bert: Path, tmp_path: Path) -> None:
    stores = [random_store(tmp_path / name, rows, 12, captions=2) for name, rows in (("one", 20), ("two", 30))]
    config = TuneConfig(stores[0].path, f"hf:{tiny_bert}", tmp_path / "run", (stores[1].path,), device="cpu")
    spec = parse_text_spec(config.text_tower)
    train, _ = choose_mixture(stores, dataclasses.replace(config, holdout=0.0))
    model = make_model(train, spec, make_tokenizer(spec, config, ()), config).eval()
    numbers = np.random.default_rng(0).permutation(100)[:70]
    vectors = text_vectors(model, train, bfloat16=False).of_captions(numbers)
    captions = train.take_captions(numbers).to_pylist()
    assert len(set(captions)) > 1
    assert torch.allclose(vectors, torch.from_numpy(encode(model, captions, bfloat16=False)), atol=1e-5)


def test_an_interrupted_run_ends_the_same(tune_config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(tune_config, locking="LL", checkpoint_seconds=0.0)
    tune.run(config)
    cut = dataclasses.replace(config, out=config.out.with_name("cut"))
    interrupt(23, cut, monkeypatch)
    tune.run(cut)
    name = "model.safetensors"
    assert (cut.out / name).read_bytes() == (config.out / name).read_bytes()
