from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from litune.errors import DataError
from litune.evaluation.intervals import interval, paired


def by_loop(a: np.ndarray, b: np.ndarray, groups: np.ndarray, per_group_mean: bool) -> tuple[float, float]:
    """The interval of a − b by drawing whole groups, one resample at a time."""
    random = np.random.default_rng(7)
    names = np.unique(groups)
    members = [np.flatnonzero(groups == name) for name in names]
    found = []
    for _ in range(1500):
        drawn = [members[i] for i in random.integers(len(names), size=len(names))]
        if per_group_mean:
            found.append(np.mean([a[m].mean() - b[m].mean() for m in drawn]))
        else:
            rows = np.concatenate(drawn)
            found.append(a[rows].mean() - b[rows].mean())
    low, high = np.percentile(found, [2.5, 97.5])
    return low, high


@pytest.fixture(scope="module")
def outcomes() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two runs' hits on captions whose images are easy or hard, in groups of one to six."""
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(80), random.integers(1, 7, size=80))
    ease = random.beta(0.6, 0.8, size=80)[groups]
    a = (random.random(len(groups)) < ease).astype(float)
    b = np.where(random.random(len(groups)) < 0.8, a, 1 - a)
    return a, b, groups


@pytest.mark.parametrize("per_group_mean", [False, True])
def test_clusters_against_a_loop(outcomes: tuple[np.ndarray, np.ndarray, np.ndarray], per_group_mean: bool) -> None:
    a, b, groups = outcomes
    zero = np.zeros_like(a)
    got = interval(a, groups, per_group_mean, resamples=4000)
    assert got == pytest.approx(by_loop(a, zero, groups, per_group_mean), abs=0.012)
    pair = paired(a, b, groups, per_group_mean, resamples=4000)
    assert (pair["low"], pair["high"]) == pytest.approx(by_loop(a, b, groups, per_group_mean), abs=0.012)
    means = [(a[groups == g].mean(), b[groups == g].mean()) for g in range(80)]
    expected = np.mean(means, axis=0) if per_group_mean else np.array([a.mean(), b.mean()])
    assert pair["difference"] == pytest.approx(expected[0] - expected[1])


def test_clusters_are_wider_and_pairs_narrower(outcomes: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    a, b, groups = outcomes
    low, high = interval(a)
    grouped_low, grouped_high = interval(a, groups)
    assert grouped_high - grouped_low > 1.1 * (high - low)
    pair = paired(a, b)
    assert pair["high"] - pair["low"] < 0.8 * np.hypot(high - low, np.subtract(*interval(b)))


def test_against_scipy() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=150)
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=6000, rng=0).confidence_interval
    assert interval(values, resamples=6000) == pytest.approx((expected.low, expected.high), abs=0.03)


def test_covers_as_often_as_it_says() -> None:
    """Of hits with a known share, 95 in 100 intervals hold it; a binomial's width is 2 × 1.96 standard deviations."""
    random = np.random.default_rng(2)
    held = 0
    for _ in range(300):
        low, high = interval((random.random(200) < 0.3).astype(float), resamples=400)
        held += low <= 0.3 <= high
    assert 0.91 <= held / 300 <= 0.98
    low, high = interval((np.arange(10_000) < 3000).astype(float))
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 10_000), rel=0.08)


@pytest.mark.parametrize(("b", "c"), [(60, 30), (52, 40), (25, 3), (15, 14), (300, 250)])
def test_paired_against_mcnemar(b: int, c: int) -> None:
    """b images that only the first run has right, c that only the second has, of 2,000: the textbook's interval."""
    first = np.concatenate([np.ones(b), np.zeros(c), np.ones(500), np.zeros(1500 - b - c)])
    second = np.concatenate([np.zeros(b), np.ones(c), np.ones(500), np.zeros(1500 - b - c)])
    found = paired(first, second, resamples=8000)
    deviation = np.sqrt(b + c - (b - c) ** 2 / 2000)
    expected = (b - c - 1.96 * deviation, b - c + 1.96 * deviation)
    assert (2000 * found["low"], 2000 * found["high"]) == pytest.approx(expected, abs=0.08 * 2 * deviation)
    assert (found["low"] > 0) == (stats.binomtest(b, b + c).pvalue < 0.05)


@pytest.mark.parametrize("images", [12, 500])
def test_paired_with_few_that_differ(images: int) -> None:
    """All that differ favour one run: clear where McNemar's exact test is, whichever run it is."""
    for differing in range(1, 13):
        better, worse = np.ones(images), np.ones(images)
        worse[:differing] = 0
        clear = stats.binomtest(differing, differing).pvalue < 0.05
        found, turned = paired(better, worse), paired(worse, better)
        assert (found["low"] > 0) == (turned["high"] < 0) == clear
        assert found["low"] <= found["difference"] <= found["high"]
        assert (-turned["high"], -turned["low"]) == (found["low"], found["high"])


def test_nothing_or_everything_found_is_not_certain() -> None:
    """Where resampling shows no doubt, the exact binomial bound stands in."""
    exact = stats.binomtest(0, 40).proportion_ci(method="exact")
    assert interval(np.zeros(40)) == pytest.approx((exact.low, exact.high))
    exact = stats.binomtest(25, 25).proportion_ci(method="exact")
    # Fifty captions of 25 images are 25 independent observations.
    assert interval(np.ones(50), np.repeat(np.arange(25), 2)) == pytest.approx((exact.low, exact.high))
    assert interval(np.zeros(6), np.array([0, 0, 0, 1, 2, 3]))[1] == pytest.approx(1 - 0.025**0.25)
    assert interval(np.ones(5), np.zeros(5)) == (0.0, 1.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(3).random(50)
    assert interval(values, seed=4) == interval(values, seed=4)
    assert interval(values, seed=4) != interval(values, seed=5)
    assert paired(values, values) == {"difference": 0.0, "low": 0.0, "high": 0.0}


def test_refuses() -> None:
    with pytest.raises(DataError, match="no examples"):
        interval(np.array([]))
    with pytest.raises(DataError, match="not finite"):
        interval(np.array([1.0, np.nan]))
    with pytest.raises(DataError, match="one each is needed"):
        interval(np.ones(3), np.zeros(2))
    with pytest.raises(DataError, match="3 and 4 examples"):
        paired(np.ones(3), np.ones(4))
