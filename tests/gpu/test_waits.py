"""Between the steps that are logged, tuning neither waits for the GPU nor copies to it out of pageable memory."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.gpu.conftest import World
from tests.gpu.test_tune import towers
from tests.pretend_cuda import pretend

from litune.config import TuneConfig
from litune.text import packing
from litune.tuning import run as module
from litune.tuning.tune import tune

__all__ = ["towers"]


def counted(config: TuneConfig, steps: int) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """The waits, pageable copies and unordered sums of a run of so many steps, of which the last is logged."""
    with pretend() as gpu:
        tune.run(dataclasses.replace(config, duration=f"{steps}steps", out=config.out / str(steps)))
    return gpu.waits, gpu.copies, gpu.unordered


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.1},
    "float32": {"precision": "float32"},
    "sigmoid": {"loss": "sigmoid"},
    "image negatives": {"image_negatives": 8},
    "whitening, heads": {"image_map": "whiten", "image_head": "mlp", "text_head": "gated"},
    "micro-batches": {"micro_batch": 2},
    "locked text tower": {"locking": "LL"},
    "texts in a line": {},
    "lion": {"optimizer": "lion"},
    "adafactor": {"optimizer": "adafactor"},
    "unlocked image tower": {"locking": "UU"},
    "unlocked late, micro-batches": {"locking": "UU", "micro_batch": 2, "unlock": "ramp:50%"},
}


@pytest.mark.parametrize(("tower", "settings"), [
    *(("bert", settings) for settings in SETTINGS), ("vit", "plain"), ("vit", "texts in a line"),
    ("T5EncoderModel", "plain"), ("ModernBertModel", "plain"),
])  # fmt: skip
def test_no_step_waits(
    tower: str, settings: str, towers: dict[str, str], world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOG_LINES", 1)
    if settings == "texts in a line":
        monkeypatch.setattr(packing, "FLASH_FROM", 0)
    usual = {"precision": "bfloat16", "evaluations": 0, "device": "cuda"}
    config = world.config(tmp_path, towers[tower], **(usual | SETTINGS[settings]))
    few, many = counted(config, 2), counted(config, 4)
    for what, one, other in zip(("waits", "pageable copies", "unordered sums"), few, many, strict=True):
        each = {line: (other[line] - one[line]) / 2 for line in other if other[line] != one[line]}
        assert not each, f"{what} of each step:\n" + "\n".join(f"{n:5.2f}  {line}" for line, n in each.items())
