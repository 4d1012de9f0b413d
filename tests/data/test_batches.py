from __future__ import annotations

import numpy as np

from litune.data.batches import Batches

FIRST = np.concatenate([[0], np.cumsum([1, 3, 2, 5, 1, 4, 2])])


def test_each_image_once_an_epoch_with_its_own_caption() -> None:
    batches = Batches(FIRST, 3, seed=1)
    assert batches.per_epoch == 2
    for epoch in range(5):
        of_epoch = list(batches.from_step(2 * epoch, 2 * epoch + 2))
        assert [b.epoch for b in of_epoch] == [epoch] * 2
        images = np.concatenate([b.images for b in of_epoch])
        assert len(set(images)) == 6
        for batch in of_epoch:
            assert ((batch.captions >= FIRST[batch.images]) & (batch.captions < FIRST[batch.images + 1])).all()


def test_captions_are_drawn_evenly() -> None:
    batches = Batches(FIRST, 7, seed=0)
    drawn = np.zeros(FIRST[-1])
    for batch in batches.from_step(0, 3000):
        drawn[batch.captions] += 1
    assert np.allclose(drawn[6:11] / 3000, 1 / 5, atol=0.03)


def test_any_step_can_be_gone_on_from() -> None:
    batches = Batches(FIRST, 2, seed=5)
    whole = list(batches.from_step(0, 20))
    for start in (1, 3, 7, 19):
        rest = list(batches.from_step(start, 20))
        assert [b.captions.tolist() for b in rest] == [b.captions.tolist() for b in whole[start:]]


def test_seeds_differ() -> None:
    one, two = (next(iter(Batches(FIRST, 7, seed=s).from_step(0, 1))).images.tolist() for s in (0, 1))
    assert one != two
