"""Embedding on a GPU: right in each runtime, without waits, in batches that fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.gpu.conftest import World
from tests.pretend_cuda import PretendGPU, pretend

import litune
from litune.image import encoding, runtimes
from litune.image import gpu as batches
from litune.store import build
from litune.store.store import FeatureStore


@pytest.fixture(autouse=True)
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runtimes are tried, and compiled, for as few pictures as there are here; the choice is not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(encoding, "WORTH_TRYING", 2)
    monkeypatch.setattr(encoding, "WORTH_COMPILING", 2)
    monkeypatch.setattr(runtimes, "ROUNDS", 1)
    monkeypatch.setattr(batches, "stream_rate", _one_batch)
    monkeypatch.setattr(runtimes, "stream_rate", _one_batch)


def _one_batch(encode: Any, pixels: torch.Tensor, seconds: float) -> float:
    """Stands for the pictures a second, with one batch: the larger the faster."""
    return float(sum(len(pixels) for _ in batches.stream(encode, [(None, pixels)])))


def embed(world: World, out: Path, **settings: Any) -> FeatureStore:
    return litune.embed(pairs=world.photos, image_tower=world.tower, out=out, **{"device": "cuda", **settings})


def check(world: World, store: FeatureStore, least: float) -> None:
    ours, theirs = store.features(slice(None)), FeatureStore(world.store).features(slice(None))
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    assert ((ours * theirs).sum(axis=1) / norms).min() >= least
    assert store.metadata["key"].equals(FeatureStore(world.store).metadata["key"])


@pytest.mark.parametrize(
    ("name", "precision", "least"),
    [
        ("auto", "float32", 0.999999),
        ("auto", "auto", 0.999),
        ("torch", "bfloat16", 0.999),
        ("compile", "float32", 0.999999),
        ("compile", "bfloat16", 0.999),
    ],
)
@pytest.mark.parametrize("batch_size", [None, 7])
def test_every_runtime(
    name: Any, precision: Any, least: float, batch_size: int | None, world: World, gpu: PretendGPU, tmp_path: Path
) -> None:
    store = embed(world, tmp_path / "s", runtime=name, precision=precision, batch_size=batch_size)
    check(world, store, least)
    assert store.manifest["tower"]["device"] == "cuda"


def test_a_batch_waits_for_nothing_but_features_two_batches_old(
    world: World, gpu: PretendGPU, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And all that is sent is bytes, out of pinned memory."""
    whole = encoding.encode_images

    def counted(*args: Any, **settings: Any) -> Any:
        gpu.waits.clear()
        gpu.copies.clear()
        return whole(*args, **settings)

    monkeypatch.setattr(build, "encode_images", counted)
    embed(world, tmp_path / "s", runtime="compile", precision="bfloat16", batch_size=5)
    assert not gpu.copies
    ((line, times),) = gpu.waits.items()
    assert line.startswith("Event.synchronize @ devices.py")
    assert times == 5  # batches


def test_a_compiler_that_is_not_there(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pretend(compile_error=RuntimeError("Failed to find C compiler.\nPlease specify via CC")):
        store = embed(world, tmp_path / "s", precision="float32")
        assert store.manifest["tower"]["runtime"] == "torch"
        assert "can't run in compile (float32): Failed to find C compiler.\n" in capsys.readouterr().err
        with pytest.raises(litune.LituneError, match="Failed to find C compiler.; use --runtime torch"):
            embed(world, tmp_path / "t", runtime="compile", precision="float32")
