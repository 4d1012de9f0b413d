"""Texts in rows and in one line on a pretend GPU: each batch as its lengths say, with the same results."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import interrupt
from tests.gpu.conftest import World
from tests.gpu.test_tune import log_of
from tests.pretend_cuda import PretendGPU, pretend

import litune
from litune.text import packing
from litune.text.packing import FLASH_FROM, Line, Rows
from litune.text.registry import HfTextTower, TextTower, VitTextTower
from litune.text.tokenizers import Tokens
from litune.tuning.tune import tune

CUDA = torch.device("cuda")


def bert(pooling: str) -> TextTower:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    return HfTextTower(BertModel(config, add_pooling_layer=False), pooling)


def texts(*lengths: int) -> Tokens:
    return Tokens(np.random.default_rng(0).integers(5, 50, sum(lengths)), np.array(lengths))


SHORT, LONG = texts(FLASH_FROM - 2, 60, 3, FLASH_FROM), texts(FLASH_FROM + 1, 60, FLASH_FROM, 31)


@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_each_batch_is_laid_out_by_its_own_lengths(kind: str, pooling: str, gpu: PretendGPU) -> None:
    torch.manual_seed(0)
    tower = (bert(pooling) if kind == "bert" else VitTextTower("32-2-64-4", 50, 64, pooling)).eval()
    with torch.no_grad():
        exact = [tower(tower.pack(tokens, torch.device("cpu"))) for tokens in (SHORT, LONG)]
        tower.to(CUDA)
        for tokens, expected, layout in zip((SHORT, LONG), exact, (Rows, Line), strict=True):
            packed = tower.pack(tokens, CUDA, bfloat16=True)
            assert type(packed) is layout
            assert (packed.places is not None) == (pooling == "mean")
            with torch.autocast("cuda", torch.bfloat16):
                features = tower(packed.to(CUDA)).cpu()
            assert torch.cosine_similarity(features, expected).min() > 0.999
            packed = tower.pack(tokens, CUDA)  # no kernel takes float32
            assert type(packed) is Rows
            assert torch.allclose(tower(packed.to(CUDA)).cpu(), expected, atol=1e-5)


def test_gradients_are_the_same_in_both(gpu: PretendGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    tower = bert("mean").to(CUDA).eval()
    gradients = []
    for flash_from in (0, 1000):
        monkeypatch.setattr(packing, "FLASH_FROM", flash_from)
        packed = tower.pack(SHORT, CUDA, bfloat16=True)
        assert isinstance(packed, Line) == (flash_from == 0)
        with torch.autocast("cuda", torch.bfloat16):
            features = tower(packed.to(CUDA))
        (features * torch.linspace(-1, 1, features.numel()).view_as(features.cpu()).to(CUDA)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in tower.parameters() if p.grad is not None]))
        tower.zero_grad()
    line, rows = gradients
    assert (line - rows).norm() < 0.05 * rows.norm()


def between(world: World, monkeypatch: pytest.MonkeyPatch) -> Counter[type]:
    """Move FLASH_FROM to captions' mean length, so that batches of a run differ; returns a count of their layouts."""
    captions = ["a red box", "the ring is blue, really"]
    lengths = litune.load(world.run, device="cpu").tokenizer(captions).lengths
    monkeypatch.setattr(packing, "FLASH_FROM", float(lengths.mean()))
    layouts: Counter[type] = Counter()
    pack = TextTower.pack

    def counting(self: TextTower, *args: Any, **settings: Any) -> Any:
        packed = pack(self, *args, **settings)
        layouts[type(packed)] += 1
        return packed

    monkeypatch.setattr(TextTower, "pack", counting)
    return layouts


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 2}, {"pooling": "mean"}, {"gradient_checkpointing": True}])
def test_batches_of_a_run_may_differ(
    settings: dict[str, Any], world: World, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses are those of the processor, to bfloat16's rounding."""
    layouts = between(world, monkeypatch)
    usual = {"precision": "bfloat16", "duration": "6steps", "evaluations": 0, "start": "random"}
    config = world.config(tmp_path / "cuda", tiny_bert, device="cuda", **(usual | settings))
    with pretend():
        tune.run(config)
    assert layouts[Rows] > 1
    assert layouts[Line] > 1
    tune.run(dataclasses.replace(config, out=tmp_path / "cpu", device="cpu", precision="float32"))
    ours, theirs = ([line["loss"] for line in log_of(tmp_path / name) if "loss" in line] for name in ("cuda", "cpu"))
    assert ours == pytest.approx(theirs, rel=0.02)


def test_resumed_where_batches_differ(
    world: World, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes, with dropout."""
    layouts = between(world, monkeypatch)
    whole = world.config(
        tmp_path / "whole", tiny_bert, duration="4steps", precision="bfloat16", dropout=0.2, checkpoint_seconds=0.0,
        device="cuda",
    )  # fmt: skip
    broken = dataclasses.replace(whole, out=tmp_path / "broken")
    with pretend():
        tune.run(whole)
        interrupt(2, broken, monkeypatch)
        tune.run(broken)
    assert layouts[Rows] > 1
    assert layouts[Line] > 1
    assert (whole.out / "model.safetensors").read_bytes() == (broken.out / "model.safetensors").read_bytes()
