"""Whether two pictures show the same photo: their thumbnails, aligned, then compared patch by patch.

A copy may be cropped, scaled, mirrored, brighter, compressed or have text on it. Brightness gain and offset are
removed; scale and shift along both axes are found by Gauss-Newton steps on the difference of the two thumbnails, from
coarse to fine (inverse compositional: Baker and Matthews, "Lucas-Kanade 20 years on", 2004). The agreement is the mean
correlation of small patches, so that text in a corner costs a few patches, while two photos of similar layout agree in
few.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image, ImageFile
from torch import Tensor
from torch.nn import functional as F

from litune.image.pictures import read_picture, upright

SIDE = 64
"""Pixels of a thumbnail's side; the aspect ratio is not kept."""
COARSE, FINE = ((8, 5), (16, 5)), ((32, 5), (64, 3))
"""Pixels and steps of the alignment: of both orientations, then of the better one alone."""
LIKE = 0.5
"""Pairs with a lower correlation at the coarse level are not aligned further."""
PATCH = 8
TEXTURE = 4.0
"""The standard deviation, in gray levels, below which a patch is flat."""
FEWEST = 8
"""The least number of the 64 patches that two nearly flat pictures must share to agree fully."""
SCALES, SHIFT = (0.6, 1.7), 0.7
"""The limits of an alignment: scale, and shift in half thumbnails."""


def thumbnail(data: bytes) -> np.ndarray:
    """The bytes of a picture as gray values, upright, squeezed to [SIDE, SIDE] uint8."""
    return read_picture(io.BytesIO(data), _gray)


def _gray(file: ImageFile.ImageFile) -> np.ndarray:
    file.draft("L", (2 * SIDE, 2 * SIDE))  # decode a JPEG at a fraction of its size, in gray
    image = upright(file)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def agreement(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """How well P pairs of thumbnails, uint8 [P, SIDE, SIDE], agree after alignment: [P], at most 1.

    `other` is also tried mirrored. Where one is a crop, alignment is more reliable if the crop is `other`. Pairs that
    differ at the coarse level already (most do) have 0.
    """
    agreements = np.zeros(len(one), np.float32)
    with torch.inference_mode():
        fixed, moving = (torch.from_numpy(t).float()[:, None] for t in (one, other))
        candidates = torch.cat([moving, moving.flip(-1)])
        place = torch.zeros(len(candidates), 2, 2)
        place[:, 0] = 1
        for side, steps in COARSE:
            small = _shrink(fixed, side).repeat(2, 1, 1, 1), _shrink(candidates, side)
            place = _align(*small, place, steps)
        likeness, mirrored = _correlation(*small, place).view(2, -1).max(0)
        rows = torch.nonzero(likeness >= LIKE)[:, 0]
        if len(rows):
            chosen = mirrored[rows] * len(fixed) + rows
            fixed, moving, place = fixed[rows], candidates[chosen], place[chosen]
            for side, steps in FINE:
                place = _align(_shrink(fixed, side), _shrink(moving, side), place, steps)
            agreements[rows.numpy()] = _patches(fixed, moving, place).numpy()
    return agreements


def _shrink(pictures: Tensor, side: int) -> Tensor:
    return pictures if side == SIDE else F.avg_pool2d(pictures, SIDE // side)


def _coordinates(side: int) -> Tensor:
    """The centres of pixels, from -1 to 1."""
    return (torch.arange(side) + 0.5) * 2 / side - 1


def _sample(pictures: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures [P, 1, S, S] read at scale · x + shift, and where that is inside.

    `place` is [P, scale or shift, x or y].
    """
    at = _coordinates(pictures.shape[-1])
    x = place[:, 0, 0, None] * at + place[:, 1, 0, None]
    y = place[:, 0, 1, None] * at + place[:, 1, 1, None]
    grid = torch.stack([x[:, None, :].expand(-1, len(at), -1), y[:, :, None].expand(-1, -1, len(at))], dim=-1)
    read = F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)
    inside = ((x.abs() <= 1)[:, None, :] & (y.abs() <= 1)[:, :, None])[:, None].float()
    return read, inside


def _standardize(values: Tensor, inside: Tensor) -> Tensor:
    """Values with mean 0 and standard deviation 1 inside, 0 outside."""
    count = inside.sum((-1, -2), keepdim=True).clamp(min=1)
    centered = (values - (values * inside).sum((-1, -2), keepdim=True) / count) * inside
    return centered / ((centered**2).sum((-1, -2), keepdim=True) / count).sqrt().clamp(min=1)


def _align(fixed: Tensor, moving: Tensor, place: Tensor, steps: int) -> Tensor:
    """Gauss-Newton steps from `place` to where `moving` looks like `fixed`."""
    side = fixed.shape[-1]
    at = _coordinates(side)
    target = F.pad(_standardize(fixed, torch.ones_like(fixed)), (1, 1, 1, 1), mode="replicate")
    dx = (target[..., 1:-1, 2:] - target[..., 1:-1, :-2]) * side / 4
    dy = (target[..., 2:, 1:-1] - target[..., :-2, 1:-1]) * side / 4
    slopes = torch.cat([dx * at, dy * at[:, None], dx, dy], dim=1).flatten(2)  # [P, 4, S·S]
    normal = slopes @ slopes.transpose(1, 2)
    normal += torch.eye(4) * (1e-3 * normal.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-6)
    solution = torch.linalg.solve(normal, slopes)  # once: it does not depend on the alignment
    for _ in range(steps):
        read, inside = _sample(moving, place)
        error = _standardize(read, inside) - _standardize(fixed, inside)
        step = (solution @ error.flatten(1)[..., None]).view(-1, 2, 2)
        step = (step / inside.mean((1, 2, 3)).clamp(min=0.1)[:, None, None]).clamp(-0.3, 0.3)
        scale = place[:, 0] / (1 + step[:, 0])
        shift = place[:, 1] - scale * step[:, 1]
        place = torch.stack([scale.clamp(*SCALES), shift.clamp(-SHIFT, SHIFT)], dim=1)
    return place


def _correlation(fixed: Tensor, moving: Tensor, place: Tensor) -> Tensor:
    read, inside = _sample(moving, place)
    product = _standardize(read, inside) * _standardize(fixed, inside)
    return product.sum((1, 2, 3)) / inside.sum((1, 2, 3)).clamp(min=1)


def _patches(fixed: Tensor, moving: Tensor, place: Tensor) -> Tensor:
    """The mean correlation of patches, over those that are inside and not flat in both."""
    read, inside = _sample(moving, place)

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, PATCH)[:, 0]

    whole = mean(inside) == 1
    variances = [(mean(v**2) - mean(v) ** 2).clamp(min=0) for v in (fixed, read)]
    covariance = mean(fixed * read) - mean(fixed) * mean(read)
    counted = whole & (torch.maximum(*variances) >= TEXTURE**2)
    correlation = covariance / (variances[0] * variances[1]).sqrt().clamp(min=1)
    return torch.where(counted, correlation, 0).sum((1, 2)) / counted.sum((1, 2)).clamp(min=FEWEST)
