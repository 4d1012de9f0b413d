"""Tuning in the memory that a pretend GPU has."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.gpu.conftest import World
from tests.gpu.test_tune import log_of
from tests.pretend_cuda import pretend

from litune.config import TuneConfig
from litune.text.registry import VitTextTower
from litune.text.tokenizers import Tokens
from litune.tuning.memory import choose_micro
from litune.tuning.tune import tune

CUDA = torch.device("cuda")


def test_micro_batches_that_fit(
    world: World, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With less memory than one pass takes: smaller micro-batches, and the same losses."""
    config = world.config(tmp_path / "roomy", tiny_bert, start="random", batch_size=18, evaluations=0, device="cuda")
    with pretend() as roomy:
        tune.run(config)
    capsys.readouterr()
    with pretend(memory=int(0.8 * roomy.peak)) as tight:
        tune.run(dataclasses.replace(config, out=tmp_path / "tight"))
    assert tight.peak <= tight.memory
    assert "--micro-batch" in capsys.readouterr().err
    losses = [[line["loss"] for line in log_of(tmp_path / name)] for name in ("roomy", "tight")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_large_gradients_do_not_hide_what_a_text_takes() -> None:
    """Those of a wide tower are larger than all activations of a trial's texts."""
    lengths = np.full(4096, 5)
    tokens = Tokens(np.random.default_rng(0).integers(0, 20, lengths.sum()), lengths)
    with pretend(memory=int(1.5e8)) as gpu:
        tower = VitTextTower("1024-1-1024-8", 20, 5).to("cuda")

        def encode(count: int) -> torch.Tensor:
            features: torch.Tensor = tower(tower.pack(tokens.take(np.arange(count)), CUDA).to(CUDA))
            return features

        before = gpu.allocated
        chosen = choose_micro(TuneConfig(store=Path(), text_tower="", out=Path()), len(tokens), encode, None, 0).texts
        assert 64 < chosen < len(tokens)
        tower.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        encode(chosen).sum().backward()
        share = (torch.cuda.max_memory_allocated() - before) / (gpu.memory - before)
        assert 0.5 < share < 0.9


@pytest.mark.parametrize("side", ["texts", "images"])
def test_memory_that_runs_out_on_the_way(
    side: str, world: World, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is asked for is tried, halved and tried again, for texts and for images."""
    unlocked = {"locking": "UU", "augment": "none"} if side == "images" else {}
    config = world.config(
        tmp_path / "roomy", tiny_bert, batch_size=18, evaluations=0, device="cuda", micro_batch=18,
        image_micro_batch=18, **unlocked,
    )  # fmt: skip
    with pretend() as roomy:
        tune.run(config)
    capsys.readouterr()
    with pretend(memory=int((0.75 if side == "images" else 0.85) * roomy.peak)):
        tune.run(dataclasses.replace(config, out=tmp_path / "tight"))
    assert f"memory ran out: {side} pass their tower 9 at once" in capsys.readouterr().err
    if side == "texts":  # batch norm sees micro-batches
        losses = [[line["loss"] for line in log_of(tmp_path / name)] for name in ("roomy", "tight")]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
