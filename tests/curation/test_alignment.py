from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

from litune.curation.alignment import SIDE, agreement, thumbnail


def scene(seed: int) -> Image.Image:
    """A made picture with structure at several sizes, as photos have."""
    random = np.random.default_rng(seed)
    values = np.zeros((192, 256, 3))
    for side in (3, 6, 12, 24, 48):
        coarse = Image.fromarray(random.integers(0, 256, (side, side, 3), dtype=np.uint8))
        values += np.asarray(coarse.resize((256, 192), Image.Resampling.BICUBIC)) / side**0.5
    return Image.fromarray((255 * (values - values.min()) / np.ptp(values)).astype(np.uint8))


def thumb(picture: Image.Image, quality: int = 90) -> np.ndarray:
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=quality)
    return thumbnail(data.getvalue())


def write_on(picture: Image.Image) -> Image.Image:
    picture = picture.copy()
    ImageDraw.Draw(picture).text((20, 20), "(c) somebody", "white")
    return picture


COPIES = {
    "same": lambda p: p,
    "half": lambda p: p.resize((128, 96)),
    "stretched": lambda p: p.resize((300, 180)),
    "mirrored": ImageOps.mirror,
    "brighter": lambda p: ImageEnhance.Brightness(p).enhance(1.2),
    "less contrast": lambda p: ImageEnhance.Contrast(p).enhance(0.7),
    "cropped at a corner": lambda p: p.crop((0, 0, 232, 174)),
    "cropped inside": lambda p: p.crop((14, 11, 240, 181)),
    "cropped and mirrored": lambda p: ImageOps.mirror(p.crop((14, 11, 240, 181))),
    "text": write_on,
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_agree(kind: str) -> None:
    originals = [scene(seed) for seed in range(6)]
    one = np.stack([thumb(p) for p in originals])
    other = np.stack([thumb(COPIES[kind](p), quality=60) for p in originals])
    assert (agreement(one, other) > 0.85).all()


def test_others_do_not_agree() -> None:
    pictures = np.stack([thumb(scene(seed)) for seed in range(12)])
    one, other = np.triu_indices(12, 1)
    assert (agreement(pictures[one], pictures[other]) < 0.5).all()


def test_flat_pictures_do_not_agree() -> None:
    """Nothing in common but emptiness is no copy; nor does it divide by zero."""
    flat = np.full((2, SIDE, SIDE), 200, np.uint8)
    flat[1, 3, 3] = 0
    assert (agreement(flat, flat[::-1].copy()) < 0.5).all()


def test_thumbnail_is_upright_and_on_white() -> None:
    picture = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (0, 0, 20, 20))
    data = io.BytesIO()
    picture.save(data, "PNG")
    found = thumbnail(data.getvalue())
    assert found.shape == (SIDE, SIDE)
    assert found[:, : SIDE // 2 - 1].max() == 0
    assert found[:, SIDE // 2 + 1 :].min() == 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    data = io.BytesIO()
    Image.fromarray(np.r_[np.zeros((32, 64), np.uint8), np.full((32, 64), 255, np.uint8)]).save(data, "JPEG", exif=exif)
    found = thumbnail(data.getvalue())
    assert found[:, : SIDE // 2 - 4].min() > 200
    assert found[:, SIDE // 2 + 4 :].max() < 50
