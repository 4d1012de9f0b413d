from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from litune.tuning.batches import Batch, Batches, Field, FullPass, Mix, Shuffle, WindowedPass

FIRST = np.concatenate([[0], np.cumsum([1, 3, 2, 5, 1, 4, 2])])


def batches_of(size: int, seed: int) -> Batches:
    return Batches(7, [Field(FIRST, np.arange(FIRST[-1]))], size, seed)


def test_each_image_once_an_epoch_with_its_own_caption() -> None:
    batches = batches_of(3, seed=1)
    assert batches.per_epoch == 2
    for epoch in range(5):
        of_epoch = list(batches.from_step(2 * epoch, 2 * epoch + 2))
        assert [b.epoch for b in of_epoch] == [epoch] * 2
        images = np.concatenate([b.images for b in of_epoch])
        assert len(set(images)) == 6
        for batch in of_epoch:
            (captions,) = batch.captions
            assert ((captions >= FIRST[batch.images]) & (captions < FIRST[batch.images + 1])).all()


def test_captions_are_drawn_evenly() -> None:
    batches = batches_of(7, seed=0)
    drawn = np.zeros(FIRST[-1])
    for batch in batches.from_step(0, 3000):
        drawn[batch.captions[0]] += 1
    assert np.allclose(drawn[6:11] / 3000, 1 / 5, atol=0.03)


def test_any_step_can_be_gone_on_from() -> None:
    batches = batches_of(2, seed=5)
    whole = list(batches.from_step(0, 20))
    for start in (1, 3, 7, 19):
        rest = list(batches.from_step(start, 20))
        assert [b.captions[0].tolist() for b in rest] == [b.captions[0].tolist() for b in whole[start:]]


def test_seeds_differ() -> None:
    one, two = (next(iter(batches_of(7, seed=s).from_step(0, 1))).images.tolist() for s in (0, 1))
    assert one != two


def test_every_field_is_drawn_from_by_itself() -> None:
    """Images 0 and 2 have titles (two and one), images 1 and 2 have tags."""
    titles = Field(np.array([0, 2, 2, 3]), np.array([0, 1, 3]))
    tags = Field(np.array([0, 0, 1, 2]), np.array([2, 4]))
    seen: set[tuple[int, int, int]] = set()
    for batch in Batches(3, [titles, tags], 3, seed=0).from_step(0, 40):
        seen |= set(zip(batch.images.tolist(), *(c.tolist() for c in batch.captions), strict=True))
    assert seen == {(0, 0, -1), (0, 1, -1), (1, -1, 2), (2, 3, 4)}


# Orders


ONE_EACH = Field(np.arange(1001), None)


def passes_of(batches: Batches, count: int) -> list[np.ndarray]:
    """The images of the first epochs, in order."""
    found = [batch.images for batch in batches.from_step(0, count * batches.per_epoch)]
    return list(np.concatenate(found).reshape(count, -1))


def test_a_full_order_is_numpys() -> None:
    """The images of an epoch are the seed's permutation, the captions what is drawn after it for all images at once."""
    counts = np.random.default_rng(9).integers(1, 5, 200_000)
    first = np.concatenate([[0], np.cumsum(counts)])
    random = np.random.default_rng([3, 1])
    order = random.permutation(200_000)
    drawn = first[:-1] + random.integers(counts)
    batch = next(iter(Batches(200_000, [Field(first, None)], 100_000, seed=3).from_step(2, 3)))
    assert np.array_equal(batch.images, order[:100_000])
    assert np.array_equal(batch.captions[0], drawn[order[:100_000]])


def test_a_full_order_costs_few_bytes() -> None:
    one = FullPass(range(1000, 101_000), [Field(np.arange(0, 303_001, 3), None)] * 2, [0, 0])
    assert one.order.nbytes + sum(which.nbytes for which in one.which) == 100_000 * (4 + 2)


