from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from litune.curation import duplicates as dedup
from litune.curation.duplicates import (
    DuplicatePairs,
    NeighbourIndex,
    Space,
    candidates,
    groups,
    once,
    same_content,
    stays,
)


def blocks_of(features: np.ndarray) -> dedup.Blocks:
    def blocks(numbers: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(numbers), 100):
            yield features[numbers[start : start + 100]]

    return blocks


@pytest.fixture
def features() -> np.ndarray:
    """400 images of 40 clusters, all values positive as after a last ReLU."""
    random = np.random.default_rng(0)
    middles = random.normal(size=(40, 32)) * 2
    return np.abs(middles[random.integers(0, 40, 400)] + random.normal(size=(400, 32))).astype(np.float32)


def test_space_keeps_cosines_of_centered_features(features: np.ndarray) -> None:
    space = Space.fit(features, width=32)
    unit = space(features)
    centered = features - features.mean(axis=0)
    centered /= np.linalg.norm(centered, axis=1, keepdims=True)
    assert unit @ unit.T == pytest.approx(centered @ centered.T, abs=1e-4)
    assert Space.fit(features, width=5)(features).shape == (400, 5)


@pytest.mark.parametrize("within", [True, False])
def test_candidates_are_those_of_the_full_matrix(features: np.ndarray, within: bool) -> None:
    space = Space.fit(features)
    index = NeighbourIndex(space, blocks_of(features), len(features))
    numbers = np.arange(len(features))
    queries = ((numbers[i : i + 150], features[i : i + 150]) for i in range(0, 400, 150))
    found = list(candidates(space, queries, index, neighbours=3, min_cosine=0.6, within=within))
    pairs = {(int(a), int(b)) for block in found for a, b in zip(block.left, block.right, strict=True)}
    unit = space(features)
    cosines = unit @ unit.T
    if within:
        np.fill_diagonal(cosines, -1)
    expected = set()
    for one in range(400):
        for other in np.argsort(-cosines[one])[:3].tolist():
            if cosines[one, other] >= 0.6:
                expected.add((min(one, other), max(one, other)) if within else (one, other))
    assert pairs == expected


def test_approximate_index_finds_nearly_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dedup, "EXACT", 10)
    random = np.random.default_rng(1)
    many = random.normal(size=(3000, 32)).astype(np.float32)
    copies = many + random.normal(size=many.shape).astype(np.float32) * 0.3
    space = Space.fit(many)
    index = NeighbourIndex(space, blocks_of(many), len(many))
    nearest, cosines = index.search(space(copies), 2)
    own = nearest[:, 0] == np.arange(3000)
    assert own.mean() > 0.98
    expected = (space(copies) * space(many)).sum(axis=1)
    assert cosines[own, 0] == pytest.approx(expected[own], abs=0.02)  # a byte per value


def test_pairs_are_given_once() -> None:
    found = DuplicatePairs(np.array([1, 0, 1]), np.array([2, 3, 2]), np.array([0.5, 0.6, 0.5]), np.zeros(3))
    kept = once(found)
    assert list(zip(kept.left.tolist(), kept.right.tolist(), strict=True)) == [(1, 2), (0, 3)]


def test_groups_and_who_stays() -> None:
    """Chains are one group, against a walk over the graph; the largest stays, of equal ones the first."""
    random = np.random.default_rng(0)
    one, other = random.integers(0, 200, (2, 120))
    label = groups(200, one, other)
    neighbours: dict[int, set[int]] = {i: set() for i in range(200)}
    for a, b in zip(one.tolist(), other.tolist(), strict=True):
        neighbours[a].add(b)
        neighbours[b].add(a)
    for start in range(200):
        seen, todo = {start}, [start]
        while todo:
            new = neighbours[todo.pop()] - seen
            seen |= new
            todo += new
        assert label[start] == min(seen)
    assert stays(np.array([0, 1, 0, 0, 4]), np.array([5, 5, 9, 9, 1])).tolist() == [2, 1, 2, 2, 4]
    assert len(groups(0, np.zeros(0, int), np.zeros(0, int))) == 0


def test_same_content() -> None:
    assert same_content(["a", "", "b", "a"], ["b", "a", "b", ""]).tolist() == [1, -1, 0, 1]


def test_space_of_equal_images() -> None:
    """Nothing to tell them apart by: no cosine, and no division by zero."""
    for count in (1, 5):
        unit = Space.fit(np.ones((count, 8), np.float32))(np.ones((count, 8), np.float32))
        assert np.isfinite(unit).all()
        assert np.abs(unit).max() < 1e-3
