from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from litune.errors import MissingExtraError, TowerError
from litune.image import runtimes
from litune.image.pictures import ImageTransform
from litune.image.registry import ImageTower, load_image_tower

SPEC = "timm:resnet18?init=random&size=64"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The choice of a test is not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "litune" / runtimes.CHOICES


@pytest.fixture(scope="module")
def tower() -> ImageTower:
    torch.manual_seed(0)
    return load_image_tower(SPEC)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 64, 64), dtype=np.uint8))


@pytest.mark.parametrize(
    ("name", "precision", "least"),
    [
        ("torch", "float32", 0.9999999),
        ("torch", "bfloat16", 0.999),
        ("onnxruntime", "float32", 0.9999999),
        ("onnxruntime", "int8", 0.9),
        ("openvino", "float32", 0.9999999),
    ],
)
def test_features_are_torchs(tower: ImageTower, pixels: Tensor, name: str, precision: str, least: float) -> None:
    if name != "torch":
        pytest.importorskip(name, reason=f"{name} is not installed")
    expected = tower.encode(pixels)
    runtime = runtimes.build(tower, name, precision, pixels)
    for part in (pixels, pixels[:1]):  # any number of pictures
        found = runtime.run(part)
        assert found.dtype == torch.float32
        assert F.cosine_similarity(found, expected[: len(part)]).min() >= least
    if precision == "float32":
        assert (found - expected[:1]).abs().max() <= 1e-4 * expected.abs().max()


def test_threads_share_a_runtime_and_leave_torch_as_it_was(tower: ImageTower, pixels: Tensor) -> None:
    torch.set_num_threads(2)
    runtime = runtimes.build(tower, "torch", "float32", pixels)
    assert runtimes.images_per_second(runtime, pixels, seconds=0.01) > 0
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def trial(monkeypatch: pytest.MonkeyPatch, rates: dict[str, float], cosines: dict[str, float]) -> None:
    """Runtimes of these rates, whose features have these cosines with torch's."""

    def build(tower: ImageTower, name: str, precision: str, pixels: Tensor) -> runtimes.Runtime:
        key = f"{name} {precision}"
        if key not in rates:
            raise TowerError(f"no {key}")

        def run(x: Tensor) -> Tensor:
            exact = F.normalize(tower.encode(x))
            side = F.normalize(torch.randn(exact.shape, generator=torch.Generator().manual_seed(0)))
            side = F.normalize(side - (side * exact).sum(1, keepdim=True) * exact)
            cosine = cosines.get(key, 1.0)
            return cosine * exact + (1 - cosine**2) ** 0.5 * side

        return runtimes.Runtime(name, precision, run)

    monkeypatch.setattr(runtimes, "build", build)
    monkeypatch.setattr(
        runtimes, "images_per_second", lambda runtime, pixels: rates[f"{runtime.name} {runtime.precision}"]
    )


WANTED = [("torch", "float32"), ("torch", "bfloat16"), ("onnxruntime", "float32"), ("openvino", "bfloat16")]


def test_the_fastest_that_agrees(tower: ImageTower, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"torch float32": 10.0, "torch bfloat16": 40.0, "onnxruntime float32": 30.0}
    trial(monkeypatch, rates, {"torch bfloat16": 0.9998})
    best, trials = runtimes.measure(tower, WANTED, pixels)
    assert str(best) == "onnxruntime in float32"
    found = {f"{t.name} {t.precision}": (t.images_per_second, round(t.cosine, 4)) for t in trials}
    assert found == {
        "torch float32": (10.0, 1.0),
        "torch bfloat16": (40.0, 0.9998),  # fast, and too far off
        "onnxruntime float32": (30.0, 1.0),
    }
    trial(monkeypatch, rates, {"torch bfloat16": 0.99995})
    assert str(runtimes.measure(tower, WANTED, pixels)[0]) == "torch in bfloat16"
    trial(monkeypatch, rates, dict.fromkeys(rates, 0.5))
    with pytest.raises(TowerError, match="no openvino bfloat16"):
        runtimes.measure(tower, WANTED, pixels)