def test_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image once an epoch; a window's are of few blocks, mixed; the next window's blocks are told before."""
    monkeypatch.setattr("litune.tuning.batches.BLOCK", 10)
    monkeypatch.setattr("litune.tuning.batches.WINDOW", 5)
    told: list[list[range]] = []
    batches = Batches(1000, [ONE_EACH], 25, 0, shuffle="window", coming=told.append)
    one, two = passes_of(batches, 2)
    assert sorted(one) == sorted(two) == list(range(1000))
    assert one.tolist() != two.tolist()
    for start in range(0, 1000, 50):
        blocks = {image // 10 for image in one[start : start + 50]}
        assert len(blocks) == 5
        assert (np.diff(one[start : start + 50]) != 1).sum() > 30
    seen = [{block.start // 10 for block in blocks} for blocks in told[:19]]
    assert seen == [{image // 10 for image in one[start : start + 50]} for start in range(50, 1000, 50)]
    captions = np.concatenate([batch.captions[0] for batch in batches.from_step(0, 40)])
    assert np.array_equal(captions, one)  # with one caption each


@pytest.mark.parametrize("images", [1, 9, 10, 11, 64, 103])
def test_a_last_block_that_is_short(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litune.tuning.batches.BLOCK", 10)
    monkeypatch.setattr("litune.tuning.batches.WINDOW", 3)
    one = WindowedPass(range(5, 5 + images), [ONE_EACH], [0, 0])
    parts = [one.part(begin, min(begin + 7, images))[0] for begin in range(0, images, 7)]
    assert sorted(np.concatenate(parts)) == list(range(5, 5 + images))
    assert np.array_equal(one.part(0, images)[0], np.concatenate(parts))


# Mixtures


def sources_of(batch: Batch, batches: Batches) -> np.ndarray:
    return np.bincount(np.searchsorted(batches.starts, batch.images, "right") - 1, minlength=len(batches.sources))


@pytest.mark.parametrize("shuffle", ["full", "window"])
def test_alternating(shuffle: Shuffle) -> None:
    """Batches of one source in turns; each source goes through all its images before it begins again."""
    batches = Batches(1000, [ONE_EACH], 10, 4, shuffle=shuffle, sources=(700, 230, 70), mix="alternate")
    assert batches.per_epoch == 100
    found = list(batches.from_step(0, 300))
    assert [batch.epoch for batch in found] == [step // 100 for step in range(300)]
    for step, batch in enumerate(found):
        assert sources_of(batch, batches)[step % 3] == 10
    for source, size in enumerate((700, 230, 70)):
        images = np.concatenate([batch.images for batch in found[source::3]])
        begin = int(batches.starts[source])
        for start in range(0, 1000 - size + 1, size):
            assert sorted(images[start : start + size]) == list(range(begin, begin + size))
        assert size == 700 or images[:size].tolist() != images[size : 2 * size].tolist()


def test_weights_that_divide_the_batch_hold_exactly() -> None:
    mix = (Fraction("0.7"), Fraction("0.2"), Fraction("0.1"))
    batches = Batches(1000, [ONE_EACH], 10, 0, sources=(100, 800, 100), mix=mix)
    for batch in batches.from_step(0, 50):
        assert sources_of(batch, batches).tolist() == [7, 2, 1]
        assert len(set(batch.images)) == 10
    first = np.concatenate([batch.images for batch in batches.from_step(0, 100)])
    assert np.bincount(first)[:100].tolist() == [7] * 100  # 700 pairs of 100 images


def test_weights_that_do_not_are_rounded_and_hold_on_average() -> None:
    weights = np.array([0.37, 0.61, 0.02])
    mix = tuple(map(Fraction, ("37", "61", "2")))
    batches = Batches(1000, [ONE_EACH], 16, 0, sources=(300, 300, 400), mix=mix)
    counts = np.array([batches.pairs_of_sources(step, step + 1) for step in range(2000)])
    assert (counts.sum(1) == 16).all()
    assert (np.abs(counts - 16 * weights) < 1).all()
    assert np.abs(counts.mean(0) - 16 * weights).max() < 2e-3
    assert np.array_equal(batches.pairs_of_sources(17, 1300), counts[17:1300].sum(0))
    for step, batch in enumerate(batches.from_step(0, 20)):
        assert np.array_equal(sources_of(batch, batches), counts[step])


@pytest.mark.parametrize("mix", ["alternate", (Fraction(3), Fraction(1), Fraction(2))])
@pytest.mark.parametrize("shuffle", ["full", "window"])
def test_mixtures_go_on_from_any_step(mix: Mix, shuffle: Shuffle) -> None:
    settings: dict[str, Any] = {"shuffle": shuffle, "sources": (60, 25, 15), "mix": mix}
    whole = list(Batches(100, [ONE_EACH], 7, 1, **settings).from_step(0, 60))
    for start in (1, 13, 44, 59):
        rest = list(Batches(100, [ONE_EACH], 7, 1, **settings).from_step(start, 60))
        assert [b.images.tolist() for b in rest] == [b.images.tolist() for b in whole[start:]]
        assert [b.captions[0].tolist() for b in rest] == [b.captions[0].tolist() for b in whole[start:]]
