"""Bootstrap intervals of a figure, and of the difference of two figures on the same examples."""

from __future__ import annotations

import numpy as np

from litune.errors import DataError

LEVEL = 0.95
DRAWS = 2**24
"""The most counts drawn at once: 128 MB."""

DEFINITION = (
    "95% percentile bootstrap of 1,000 resamples. What is drawn anew are independent units: images (with all their "
    "captions), or whole classes for mean_per_class. It says how far the figure would move with other examples of the "
    "same kind, not with another seed of the tuning."
)


def interval(
    outcomes: np.ndarray,
    groups: np.ndarray | None = None,
    per_group_mean: bool = False,
    seed: int = 0,
    resamples: int = 1000,
) -> tuple[float, float]:
    """The 95% percentile bootstrap interval of the mean outcome [N], resampling whole `groups` [N] where given.

    With `per_group_mean` the figure is the mean of the groups' means, as for mean per-class accuracy. Where all units
    failed, or all succeeded, resampling them shows no variance: the exact binomial (Clopper-Pearson) bound is used
    instead. With a single unit nothing is known: (0, 1). Raises `DataError` for outcomes that are not finite, or none.
    """
    units, counts = _units([outcomes], groups, per_group_mean)
    total, levels = int(counts.sum()), units[:, 0] / units[:, 1]
    if total == 1:
        return 0.0, 1.0
    if (levels == 0).all() or (levels == 1).all():
        certain = ((1 - LEVEL) / 2) ** (1 / total)
        return (0.0, 1 - certain) if levels[0] == 0 else (certain, 1.0)
    low, high = np.percentile(_resampled(units, counts, seed, resamples)[0], _percentiles())
    return float(low), float(high)


def paired(
    a: np.ndarray,
    b: np.ndarray,
    groups: np.ndarray | None = None,
    per_group_mean: bool = False,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, float]:
    """How much higher the figure of `a` [N] is than that of `b` [N], both measured on the same examples.

    `difference`, and the `low` and `high` end of its 95% paired bootstrap interval: both are resampled together, so
    that the difficulty of the examples cancels out. Where no unit favours the other run, no resample can: the end
    nearer to zero is then at most that of the exact sign test (McNemar's), which excludes zero from six units on.
    Raises `DataError` where the numbers of examples differ.
    """
    if len(a) != len(b):
        raise DataError(f"runs measured on {len(a):,} and {len(b):,} examples can't be compared example by example")
    units, counts = _units([a, b], groups, per_group_mean)
    sums = counts @ units
    drawn = _resampled(units, counts, seed, resamples)
    low, high = np.percentile(drawn[0] - drawn[1], _percentiles())
    difference, gaps = (sums[0] - sums[1]) / sums[2], units[:, 0] - units[:, 1]
    differing = counts[gaps != 0].sum()
    if differing and ((gaps >= 0).all() or (gaps <= 0).all()):
        # Clopper-Pearson's least share p of favouring units gives the least difference, p − (1 − p) of the differing.
        nearest = difference * (2 * ((1 - LEVEL) / 2) ** (1 / differing) - 1)
        low, high = min(low, nearest) if difference > 0 else low, max(high, nearest) if difference < 0 else high
    return {"difference": float(difference), "low": float(low), "high": float(high)}


def _percentiles() -> tuple[float, float]:
    return 50 * (1 - LEVEL), 50 * (1 + LEVEL)


def _units(
    outcomes: list[np.ndarray], groups: np.ndarray | None, per_group_mean: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The distinct resampling units, as sums of outcomes and size [U, R + 1], and how many there are of each [U].

    A resample depends only on how often each *kind* of unit is drawn, and 0/1 outcomes have few kinds: ten million
    captions cost no more than a thousand.
    """
    values = np.stack([np.asarray(array, dtype=np.float64) for array in outcomes], axis=1)
    if not len(values):
        raise DataError("there are no examples: no figure can be told")
    if not np.isfinite(values).all():
        raise DataError("some outcomes are not finite: no interval can be told from them")
    sizes = np.ones(len(values))
    if groups is not None:
        if len(groups) != len(values):
            raise DataError(f"{len(values):,} outcomes have {len(groups):,} groups: one each is needed")
        _, unit = np.unique(groups, return_inverse=True)
        sizes = np.bincount(unit).astype(np.float64)
        values = np.stack([np.bincount(unit, column) for column in values.T], axis=1)
    if per_group_mean:
        values, sizes = values / sizes[:, None], np.ones(len(sizes))
    kinds, counts = np.unique(np.column_stack([values, sizes]), axis=0, return_counts=True)
    return kinds, counts


def _resampled(units: np.ndarray, counts: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """The figures [R, resamples] of resamples of the same size, drawn with replacement."""
    random = np.random.default_rng(seed)
    total, parts = int(counts.sum()), []
    at_once = max(1, DRAWS // len(counts))
    for start in range(0, resamples, at_once):
        drawn = random.multinomial(total, counts / total, size=min(at_once, resamples - start)) @ units
        parts.append(drawn[:, :-1] / drawn[:, -1:])
    figures: np.ndarray = np.concatenate(parts).T
    return figures
