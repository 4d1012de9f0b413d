from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from litune.errors import DataError, TowerError
from litune.image.pictures import ImageTransform, open_rgb
from litune.tuning.batches import Batch, Batches, Field
from litune.tuning.pixels import PixelLoader, inception_box

TRANSFORM = ImageTransform((16, 24), (0.5,) * 3, (0.5,) * 3, crop_pct=0.875)
N = 12
BATCHES = Batches(N, [Field(np.arange(N + 1), np.arange(N))], 4, seed=3)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Twelve noise pictures of different sizes."""
    random = np.random.default_rng(0)
    found = []
    for i in range(N):
        found.append(tmp_path / f"{i}.png")
        Image.fromarray(random.integers(0, 256, (40 + i, 60 - i, 3), dtype=np.uint8)).save(found[-1])
    return found


def loader(files: list[Path], preprocess: object = TRANSFORM, **options: object) -> PixelLoader:
    settings = {"augment": "inception", "flip": True, "seed": 3, "workers": 2, "ahead": 8, "max_damaged": 0.1}
    return PixelLoader(files, preprocess, **settings | options)


def pixels(pictures: PixelLoader, step: int, steps: int) -> list[np.ndarray]:
    return [found for _, found in pictures.from_batches(BATCHES.from_step(step, steps))]


def test_shapes_and_pairs(files: list[Path]) -> None:
    found = list(loader(files).from_batches(BATCHES.from_step(0, 7)))
    asked = list(BATCHES.from_step(0, 7))
    assert [b.images.tolist() for b, _ in found] == [b.images.tolist() for b in asked]
    assert [b.captions[0].tolist() for b, _ in found] == [b.captions[0].tolist() for b in asked]
    assert {(p.shape, p.dtype) for _, p in found} == {((4, 3, 16, 24), np.dtype(np.uint8))}


def test_neither_threads_nor_an_interruption_change_a_pixel(files: list[Path]) -> None:
    whole = pixels(loader(files), 0, 9)
    for workers, ahead in ((1, 1), (4, 64)):
        assert all(map(np.array_equal, pixels(loader(files, workers=workers, ahead=ahead), 0, 9), whole))
    for step in (1, 5, 8):
        assert all(map(np.array_equal, pixels(loader(files), step, 9), whole[step:]))


def test_epochs_seeds_and_images_differ(files: list[Path]) -> None:
    same = [files[0], files[0]]

    def first_of(seed: int, epoch: int) -> np.ndarray:
        batch = Batch(epoch, np.array([0, 1]), (np.array([0, 1]),))
        return next(loader(same, seed=seed).from_batches([batch]))[1]

    looks = [look.tobytes() for seed, epoch in ((0, 0), (0, 1), (1, 0)) for look in first_of(seed, epoch)]
    assert len(set(looks)) == 6


def test_crops_are_in_range_and_roughly_uniform() -> None:
    random = np.random.default_rng(0)
    width, height = 400, 400
    boxes = np.array([inception_box(width, height, random) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    assert (boxes >= 0).all()
    assert right.max() <= width
    assert bottom.max() <= height
    share = (right - left) * (bottom - top) / (width * height)
    aspect = (right - left) / (bottom - top)
    assert 0.045 < share.min() < 0.07
    assert 0.9 < share.max() <= 1
    assert 0.73 < aspect.min() < 0.77
    assert 1.3 < aspect.max() < 1.36
    # Where every aspect fits into the square, below 3/4 of its area, nothing is drawn again.
    counts, _ = np.histogram(share, bins=7, range=(0.05, 0.75))
    assert counts.min() > 0.85 * counts.mean()
    assert counts.max() < 1.15 * counts.mean()
    assert abs(np.log(aspect[share < 0.75]).mean()) < 0.01
    small = share < 0.2
    middle = ((left + right) / 2 / width)[small]
    assert (middle < 0.4).any()
    assert (middle > 0.6).any()


@pytest.mark.parametrize(("width", "height"), [(1000, 10), (10, 1000), (1, 1), (1, 300), (2, 3)])
def test_crops_of_thin_and_tiny_pictures(width: int, height: int) -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        left, top, right, bottom = inception_box(width, height, random)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_a_crop_is_scaled_whole_to_the_input(tmp_path: Path) -> None:
    """Of a picture whose color is its place, the pixels say which part was taken: the box that was drawn."""
    y, x = np.mgrid[:200, :200]
    place = np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8)
    Image.fromarray(place).save(tmp_path / "place.png")
    batch = Batch(2, np.array([0]), (np.array([0]),))
    (_, found), *_ = loader([tmp_path / "place.png"], flip=False).from_batches([batch])
    random = np.random.default_rng([3, 2, 1])
    random.random()  # the flip's
    left, top, right, bottom = inception_box(200, 200, random)
    columns, rows = found[0, 0].mean(axis=0), found[0, 1].mean(axis=1)
    step_x, step_y = (right - left) / 24, (bottom - top) / 16
    assert np.allclose(columns, left + step_x * (np.arange(24) + 0.5) - 0.5, atol=2)
    assert np.allclose(rows, top + step_y * (np.arange(16) + 0.5) - 0.5, atol=2)


@pytest.mark.parametrize("augment", ["none", "inception"])
def test_flips_both_ways(tmp_path: Path, augment: str) -> None:
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (64, 64, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")
    batches = [Batch(epoch, np.array([0]), (np.array([0]),)) for epoch in range(200)]

    def mirrored(flip: bool) -> np.ndarray:
        pictures = loader([tmp_path / "ramp.png"], augment=augment, flip=flip).from_batches(batches)
        return np.array([int(p[0, 0, 0, 0]) > int(p[0, 0, 0, -1]) for _, p in pictures])

    assert not mirrored(False).any()
    assert 70 < mirrored(True).sum() < 130


def test_plain_pictures_are_the_towers_own(files: list[Path]) -> None:
    expected = np.stack([TRANSFORM(open_rgb(f.read_bytes())) for f in files])
    positions, found = zip(*loader(files).in_order(5), strict=True)
    assert [len(p) for p in positions] == [5, 5, 2]
    assert np.array_equal(np.concatenate(found), expected)
    batch, tuned = next(loader(files, augment="none", flip=False).from_batches(BATCHES.from_step(0, 1)))
    assert np.array_equal(tuned, expected[batch.images])


def test_another_preprocessing(files: list[Path]) -> None:
    """Of a tower that is not an ImageTransform: it gets the crop at its own height and width."""
    seen = set()

    def preprocess(image: Image.Image) -> np.ndarray:
        seen.add(image.size)
        return np.asarray(image.resize((20, 10)), np.float32).transpose(2, 0, 1) / 255

    pictures = loader(files, preprocess)
    seen.clear()
    _, found = next(pictures.from_batches(BATCHES.from_step(0, 1)))
    assert seen == {(20, 10)}
    assert (found.shape, found.dtype) == ((4, 3, 10, 20), np.float32)
    with pytest.raises(TowerError, match=r"random crops need a tower .* not \[256, 256, 3\]"):
        loader(files, np.asarray)


def test_memory_is_bounded(files: list[Path]) -> None:
    decoded, lock = 0, threading.Lock()

    def preprocess(image: Image.Image) -> np.ndarray:
        nonlocal decoded
        with lock:
            decoded += 1
        return TRANSFORM(image)

    taken = 0
    pictures = loader(files, preprocess, augment="none", ahead=5, workers=4)
    for batch, _ in pictures.from_batches(BATCHES.from_step(0, 30)):
        taken += len(batch.images)
        assert decoded <= taken + 5


def test_leaving_early_stops_the_threads(files: list[Path]) -> None:
    before = threading.active_count()
    stream = loader(files).from_batches(BATCHES.from_step(0, 100))
    next(stream)
    stream.close()
    assert threading.active_count() == before


def test_damaged_images_are_left_out_and_counted_once(files: list[Path]) -> None:
    lost = 7
    whole = list(loader(files).from_batches(BATCHES.from_step(0, 9)))
    files[lost].write_bytes(files[lost].read_bytes()[:200])
    pictures = loader(files)
    for (batch, found), (all_of_it, all_found) in zip(
        pictures.from_batches(BATCHES.from_step(0, 9)), whole, strict=True
    ):
        kept = all_of_it.images != lost
        assert batch.images.tolist() == all_of_it.images[kept].tolist()
        assert batch.captions[0].tolist() == all_of_it.captions[0][kept].tolist()
        assert np.array_equal(found, all_found[kept])
    assert list(pictures.damaged) == [lost]
    assert pictures.damaged[lost].key == str(files[lost])
    assert lost not in np.concatenate([p for p, _ in pictures.in_order(5)])


def test_too_much_damage_stops(files: list[Path]) -> None:
    for file in files[:2]:
        file.unlink()
    with pytest.raises(DataError, match=r"2 of 12 images can't be read \(at most 10.0% may\), as .*does not exist"):
        pixels(loader(files), 0, 6)


def test_a_batch_without_any_image_stops(files: list[Path]) -> None:
    for file in files:
        file.unlink()
    with pytest.raises(DataError, match="none of the 4 images of a batch can be read, as .*does not exist"):
        pixels(loader(files, max_damaged=1.0), 0, 1)
