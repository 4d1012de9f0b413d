from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from litune.errors import TowerError
from litune.image import gpu
from litune.image.gpu import Parts, best_batch, repeated, stream


def test_batches_are_launched_before_earlier_features_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def receive(features: Tensor) -> Callable[[], Tensor]:
        name = str(int(features))
        done.append(f"launch {name}")
        return lambda: done.append(f"wait {name}") or features  # type: ignore[func-returns-value]

    monkeypatch.setattr(gpu, "receive", receive)
    batches = [(str(i), torch.tensor(i) if i != 2 else None) for i in range(5)]
    found = list(stream(lambda pixels: 10 * pixels, batches))
    assert [(name, None if features is None else int(features)) for name, features in found] == [
        ("0", 0),
        ("1", 10),
        ("2", None),
        ("3", 30),
        ("4", 40),
    ]
    assert done == ["launch 0", "launch 10", "wait 0", "launch 30", "wait 10", "launch 40", "wait 30", "wait 40"]


def limited(most: int, sizes: list[int]) -> Callable[[Tensor], Tensor]:
    """The sums of pictures, where memory is out with more than so many; `sizes` are those that were computed."""

    def encode(pixels: Tensor) -> Tensor:
        if len(pixels) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        sizes.append(len(pixels))
        return pixels.flatten(1).sum(1, keepdim=True)

    return encode


@pytest.mark.parametrize(
    ("fill", "sizes"), [(False, [3, 3, 3, 1, 2]), (True, [3, 3, 3, 3, 3])], ids=["as they are", "filled up"]
)
def test_parts_halve_where_memory_runs_out(fill: bool, sizes: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    pixels = torch.arange(60.0).view(10, 2, 3)
    computed: list[int] = []
    parts = Parts(limited(4, computed), 12, fill=fill)
    assert torch.equal(parts(pixels), pixels.flatten(1).sum(1, keepdim=True))
    assert torch.equal(parts(pixels[:2]), pixels[:2].flatten(1).sum(1, keepdim=True))  # and no attempt with more
    assert computed == sizes
    said = capsys.readouterr().err
    assert "encoding in parts of 6 (--batch-size)" in said
    assert "encoding in parts of 3 (--batch-size)" in said


def test_what_does_not_fit_at_all_names_the_setting() -> None:
    with pytest.raises(TowerError, match="too small for --batch-size 1: free some of it, or give --device cpu"):
        Parts(limited(0, []), 8)(torch.ones(8, 3))
    with pytest.raises(TowerError, match="too small for --batch-size 1"):
        best_batch(lambda size: None, 1024)


@pytest.mark.parametrize(
    ("rates", "most", "expected"),
    [
        ({64: 100, 128: 150, 256: 160, 512: 163}, 1024, 256),  # hardly faster
        ({64: 100, 128: 150, 256: 200, 512: 300, 1024: 400}, 1024, 1024),  # no larger is tried
        ({64: 100, 128: 150, 256: 200}, 1024, 256),  # no more fits
        ({8: 20}, 1024, 8),  # not even the first fits
        ({32: 50, 64: 100}, 32, 32),  # few pictures
    ],
)
def test_the_best_batch(rates: dict[int, float], most: int, expected: int) -> None:
    assert best_batch(rates.get, most) == expected


def test_a_batch_of_few_pictures() -> None:
    assert repeated(torch.tensor([[1], [2], [3]]), 7).flatten().tolist() == [1, 2, 3, 1, 2, 3, 1]
