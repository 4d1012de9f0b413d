"""Tuning in the memory that a pretend GPU has."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from tests.gpu.conftest import World
from tests.gpu.test_tune import log_of
from tests.pretend_cuda import pretend

from litune.tuning.tune import tune


def test_micro_batches_that_fit(
    world: World, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With less memory than one pass takes: smaller micro-batches, and the same losses."""
    config = world.config(tmp_path / "roomy", tiny_bert, batch_size=18, evaluations=0, device="cuda")
    with pretend() as roomy:
        tune.run(config)
    capsys.readouterr()
    with pretend(memory=int(0.8 * roomy.peak)) as tight:
        tune.run(dataclasses.replace(config, out=tmp_path / "tight"))
    assert tight.peak <= tight.memory
    assert "--micro-batch" in capsys.readouterr().err
    losses = [[line["loss"] for line in log_of(tmp_path / name)] for name in ("roomy", "tight")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


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
