"""The bank of a run of tuning, and how it is decided whether the run ranks with it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import interrupt

import litune
from litune.config import TuneConfig
from litune.model.hubs import Bank
from litune.model.run_folder import load
from litune.tuning import hubs
from litune.tuning.hubs import keep_bank
from litune.tuning.tune import tune
from litune.vectors import normalize


def test_an_interrupted_run_has_the_same_bank(tune_config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has at most a tenth of the pairs seen, all of them tuned on, and the evaluation's figures beside its own."""
    monkeypatch.setattr(hubs, "LEAST", 5)
    config = dataclasses.replace(tune_config, duration="144pairs")
    tune.run(config)
    manifest = json.loads((config.out / "manifest.json").read_text())
    facts = manifest["hub_correction"]
    assert facts["bank"] == {"captions": manifest["pairs_seen"] // 10, "images": manifest["pairs_seen"] // 10}
    for way in ("text_to_image", "image_to_text"):
        assert facts["held_out"]["bare"][way] == manifest["held_out"][way]
    bank = load_file(config.out / "bank.safetensors")
    assert {features.dtype for features in bank.values()} == {torch.float16}
    again = dataclasses.replace(config, out=config.out.with_name("again"), checkpoint_seconds=0)
    interrupt(3, again, monkeypatch)
    tune.run(again)
    assert (again.out / "bank.safetensors").read_bytes() == (config.out / "bank.safetensors").read_bytes()
    assert json.loads((again.out / "manifest.json").read_text())["hub_correction"] == facts
    # A run of an earlier litune has neither the file nor the entry.
    (config.out / "bank.safetensors").unlink()
    (config.out / "manifest.json").write_text(json.dumps({k: manifest[k] for k in manifest if k != "hub_correction"}))
    assert load(config.out, device="cpu").bank is None


def test_it_is_on_where_both_directions_gain(tmp_path: Path) -> None:
    """Each text and image leans to one direction, by an amount of its own; where all are found, nothing is gained."""
    generator = torch.Generator().manual_seed(0)

    def leaning(meaning: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(meaning.shape, generator=generator) / 2
        return normalize(meaning + noise + 2 * torch.rand(len(meaning), 1, generator=generator))

    meaning, of_bank = torch.randn(2, 500, 16, generator=generator)
    bank = Bank.of(leaning(of_bank), leaning(of_bank))
    facts = keep_bank(tmp_path, bank, (leaning(meaning), leaning(meaning), torch.arange(500)))["hub_correction"]
    assert facts["on"]
    for way in ("text_to_image", "image_to_text"):
        recalls = [sum(facts["held_out"][name][way].values()) for name in ("bare", "corrected")]
        assert recalls[0] < recalls[1]
    perfect = torch.eye(16)[torch.arange(16)]
    assert not keep_bank(tmp_path, bank, (perfect, perfect, torch.arange(16)))["hub_correction"]["on"]


def test_eval_has_rows_of_its_own(tune_config: TuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bare figures are as without a bank; the corrected ones those of the corrected features."""
    monkeypatch.setattr(hubs, "LEAST", 5)
    config = dataclasses.replace(tune_config, duration="144pairs")
    tune.run(config)
    manifest = json.loads((config.out / "manifest.json").read_text())
    manifest["hub_correction"]["on"] = True
    (config.out / "manifest.json").write_text(json.dumps(manifest))
    asked = {"store": config.store, "split": "val", "lang": ("en",), "device": "cpu"}
    figures = litune.eval(config.out, **asked)["retrieval"]
    without = litune.eval(config.out, **asked, hub_correction=False)["retrieval"]
    corrected = figures.pop("hubs_corrected")
    assert figures == without
    expected = manifest["hub_correction"]["held_out"]["corrected"]
    assert corrected["text_to_image"] == pytest.approx(expected["text_to_image"], abs=0.1)
    assert "CSLS" in corrected["definition"]
    assert "CSLS" not in figures["definition"]
    assert corrected["images"] == figures["images"]
