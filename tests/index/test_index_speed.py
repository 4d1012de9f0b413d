from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def test_the_benchmark_at_its_smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from index_speed import measure

    found = measure(rows=2000, dim=16, groups=60, queries=20, exact_queries=5, folder=tmp_path)
    assert found["recall@10_when_calibrated"] >= 0.95
    assert found["recall@10"] > 0.8
    assert 0 < found["looked_at"] < 1
    assert found["store_mb"] == pytest.approx(0.064, abs=0.05)
    assert 0 < found["approximate"]["p50_ms"] <= found["approximate"]["p99_ms"]
    assert found["exact"]["queries"] == 5
