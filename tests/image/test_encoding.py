from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from litune import distributed
from litune.image import encoding
from litune.image.encoding import encode_images
from litune.image.pictures import Decoded
from litune.image.runtimes import Runtime


@pytest.fixture
def gray(tmp_path: Path) -> list[Path]:
    """Eleven pictures, number i of the one gray 10 · i; number 4 is damaged."""
    files = [tmp_path / f"{i}.png" for i in range(11)]
    for i, file in enumerate(files):
        Image.new("RGB", (4, 4), (10 * i,) * 3).save(file)
    files[4].write_bytes(b"no picture")
    return files


def values(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture)[:1, :1, 0]


def run_all(
    runtime: Runtime, files: Sequence[Path], dtype: str = "float32"
) -> tuple[list[Decoded], list[int], np.ndarray]:
    """All pictures, the sizes of the batches, and the features, in batches of 3."""
    found = list(
        encode_images(
            runtime,
            values,
            range(len(files)),
            lambda i: (files[i].name, files[i]),
            batch_size=3,
            workers=2,
            dtype=dtype,
        )
    )
    features = [one for _, one in found if one is not None]
    return [d for batch, _ in found for d in batch], [len(batch) for batch, _ in found], np.concatenate(features)


def twice(pixels: Tensor) -> Tensor:
    return torch.cat([pixels.flatten(1).float(), 2 * pixels.flatten(1).float()], dim=1)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_images_in_order(gray: list[Path], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device is fed by one thread, from pieces that others have read."""
    monkeypatch.setattr(encoding, "PIECE", 2)
    decoded, sizes, features = run_all(Runtime("torch", "float32", twice, device=device), gray)
    assert [one.row for one in decoded] == list(range(11))
    assert [one.row for one in decoded if one.damage] == [4]
    assert all(one.pixels is None for one in decoded)
    assert sizes == [3, 3, 3, 2]
    assert features.tolist() == [[10 * i, 20 * i] for i in range(11) if i != 4]


def broken(at: int, value: float) -> Callable[[Tensor], Tensor]:
    """`twice`, but this feature for the picture of gray 10 · at."""

    def encode(pixels: Tensor) -> Tensor:
        found = twice(pixels)
        found[found[:, 0] == 10 * at, 1] = value
        return found

    return encode


@pytest.mark.parametrize(
    ("value", "dtype", "reason"),
    [
        (float("nan"), "float32", "its features are not finite in torch in bfloat16"),
        (float("-inf"), "float16", "its features are not finite in torch in bfloat16"),
        (-70000.0, "float16", "its features reach 7e+04, too much for float16"),
        (-70000.0, "float32", None),
    ],
)
def test_features_that_are_no_numbers_are_damage(
    gray: list[Path], value: float, dtype: str, reason: str | None
) -> None:
    decoded, _, features = run_all(Runtime("torch", "bfloat16", broken(5, value)), gray, dtype)
    left_out = [4, 5] if reason else [4]
    assert [one.row for one in decoded if one.damage] == left_out
    assert features[:, 0].tolist() == [10 * i for i in range(11) if i not in left_out]
    if reason:
        damage = decoded[5].damage
        assert damage is not None
        assert (damage.key, damage.reason) == ("5.png", reason)


@pytest.mark.parametrize(
    ("images", "ranks", "expected"), [(100, 1, 32), (5000, 1, 512), (5000, 4, 128), (10**6, 1, 1024)]
)
def test_every_rank_has_eight_batches(images: int, ranks: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    assert encoding._largest_batch(images) == expected
