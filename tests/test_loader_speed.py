"""The loader's benchmark runs at its smallest and prints what it promises."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.test_benchmarks import captions, run

__all__ = ["captions"]


def test_loader_speed(tiny_bert: Path, captions: Path) -> None:
    small = ["--text-tower", f"hf:{tiny_bert}", "--dim", "4", "--batch-size", "16", "--threads", "1", "--quick"]
    found = run("loader_speed.py", *small, "--captions", str(captions), "--shuffle", "window")
    assert found["rows"] == 2000
    assert found["share_of_step"] == pytest.approx(found["pairs_per_second_step"] / found["pairs_per_second_loader"])
    assert 0 < found["own_peak_gb"] <= found["peak_gb"] < 4
    assert 0 < found["seconds_to_first_batch"] < 600
    assert {"bytes_per_row", "seconds_to_resume", "cpu", "threads", "torch"} <= found.keys()
    assert found["settings"]["shuffle"] == "window"
