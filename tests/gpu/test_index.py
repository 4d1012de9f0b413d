"""Search on a GPU: what the processor finds, without a wait between blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.gpu.conftest import World
from tests.pretend_cuda import PretendGPU, pretend

import litune
from litune.evaluation.retrieval import rank
from litune.index import index as module
from litune.index.index import Index

TEXTS = [f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("box", "ring")]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "block_rows", lambda *_: 5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cells", [0, 3])
def test_the_same_images(cells: int, masked: bool, world: World) -> None:
    """Out of the store and, from the second search on, out of what is kept on the card."""
    mask = np.arange(24) % 4 > 0 if masked else None

    def look(device: str) -> list[list[torch.Tensor]]:
        index, model = Index(world.store), litune.load(world.run, device=device)
        if cells:
            pytest.importorskip("faiss", reason="cells are of the extra search")
            index.build(cells)
        queries = model.encode_text(TEXTS)
        exact = False if cells else None
        return [part for _ in range(3) for part in index.nearest(model, queries, 7, mask=mask, exact=exact)]

    expected = look("cpu")
    with pretend():
        found = look("cuda")
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        close = 0 if i % 2 else 1e-5  # scores, then rows
        assert torch.allclose(torch.stack(ours), torch.stack(theirs), rtol=0, atol=close)


def test_one_copy_comes_back(world: World, gpu: PretendGPU) -> None:
    """Of texts in batches, and of a search through blocks; the other wait is for the weights' fingerprint."""
    index, model = Index(world.store), litune.load(world.run)
    gpu.waits.clear()
    gpu.copies.clear()
    queries = model.encode_text(TEXTS, batch_size=2)
    assert sum(gpu.waits.values()) == 1
    index.nearest(model, queries, 3)
    assert sum(gpu.waits.values()) == 3
    assert not gpu.copies


def test_ranks(gpu: PretendGPU) -> None:
    random = np.random.default_rng(0)
    images, texts = (torch.from_numpy(random.integers(-3, 4, (n, 5)).astype(np.float32)) for n in (20, 50))
    owner = torch.from_numpy(np.r_[np.arange(20), random.integers(0, 20, 30)])
    ours, theirs = rank(images.to("cuda"), texts, owner, chunk=7), rank(images, texts, owner, chunk=7)
    assert np.array_equal(ours.of_images, theirs.of_images)
    assert np.array_equal(ours.of_captions, theirs.of_captions)
