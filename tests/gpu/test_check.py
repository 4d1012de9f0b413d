"""The parts of benchmarks/gpu_check.py run on a GPU, as far as a pretend one can show."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
from tests.pretend_cuda import PretendGPU

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FIGURES = {
    "right:towers": "difference_softmax_gradient_bfloat16",
    "fast:tune-minilm": "64",
    "fast:embed-vit-b": "ready_per_second_compile",
    "fast:search": "queries_per_second",
}
"""Parts, and of each a figure that it finds late. Short runs, compared and resumed, are test_tune.py's subject."""


@pytest.mark.parametrize("name", FIGURES)
def test_part(name: str, gpu: PretendGPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    from bench_gpu_task import SMALL, Task
    from gpu_check import PARTS

    task = Task(replace(SMALL, compiled=True), "cuda", tmp_path, start="fork")
    getattr(importlib.import_module(PARTS[name].module), PARTS[name].function)(task)
    assert task.figures()[FIGURES[name]]
    assert not task.wrong