def test_the_choice_is_remembered(
    tower: ImageTower, pixels: Tensor, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def candidates(*_: Any, **__: Any) -> list[tuple[str, str]]:
        return WANTED[:3]

    monkeypatch.setattr(runtimes, "candidates", candidates)
    trial(monkeypatch, {"torch float32": 10.0, "torch bfloat16": 40.0}, {})
    assert str(runtimes.fastest(tower, pixels)) == "torch in bfloat16"
    (known,) = json.loads(own_cache.read_text()).values()
    assert known["chosen"] == ["torch", "bfloat16"]
    assert [t["images_per_second"] for t in known["trials"]] == [10.0, 40.0]
    trial(monkeypatch, {"torch float32": 50.0, "torch bfloat16": 40.0}, {})
    assert str(runtimes.fastest(tower, pixels)) == "torch in bfloat16"
    assert str(runtimes.fastest(tower, pixels[:4])) == "torch in float32"  # another batch is another question
    trial(monkeypatch, {"torch float32": 10.0}, {})
    assert str(runtimes.fastest(tower, pixels)) == "torch in float32"  # what was chosen runs no more
    own_cache.write_text("{ damaged")
    assert str(runtimes.fastest(tower, pixels)) == "torch in float32"


def test_candidates(tower: ImageTower, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    monkeypatch.setattr(runtimes, "fast_bfloat16", lambda device: False)
    assert runtimes.candidates(tower, "auto", "auto") == [("torch", "float32")]
    monkeypatch.setattr(runtimes, "fast_bfloat16", lambda device: True)
    assert runtimes.candidates(tower, "auto", "auto") == [("torch", "float32"), ("torch", "bfloat16")]
    assert runtimes.candidates(tower, "auto", "bfloat16") == [("torch", "bfloat16")]
    assert runtimes.candidates(tower, "onnxruntime", "int8") == [("onnxruntime", "int8")]
    with pytest.raises(TowerError, match="no runtime that is installed can compute in int8: use --runtime onnxruntime"):
        runtimes.candidates(tower, "auto", "int8")
    callable_tower = ImageTower("python:x:y", lambda x: x, lambda x: x, description={}, weights="", pooling="")
    assert runtimes.candidates(callable_tower, "auto", "auto") == [("torch", "float32")]


def test_what_cannot_run(tower: ImageTower, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TowerError, match="no runtime 'tensorrt': known: torch"):
        runtimes.build(tower, "tensorrt", "float32", pixels)
    alone = ImageTower("python:x:y", lambda x: x, lambda x: x, description={}, weights="", pooling="")
    with pytest.raises(TowerError, match="runs by itself, not in openvino"):
        runtimes.build(alone, "openvino", "float32", pixels)
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'litune\[openvino\]'"):
        runtimes.build(tower, "openvino", "float32", pixels)
    monkeypatch.setitem(runtimes.BUILDERS, "torch", lambda *_: 1 / 0)
    with pytest.raises(TowerError, match=r"can't run in torch \(float32\): division by zero"):
        runtimes.build(tower, "torch", "float32", pixels)


def test_a_runtime_that_is_asked_for_and_not_there(
    tower: ImageTower, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more than one precision to try, too."""

    def build(*_: Any) -> runtimes.Runtime:
        raise MissingExtraError("--runtime tensorrt", "tensorrt", "onnx")

    monkeypatch.setitem(runtimes.BUILDERS, "tensorrt", build)
    monkeypatch.setitem(runtimes.PRECISIONS, "tensorrt", ("float32", "bfloat16"))
    monkeypatch.setattr(runtimes, "fast_bfloat16", lambda device: True)
    with pytest.raises(TowerError, match=r"pip install 'litune\[onnx\]'"):
        runtimes.fastest(tower, pixels, name="tensorrt")


def failing(at: int, why: Exception) -> Any:
    """What stands for torch.compile: networks that fail in their call number `at`."""

    def compiled(network: Any, **_: Any) -> Any:
        calls = [0]

        class Failing(nn.Module):
            def forward(self, pixels: Tensor) -> Tensor:
                calls[0] += 1
                if calls[0] >= at:
                    raise why
                found: Tensor = network(pixels)
                return found

        return Failing()

    return compiled


NO_COMPILER = RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")
BOTH = [("torch", "float32"), ("compile", "float32")]


@pytest.mark.parametrize(
    ("at", "why", "said"),
    [
        (1, NO_COMPILER, "resnet18?init=random&size=64 can't run in compile (float32): Failed to find C compiler."),
        (3, ModuleNotFoundError("No module named 'triton'"), "(float32): No module named 'triton'"),  # while timed
        (5, ValueError("later"), "compile in float32 failed: later"),  # in a later round
        (1, torch.OutOfMemoryError("CUDA out of memory."), "memory is too small for --batch-size 1"),
    ],
)
def test_a_runtime_that_fails_is_left_out(
    tower: ImageTower,
    pixels: Tensor,
    at: int,
    why: Exception,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch, "compile", failing(at, why))
    monkeypatch.setattr(runtimes, "images_per_second", lambda one, pixels: float(len(one.run(pixels))))
    best, trials = runtimes.measure(tower, BOTH, pixels)
    assert str(best) == "torch in float32"
    assert [one.name for one in trials] == ["torch"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out: ")]
    assert len(lines) == 1
    assert said in lines[0]


def test_a_named_runtime_that_fails_names_the_remedy(
    tower: ImageTower, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", failing(1, NO_COMPILER))
    with pytest.raises(TowerError, match=r"in compile \(float32\): Failed to find C compiler.; use --runtime torch$"):
        runtimes.fastest(tower, pixels, name="compile", precision="float32")


def test_a_remembered_runtime_that_fails_is_not_taken(
    tower: ImageTower, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wanted(*_: Any, **__: Any) -> list[tuple[str, str]]:
        return BOTH

    monkeypatch.setattr(runtimes, "candidates", wanted)
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    rates = iter([1.0, 2.0])
    with monkeypatch.context() as patch:
        patch.setattr(runtimes, "images_per_second", lambda *_: next(rates))
        patch.setattr(runtimes, "ROUNDS", 1)
        assert str(runtimes.fastest(tower, pixels)) == "compile in float32"
    assert str(runtimes.fastest(tower, pixels)) == "compile in float32"
    monkeypatch.setattr(torch, "compile", failing(1, NO_COMPILER))
    monkeypatch.setattr(runtimes, "images_per_second", lambda *_: 1.0)
    assert str(runtimes.fastest(tower, pixels)) == "torch in float32"


def test_a_compiled_network_sees_one_shape(tower: ImageTower, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[int] = []

    def compiled(network: Any, **settings: Any) -> Any:
        assert settings == {"dynamic": False}
        network.register_forward_pre_hook(lambda _, arguments: shapes.append(len(arguments[0])))
        return network

    monkeypatch.setattr(torch, "compile", compiled)
    runtime = runtimes.build(tower, "compile", "float32", pixels)
    found = torch.cat([runtime.run(pixels), runtime.run(pixels[:2])])
    assert torch.equal(found, tower.encode(torch.cat([pixels, pixels[:2]]))[[*range(5), 0, 1]])
    assert shapes == [5, 5, 5]  # the trial, a batch, the last one


def test_a_picture_without_features_does_not_count(
    tower: ImageTower, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = tower.encode

    def broken(x: Tensor, **settings: Any) -> Tensor:
        found = encode(x, **settings)
        found[(x == pixels[1]).flatten(1).all(1)] = torch.nan
        return found

    monkeypatch.setattr(tower, "encode", broken)
    monkeypatch.setattr(runtimes, "images_per_second", lambda *_: 1.0)
    best, trials = runtimes.measure(tower, [("torch", "float32")], pixels)
    assert (str(best), trials[0].cosine) == ("torch in float32", 1.0)
    with pytest.raises(TowerError, match="no finite features for the first 1 pictures: check its weights, or go on"):
        runtimes.measure(tower, [("torch", "float32")], pixels[1:2])


def test_a_tower_that_runs_by_itself_stays_on_the_processor() -> None:
    """Its callable is given what it can read, whatever device the model is moved to."""
    transform = ImageTransform(size=(2, 2), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    alone = ImageTower("onnx:x", lambda x: x.flatten(1), transform, description={}, weights="", pooling="")
    moved = nn.Sequential(alone).to("meta")[0]
    assert isinstance(moved, ImageTower)
    runtime = runtimes.build(moved, "torch", "float32", torch.empty(0))
    assert runtime.device == "cpu"
    assert runtime.run(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)).tolist() == [[2.0] * 12]
