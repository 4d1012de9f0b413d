from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.conftest import interrupt

from litune.config import TuneConfig
from litune.text.registry import HfTextTower
from litune.text.vectors import KeptTexts
from litune.tuning.tune import tune


def test_each_text_is_encoded_once() -> None:
    table = torch.randn(1300, 4, generator=torch.Generator().manual_seed(0))
    calls: list[int] = []

    def encode(rows: np.ndarray) -> torch.Tensor:
        calls.extend(rows.tolist())
        return table[torch.from_numpy(rows)]

    random = np.random.default_rng(0)
    numbers = random.integers(0, 1300, 5000)
    kept = KeptTexts(random.integers(1, 16, 1300), numbers, encode)
    assert sorted(calls) == list(range(1300))
    captions = random.integers(0, 5000, 77)
    assert torch.equal(kept(captions), table[torch.from_numpy(numbers[captions])])


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
    monkeypatch.setattr("litune.tuning.setup.KEPT_MOST", 0)
    anew = dataclasses.replace(config, out=config.out.with_name("anew"))
    tune.run(anew)
    assert once < sum(texts) == 240
    assert losses(config.out) == pytest.approx(losses(anew.out), abs=1e-5)


def test_an_interrupted_run_ends_the_same(tune_config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(tune_config, locking="LL", checkpoint_seconds=0.0)
    tune.run(config)
    cut = dataclasses.replace(config, out=config.out.with_name("cut"))
    interrupt(23, cut, monkeypatch)
    tune.run(cut)
    name = "model.safetensors"
    assert (cut.out / name).read_bytes() == (config.out / name).read_bytes()
