"""Closed forms against plain formulas in NumPy's float64, and on pairs whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from litune.tuning.closed_form import Moments, Sums, cca, procrustes, ridge


def made_pairs(images: int = 60, width: int = 8, text_width: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image features, text vectors that are a noisy linear map of them, and the number of texts of each image."""
    random = np.random.default_rng(0)
    features = random.normal(size=(images, width)) @ random.normal(size=(width, width)) + 3
    counts = random.integers(1, 4, images)
    texts = np.repeat(features, counts, axis=0) @ random.normal(size=(width, text_width))
    return features, texts + random.normal(size=texts.shape) - 1, counts


def moments_of(features: np.ndarray, texts: np.ndarray, counts: np.ndarray) -> Moments:
    sums = Sums(features.shape[1], texts.shape[1])
    sums.add(features, texts, counts)
    return Moments(sums)


def inverse_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors / np.sqrt(values)) @ vectors.T


def covariances(features: np.ndarray, texts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, ...]:
    pairs = np.repeat(features, counts, axis=0)
    x, t = pairs - pairs.mean(0), texts - texts.mean(0)
    return x.T @ x / len(x), t.T @ t / len(x), x.T @ t / len(x)


@pytest.mark.parametrize("widths", [(8, 5), (4, 9)])
def test_cca_is_the_singular_vectors_of_the_whitened_covariance(widths: tuple[int, int]) -> None:
    pairs = made_pairs(width=widths[0], text_width=widths[1])
    xx, tt, xt = covariances(*pairs)
    image_root = inverse_root(xx + 0.5 * np.trace(xx) / len(xx) * np.eye(len(xx)))
    text_root = inverse_root(tt + 0.2 * np.trace(tt) / len(tt) * np.eye(len(tt)))
    left, correlations, right = np.linalg.svd(image_root @ xt @ text_root, full_matrices=False)
    found = cca(moments_of(*pairs), 0.5, 0.2)
    assert np.allclose(found.correlations, correlations)
    maps = found.weighted(0.5, 2.0)
    # Singular vectors have no sign of their own: what both sides give together has.
    expected = (image_root @ left * correlations**0.5) @ (text_root @ right.T * correlations**2.0).T
    assert maps.image is not None
    assert np.allclose(maps.image @ maps.text.T, expected)
    assert np.allclose(np.abs(maps.text), np.abs(text_root @ right.T * correlations**2.0))


def test_unshrunk_directions_have_variance_one_and_their_correlations() -> None:
    features, texts, counts = made_pairs(300)
    maps = cca(moments_of(features, texts, counts), 0.0, 0.0)
    both = maps.weighted(0.0, 0.0)
    assert both.image is not None
    x = (np.repeat(features, counts, axis=0) - both.image_mean) @ both.image
    t = (texts - both.text_mean) @ both.text
    assert np.allclose(x.T @ x / len(x), np.eye(5))
    assert np.allclose(t.T @ t / len(t), np.eye(5))
    assert np.allclose(x.T @ t / len(t), np.diag(maps.correlations))


def test_ridge_solves_the_normal_equations() -> None:
    pairs = made_pairs()
    _, tt, xt = covariances(*pairs)
    expected = np.linalg.solve(tt + 0.3 * np.trace(tt) / len(tt) * np.eye(len(tt)), xt.T)
    found = ridge(moments_of(*pairs), 0.3)
    assert found.image is None
    assert np.allclose(found.text, expected)


def test_procrustes_finds_a_rotation() -> None:
    random = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(random.normal(size=(6, 6)))
    features = random.normal(size=(200, 6)) * np.arange(1, 7)
    found = procrustes(moments_of(features, features @ rotation, np.ones(200, int)))
    assert found.image is not None
    assert np.allclose(found.image @ found.text.T, rotation)


def test_sums_in_parts_are_the_whole() -> None:
    features, texts, counts = made_pairs()
    ends = np.cumsum(counts)
    first, second = Sums(8, 5), Sums(8, 5)
    first.add(features[:20], texts[: ends[19]], counts[:20])
    second.add(features[20:], texts[ends[19] :], counts[20:])
    whole, parts = moments_of(features, texts, counts), Moments(first + second)
    assert np.allclose(whole.cross, parts.cross)
    assert np.allclose(whole.image_mean, parts.image_mean)
    assert np.allclose(cca(whole, 1.0, 1.0).correlations, cca(parts, 1.0, 1.0).correlations)


@pytest.mark.parametrize("images", [1, 2, 3])
def test_fewer_pairs_than_dimensions_give_as_many_directions_as_they_have(images: int) -> None:
    features, texts, _ = made_pairs(images)
    found = cca(moments_of(features, texts[:images], np.ones(images, int)), 1.0, 1.0)
    maps = found.weighted(1.0, 0.0)
    assert maps.image is not None
    assert maps.image.shape[1] == maps.text.shape[1] == images - 1
    assert np.isfinite(maps.image).all()


def test_equal_features_have_no_direction() -> None:
    found = cca(moments_of(np.ones((9, 4)), np.random.default_rng(0).normal(size=(9, 3)), np.ones(9, int)), 1.0, 1.0)
    assert len(found.correlations) == 0
