from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from litune.errors import DataError
from litune.evaluation.calibration import calibrate, calibration_error, fit_temperature, reliability


def drawn(count: int, classes: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and labels drawn with exactly the probabilities that their softmax says."""
    torch.manual_seed(seed)
    logits = 1.5 * torch.randn(count, classes)
    return logits, torch.multinomial(logits.softmax(1), 1)[:, 0]


def test_error_by_hand() -> None:
    """Bins of 1/15: 0.9 and 0.92 share one (of which half are right), 0.30 is in another."""
    confidence, hits = np.array([0.90, 0.92, 0.30]), np.array([1.0, 0.0, 1.0])
    expected = 2 / 3 * abs(0.91 - 0.5) + 1 / 3 * abs(0.30 - 1)
    assert calibration_error(confidence, hits) == pytest.approx(expected)
    assert [row["images"] for row in reliability(confidence, hits)] == [1, 2]


def test_ends_of_the_bins() -> None:
    """A bin holds its upper end: 0.5 of two bins is in the first, 0 and 1 have a bin."""
    rows = reliability(np.array([0.0, 0.5, 0.51, 1.0]), np.ones(4), bins=2)
    assert [row["images"] for row in rows] == [2, 2]


def test_temperature_against_scipy() -> None:
    logits, labels = drawn(400)

    def loss(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(3 * logits / np.exp(log_temperature), labels))

    expected = np.exp(minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-6}).x)
    assert fit_temperature(3 * logits, labels) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("factor", [0.02, 0.4, 1.0, 6.0, 150.0])
def test_finds_the_temperature_that_was_put_in(factor: float) -> None:
    logits, labels = drawn(6000)
    found = calibrate(factor * logits, labels)
    assert found["temperature"] == pytest.approx(factor, rel=0.06)
    assert found["ece_after"] < 0.03
    assert found["fitted_on"] == found["measured_on"] == 3000
    if factor != 1:
        assert found["ece_before"] > 2 * found["ece_after"]


def test_fits_and_measures_on_different_images() -> None:
    """Labels of the measured half have no say in the temperature."""
    logits, labels = drawn(200)
    before = calibrate(logits, labels, seed=3)
    measured = np.random.default_rng(3).permutation(200)[100:]
    changed = labels.clone()
    changed[measured] = (changed[measured] + 1) % 5
    after = calibrate(logits, changed, seed=3)
    assert after["temperature"] == before["temperature"]
    assert after["ece_before"] != before["ece_before"]


def test_perfect_predictions_have_an_end() -> None:
    labels = torch.arange(40) % 4
    found = calibrate(torch.nn.functional.one_hot(labels).float().numpy(), labels.numpy())
    assert 1e-3 <= found["temperature"] < 0.1
    assert found["ece_after"] < 1e-3


def test_refuses() -> None:
    with pytest.raises(DataError, match="too few"):
        calibrate(torch.zeros(10, 3), torch.zeros(10))
    with pytest.raises(DataError, match="not finite"):
        calibrate(torch.full((30, 3), torch.nan), torch.zeros(30))
