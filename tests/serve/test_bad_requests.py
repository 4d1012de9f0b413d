"""The load test's bad requests, some of each kind, against a server in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.serve.conftest import Live

ROOT = Path(__file__).parent.parent.parent
ALLOWED_GROWTH_MB = 40.0
"""16 bodies of some megabytes are sent at once. Large pictures are refused here: allocators may keep what two took."""


def anonymous_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024 / 1e6


def test_no_server_error_and_no_growth(live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from serve_load import BAD, send_all

    server = live(body_seconds=1.0, pixels_m=2.0)
    asyncio.run(send_all(server.port, 3 * len(BAD), seed=0))
    before = anonymous_mb()
    found = asyncio.run(send_all(server.port, 5 * len(BAD), seed=1))
    assert anonymous_mb() - before < ALLOWED_GROWTH_MB
    assert {sum(statuses.values()) for statuses in found.values()} == {5}
    statuses = {status for one in found.values() for status in one}
    assert not {status for status in statuses if status.startswith("5")}, found
    expected = {
        "wrong types": {"422"},
        "deep JSON": {"400"},
        "too large": {"413"},
        "image bomb": {"422"},
        "slow": {"408"},
        "hosts": {"421"},
        "methods": {"405"},
        "no HTTP": {"400"},
    }
    # On a busy machine a body of megabytes may take too long as well.
    assert {kind: set(found[kind]) - {"408"} or {"408"} for kind in expected} == expected
    connection = server.connect()
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()


def test_load(live: Callable[..., Live], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from serve_load import load, request

    requests = [request("/v1/encode/text", {"texts": [f"a red box {i}"]}) for i in range(30)]
    found = asyncio.run(load(live().port, requests, clients=4, seconds=20.0))
    assert found["statuses"] == {"200": 30}
    assert 0 < found["p50_ms"] <= found["p99_ms"]
    assert found["requests_per_second"] == pytest.approx(30 / found["seconds"], rel=0.2)
