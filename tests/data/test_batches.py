from __future__ import annotations

import numpy as np

from litune.data.batches import Batches, Field

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
