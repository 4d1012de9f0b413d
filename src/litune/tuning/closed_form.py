"""Linear maps of both towers' vectors into one space, in closed form: CCA, ridge regression, orthogonal Procrustes.

Everything follows from the means and covariances of the pairs, which one pass over them sums up (`Moments`). An image
counts once for each of its captions. Computed in float64 on the processor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

Matrix = Float[np.ndarray, "_ _"]
FLOOR = 1e-12
NEGLIGIBLE = 1e-6
"""Directions whose correlation is below this share of the largest are left out: rounding made them."""


class Sums:
    """The sums over pairs that their means and covariances follow from; sums of other pairs are added with `+`."""

    def __init__(self, image_width: int, text_width: int) -> None:
        self.pairs = 0
        self.image, self.text = np.zeros(image_width), np.zeros(text_width)
        self.image_image = np.zeros((image_width, image_width))
        self.text_text = np.zeros((text_width, text_width))
        self.image_text = np.zeros((image_width, text_width))

    def add(
        self, images: Float[np.ndarray, "B D"], texts: Float[np.ndarray, "N W"], counts: Int[np.ndarray, " B"]
    ) -> None:
        """Add N pairs: `texts` are those of the first image, `counts[0]` ≥ 1 of them, then of the second, and so on."""
        images, texts = images.astype(np.float64), texts.astype(np.float64)
        of_images = np.add.reduceat(texts, np.cumsum(counts) - counts)
        weighted = images * np.sqrt(counts)[:, None]
        self.pairs += len(texts)
        self.image += counts @ images
        self.text += texts.sum(0)
        self.image_image += weighted.T @ weighted
        self.text_text += texts.T @ texts
        self.image_text += images.T @ of_images

    def __add__(self, other: Sums) -> Sums:
        total = Sums(*self.image_text.shape)
        for name in vars(total):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total


class Moments:
    """The means and covariances of pairs, the latter in the basis of each side's principal directions."""

    def __init__(self, sums: Sums) -> None:
        count = max(1, sums.pairs)
        self.image_mean: Float[np.ndarray, " D"] = sums.image / count
        self.text_mean: Float[np.ndarray, " W"] = sums.text / count
        self._image_covariance = sums.image_image / count - np.outer(self.image_mean, self.image_mean)
        self._text_covariance = sums.text_text / count - np.outer(self.text_mean, self.text_mean)
        self.cross: Float[np.ndarray, "D W"] = sums.image_text / count - np.outer(self.image_mean, self.text_mean)

    @cached_property
    def image_spectrum(self) -> tuple[np.ndarray, Matrix]:
        """The images' variances [D] and their directions [D, D], as columns."""
        return np.linalg.eigh(self._image_covariance)

    @cached_property
    def text_spectrum(self) -> tuple[np.ndarray, Matrix]:
        """The texts' variances [W] and their directions [W, W], as columns."""
        return np.linalg.eigh(self._text_covariance)

    @cached_property
    def rotated_cross(self) -> Float[np.ndarray, "D W"]:
        """The covariance between images and texts, between both sides' principal directions."""
        found: np.ndarray = self.image_spectrum[1].T @ self.cross @ self.text_spectrum[1]
        return found


@dataclass(frozen=True)
class LinearMaps:
    """Maps of both sides: (x − mean) @ map, K wide. Where `image` is None, texts are mapped into the images' space."""

    image_mean: Float[np.ndarray, " D"]
    text_mean: Float[np.ndarray, " W"]
    image: Float[np.ndarray, "D K"] | None
    text: Float[np.ndarray, "W K"]


@dataclass(frozen=True)
class CanonicalDirections:
    """What regularised CCA finds, before directions are weighted; the most correlated first.

    `text` [W, K] are the texts' directions; `image` [D, K] those of the images, each times its correlation.
    """

    moments: Moments
    image: Float[np.ndarray, "D K"]
    text: Float[np.ndarray, "W K"]
    correlations: Float[np.ndarray, " K"]

    def weighted(self, image_power: float, text_power: float) -> LinearMaps:
        """Maps whose directions are multiplied by these powers of their correlations (CSA, arXiv 2410.07610)."""
        image = self.image * self.correlations ** (image_power - 1)
        return LinearMaps(
            self.moments.image_mean, self.moments.text_mean, image, self.text * self.correlations**text_power
        )


def cca(moments: Moments, image_shrinkage: float, text_shrinkage: float) -> CanonicalDirections:
    """Regularised canonical correlation analysis (Hotelling 1936; Vinod 1976).

    The singular vectors of (Cxx + s·I)^−½ Cxt (Ctt + s′·I)^−½, where s is `image_shrinkage` times the images' mean
    variance and s′ `text_shrinkage` times the texts'.
    """
    (image_variances, image_basis), (text_variances, text_basis) = moments.image_spectrum, moments.text_spectrum
    image_scale, text_scale = (
        _inverse_roots(image_variances, image_shrinkage),
        _inverse_roots(text_variances, text_shrinkage),
    )
    whitened = image_scale[:, None] * moments.rotated_cross * text_scale
    squares, vectors = np.linalg.eigh(whitened.T @ whitened)
    correlations = np.sqrt(np.maximum(squares[::-1], 0))
    rank = int((correlations > max(FLOOR, NEGLIGIBLE * correlations[0])).sum())
    vectors = _signed(vectors[:, ::-1][:, : min(rank, *whitened.shape)])
    image = (image_basis * image_scale) @ (whitened @ vectors)
    return CanonicalDirections(moments, image, (text_basis * text_scale) @ vectors, correlations[: vectors.shape[1]])


def ridge(moments: Moments, text_shrinkage: float) -> LinearMaps:
    """The linear map of texts to image features with the least squared error, shrunk (Hoerl and Kennard 1970)."""
    variances, basis = moments.text_spectrum
    scale = _inverse_roots(variances, text_shrinkage)
    weights = (basis * scale**2) @ (basis.T @ moments.cross.T)
    return LinearMaps(moments.image_mean, moments.text_mean, None, weights)


def procrustes(moments: Moments) -> LinearMaps:
    """The rotations of both sides under which they covary most, without scaling anything (Schönemann 1966)."""
    image, _, text = np.linalg.svd(moments.cross, full_matrices=False)
    return LinearMaps(moments.image_mean, moments.text_mean, image, text.T)


def _signed(vectors: Matrix) -> Matrix:
    """The columns, each with the sign that makes its largest entry positive: libraries and rounding choose any."""
    largest = np.abs(vectors).argmax(axis=0)
    signed: Matrix = vectors * np.sign(vectors[largest, np.arange(vectors.shape[1])])
    return signed


def _inverse_roots(variances: np.ndarray, shrinkage: float) -> np.ndarray:
    """1/√(variance + shrinkage · mean variance); 0 where nothing varies."""
    total = np.maximum(variances, 0) + shrinkage * max(float(variances.mean()), 0.0)
    return np.where(total > FLOOR * max(float(total.max()), FLOOR), 1 / np.sqrt(np.maximum(total, FLOOR**2)), 0.0)
